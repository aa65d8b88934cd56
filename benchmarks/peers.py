"""What others cost beside us where both measure the same, after their answers (answers.py): `make bench`.

Peers: forward hooks, nnsight, torchlens, TransformerLens, the formulas of ShortGPT and PruneMe, a plain script. Every
answer is checked before it is timed. Peers that are not installed are skipped by their names. One thread, processor
time (see timing.py). Machine, versions and results: README.md.
"""

import argparse
import multiprocessing.process
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise, repeat
from operator import attrgetter, or_
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.answers import decoder, every_span, hooked, kept, lens_table, similarity_check
from benchmarks.streams import Plain, hauser, resnet50
from benchmarks.timing import Side, Work, heading, ratios, row
from residuum.cutting import cut, cut_all
from residuum.nulls import calibrate_
from residuum.probes import drops, gradients, interventions, pairs, passive, perturbation, update_angle
from residuum.profiles import Measure

WATCH = passive(perturbation, update_angle)
SWEEP = interventions(drops)

Subject = Callable[[], tuple[nn.Module, Tensor, list[str]]]  # model, input, names of the modules that give its states


def network() -> tuple[nn.Module, Tensor, list[str]]:
    """torchvision's resnet50, 8 images of 128x128."""
    model, x = resnet50()
    return model, x, [name for name, module in model.named_modules() if type(module).__name__ == "Bottleneck"]


def watched(states: Sequence[Tensor]) -> Tensor:
    """Size of each update, size by size of the state, cosine to the update before, as scripts compute them."""
    sizes, scaled, cosines, previous = [], [], [], None
    for h, after in pairwise(states):
        if h.shape != after.shape:
            previous = None
            continue
        f = (after - h).flatten(1)
        sizes.append(f.norm(dim=1))
        scaled.append(sizes[-1] / h.flatten(1).norm(dim=1))
        if previous is not None:
            cosines.append(F.cosine_similarity(previous, f))
        previous = f
    return torch.stack(sizes + scaled + cosines, 1)


def values(measures: dict[str, Measure], *more: str) -> Tensor:
    return torch.cat([measures[k].values for k in ("perturbation", "scaled_perturbation", "update_angle", *more)], 1)


def checked(work: Work, answer: Tensor) -> Work:
    """The work, once its answer is found right."""
    torch.testing.assert_close(work(), answer, rtol=1e-4, atol=1e-5)
    return work


def forward(subject: Subject) -> Work:
    model, x, _ = subject()
    return lambda: model(x)


def hooks(subject: Subject) -> Work:
    model, x, names = subject()
    return lambda: watched(kept(model, x, names))


def our_stream(subject: Subject) -> Work:
    model, x, names = subject()
    stream = cut(model, x)
    return checked(lambda: values(WATCH(stream, None)), watched(kept(model, x, names)))


def our_profile(subject: Subject) -> Work:
    """What `profile` does for every batch after the first."""
    model, x, names = subject()
    streams = cut_all(model, repeat(x))
    return checked(lambda: values(WATCH(next(streams), None)), watched(kept(model, x, names)))


def by_nnsight(subject: Subject) -> Work:
    import nnsight

    model, x, names = subject()
    answer = watched(kept(model, x, names))
    wrapped = nnsight.NNsight(model)

    def work() -> Tensor:
        with wrapped.trace(x):
            states = [attrgetter(name)(wrapped).output for name in names]
            nnsight.save(states)
        return watched(states)

    return checked(work, answer)


def import_torchlens() -> ModuleType:
    """torchlens refuses children of multiprocessing; ours are spawned, one per side, and share no state with others."""
    multiprocessing.process._parent_process = None
    import torchlens

    return torchlens


def by_torchlens_record(subject: Subject) -> Work:
    torchlens = import_torchlens()

    model, x, names = subject()
    answer = watched(kept(model, x, names))
    save = reduce(or_, map(torchlens.module, names))
    return checked(lambda: watched([r.ram_payload for r in torchlens.record(model, x, save=save).records]), answer)


def by_torchlens_trace(subject: Subject) -> Work:
    """Every operation is kept; that the states are among them is not checked."""
    torchlens = import_torchlens()
    model, x, _ = subject()
    return lambda: torchlens.trace(model, x)


def by_transformer_lens(everything: bool) -> Work:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model, x, names = decoder()
    answer = watched(kept(model, x, names))
    bridge = build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=model.config)
    states = [*(f"blocks.{i}.hook_resid_pre" for i in range(6)), "blocks.5.hook_resid_post"]
    chosen = None if everything else states

    def work() -> Tensor:
        _, cache = bridge.run_with_cache(x, names_filter=chosen)
        return watched([cache[name] for name in states])

    return checked(work, answer)


def labels() -> Tensor:
    return torch.randint(1000, (8, 128), generator=torch.Generator().manual_seed(1))


def loss_of(output: object, y: Tensor) -> Tensor:
    """Sum over examples of the mean over tokens."""
    return F.cross_entropy(output.logits.flatten(0, 1), y.flatten()) * len(y)


def forward_backward() -> Work:
    model, x, _ = decoder()
    y = labels()

    def work() -> None:
        with torch.enable_grad():
            model.zero_grad()
            loss_of(model(x), y).backward()

    return work


def cosines(states: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    columns = [
        F.cosine_similarity((b - a).flatten(1), g.flatten(1))
        for (a, b), g in zip(pairwise(states), grads[:-1], strict=True)
    ]
    return torch.cat([watched(states), torch.stack(columns, 1)], 1).detach()


def retained(model: nn.Module, x: Tensor, y: Tensor, names: Sequence[str]) -> Tensor:
    """States that keep their gradients, parameters too: the loop that scripts have."""
    with torch.enable_grad():
        model.zero_grad()
        states: list[Tensor] = []
        with hooked(model, names, lambda module, args, output: (output.retain_grad(), states.append(output))[1]):
            output = model(x)
        loss_of(output, y).backward()
        return cosines(states, [h.grad for h in states])


def hooks_with_gradient() -> Work:
    model, x, names = decoder()
    y = labels()
    return lambda: retained(model, x, y, names)


def ours_with_gradient(whole_profile: bool) -> Work:
    model, x, names = decoder()
    y = labels()
    streams = cut_all(model, repeat(x))
    fixed, slope = next(streams), gradients()

    def work() -> Tensor:
        stream = next(streams) if whole_profile else fixed
        return values(WATCH(stream, y) | pairs(stream, y) | slope(stream, y), "gradient_cosine")

    return checked(work, retained(model, x, y, names))


def nnsight_with_gradient() -> Work:
    import nnsight

    model, x, names = decoder()
    y = labels()
    answer = retained(model, x, y, names)
    wrapped = nnsight.NNsight(model)

    def work() -> Tensor:
        with torch.enable_grad():
            model.zero_grad()
            with wrapped.trace(x):
                states = [attrgetter(name)(wrapped).output for name in names]
                nnsight.save(states)
                grads = []
                nnsight.save(grads)
                loss = loss_of(wrapped.output, y)
                with loss.backward():
                    for h in reversed(states):
                        grads.append(h.grad)
            return cosines(states, grads[::-1])

    return checked(work, answer)


def formulas() -> Work:
    model, x, names = decoder()
    return lambda: every_span(kept(model, x, names))


def our_pairs() -> Work:
    stream = cut(*decoder()[:2])
    return lambda: pairs(stream, None)


def calibrated(model: Plain) -> tuple[Plain, Tensor, Tensor]:
    x, y = torch.randn(32, 1, 28, 28), torch.randint(10, (32,))
    calibrate_(model.model, [(x, y)])
    return model, x, y


def script_sweep() -> Work:
    """A forward of the plain network for every block left out."""
    model, x, y = calibrated(Plain(16))
    blocks = [(s, i) for s, section in enumerate(model.sections) for i in range(len(section))]

    def without(place: tuple[int, int]) -> Tensor:
        h = model.model.stem(x)
        for s, section in enumerate(model.sections):
            h = model.model.transitions[s - 1](h) if s else h
            for i, block in enumerate(section):
                h = h if (s, i) == place else block(h)
        return F.cross_entropy(model.model.readout(h), y, reduction="none")

    return lambda: torch.stack([without(place) for place in blocks], 1)


def our_sweep() -> Work:
    torch.manual_seed(0)
    answer = script_sweep()()
    torch.manual_seed(0)
    model, x, y = calibrated(Plain(16))
    ours = hauser(16)
    ours.load_state_dict(model.model.state_dict())
    return checked(lambda: SWEEP(ours.cut(x), y)["drop_loss"].values, answer)


@dataclass(frozen=True)
class Entry:
    """One row of a table: its name, its side, the limit set to it, the package it needs."""

    name: str
    make: Callable[[], Work]
    limit: float | None = None
    needs: str = "torch"


def watching(subject: Subject) -> list[Entry]:
    return [
        Entry("ours, a stream", partial(our_stream, subject), 1.2),
        Entry("ours, a further batch of `profile`", partial(our_profile, subject)),
        Entry("forward hooks", partial(hooks, subject)),
        Entry("nnsight", partial(by_nnsight, subject), needs="nnsight"),
        Entry("torchlens, record of the states", partial(by_torchlens_record, subject), needs="torchlens"),
        Entry("torchlens, trace of everything", partial(by_torchlens_trace, subject), needs="torchlens"),
    ]


WITH_GRADIENT = [
    Entry("ours, a stream", partial(ours_with_gradient, False), 1.2),
    Entry("ours, a further batch of `profile`", partial(ours_with_gradient, True)),
    Entry("forward hooks, retain_grad", hooks_with_gradient),
    Entry("nnsight", nnsight_with_gradient, needs="nnsight"),
]
SPANS = [Entry("ours, `pairs`", our_pairs), Entry("the formulas, one after the other", formulas)]
IN_TRANSFORMER_LENS = [
    Entry("TransformerLens, all activations", partial(by_transformer_lens, True)),
    Entry("TransformerLens, the states", partial(by_transformer_lens, False)),
]


def report(title: str, entries: Sequence[Entry], base: Side, pairs: int) -> None:
    """One table; peers that are not installed are named."""
    there = [entry for entry in entries if find_spec(entry.needs)]
    for entry in entries:
        if entry not in there:
            print(f"skipped: {entry.name}: {entry.needs} is not installed")
    found, seconds = ratios([Side(entry.make) for entry in there], base, pairs=pairs)
    for entry, value in zip(there, found, strict=True):
        print(row(f"{title}: {entry.name}", value, seconds, entry.limit), flush=True)


def ask_transformer_lens(python: Path | None, pairs: int) -> None:
    """Run this script by the Python of another environment: tuned-lens does not work beside TransformerLens."""
    if python is None:
        print("skipped: TransformerLens: give the Python of an environment that has it by --transformer-lens")
        return
    root = Path(__file__).parents[1]
    paths = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}
    subprocess.run([python, "-m", "benchmarks.peers", "--pairs", str(pairs)], check=True, env=paths)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--transformer-lens", type=Path, help="Python of an environment with transformer-lens")
    args = parser.parse_args()
    text, images = Side(partial(forward, decoder)), Side(partial(forward, network))
    if find_spec("transformer_lens"):
        report("watching GPT-2", IN_TRANSFORMER_LENS, text, args.pairs)
        return
    names = ("transformers", "nnsight", "torchlens", "tuned-lens")
    print(", ".join(f"{name} {version(name) if find_spec(name.replace('-', '_')) else 'absent'}" for name in names))
    with torch.no_grad():
        print(lens_table(), similarity_check(), sep="\n\n", end="\n\n")
    print(heading(args.pairs))
    report("watching GPT-2 / forward", watching(decoder), text, args.pairs)
    report("watching resnet50 / forward", watching(network), images, args.pairs)
    report("with gradients, GPT-2 / forward and backward", WITH_GRADIENT, Side(forward_backward), args.pairs)
    report("every span, GPT-2 / forward", SPANS, text, args.pairs)
    few = min(3, args.pairs)
    report("drop sweep / NCHW script", [Entry("ours", our_sweep, 0.48)], Side(script_sweep, keep=False), few)
    report("drop sweep / NCHW script, freed memory kept", [Entry("ours", our_sweep)], Side(script_sweep), few)
    ask_transformer_lens(args.transformer_lens, args.pairs)


if __name__ == "__main__":
    main()
