"""Answers of peers beside ours: logit lens and deletion of blocks (tuned-lens), similarity of states (formulas).

The logits are also checked by hand, with hooks: a block that gives what it gets is deleted, and a state is read out by
deleting all blocks after it. `benchmarks.peers` prints these tables.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from weakref import WeakSet

import torch
from torch import Tensor, nn

from residuum.cutting import cut, cut_all
from residuum.probes import pairs
from residuum.schedules import drop
from residuum.vision import import_torchvision

STATES = ["transformer.drop", *(f"transformer.h.{i}" for i in range(6))]  # modules of the decoder that give its states
Answers = tuple[Sequence[Tensor], Sequence[Tensor]]  # logits at every state, logits without every block


def hf(kind: str, **sizes: object) -> nn.Module:
    """A random transformers model, as the class and its configuration come."""
    warnings.filterwarnings("ignore", message="torchvision has no compiled operators")
    if find_spec("torchvision"):
        import_torchvision()
    import transformers

    config = getattr(transformers, f"{kind.removesuffix('LMHeadModel').removesuffix('ForCausalLM')}Config")
    return getattr(transformers, kind)(config(**sizes, use_cache=False, bos_token_id=0, eos_token_id=1)).eval()


def decoder() -> tuple[nn.Module, Tensor, list[str]]:
    """GPT-2 with 6 blocks of width 256, 8 texts of 128 tokens."""
    model = hf("GPT2LMHeadModel", n_layer=6, n_embd=256, n_head=8, n_positions=128, vocab_size=1000)
    return model, torch.randint(1000, (8, 128)), STATES


@contextmanager
def hooked(model: nn.Module, names: Iterable[str], hook: Callable) -> Iterator[None]:
    """Forward hooks while in the context."""
    handles = [model.get_submodule(name).register_forward_hook(hook) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def kept(model: nn.Module, x: Tensor, names: Sequence[str]) -> list[Tensor]:
    """The outputs of modules."""
    states: list[Tensor] = []
    with hooked(model, names, lambda module, args, output: states.append(output)):
        model(x)
    return states


def block_influence(a: Tensor, b: Tensor) -> Tensor:
    """ShortGPT: one minus the cosine, mean over tokens."""
    return 1 - ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean(1)


def angular_distance(a: Tensor, b: Tensor) -> Tensor:
    """PruneMe: angle at the last token, by pi."""
    a, b = (h[:, -1] / h[:, -1].norm(dim=-1, keepdim=True) for h in (a, b))
    return (a * b).sum(-1).clamp(-1, 1).arccos() / torch.pi


def every_span(states: Sequence[Tensor]) -> Tensor:
    """Both for every start and length, block influences first."""
    spans = [(t, u) for t in range(len(states)) for u in range(t + 1, len(states))]
    return torch.stack([f(states[t], states[u]) for f in (block_influence, angular_distance) for t, u in spans], 1)


def similarity_check() -> str:
    """Formulas against the `pairs` probe, and the states alive at once over four batches."""
    torch.manual_seed(0)
    model, x, names = decoder()
    states = kept(model, x, names)
    found = pairs(cut(model, x), None)
    ours = torch.cat([found["block_influence"].values, found["angular_distance"].values], 1)
    exact, single = every_span([h.double() for h in states]), every_span(states)
    published = every_span([*states[:-1], model(x, output_hidden_states=True).hidden_states[-1]])
    error, rounding = ((a - exact).abs().max().item() for a in (ours, single))
    assert error < 1e-6, error
    return (
        f"block influence and angular distance of all {ours.shape[1] // 2} spans of {len(states) - 1} blocks, "
        f"max |difference| from the formulas in float64:\nours {error:.1e}; the formulas in float32 {rounding:.1e}, "
        f"with transformers' last hidden state, which is behind the final norm, {(published - exact).abs().max():.1e}\n"
        f"states alive at once, four batches: formulas {most_alive(model, x, keep=True)}, ours {most_alive(model, x)}"
    )


def most_alive(model: nn.Module, x: Tensor, *, keep: bool = False) -> int:
    """Most states of the decoder alive at once while four batches are measured; kept for the formulas, or our probe."""
    alive, most, everything = WeakSet(), 0, []

    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        nonlocal most
        alive.add(output)
        most = max(most, len(alive))

    with hooked(model, STATES, hook):
        if keep:
            for _ in range(4):
                everything += kept(model, x, STATES)
        else:
            for stream in cut_all(model, [x] * 4):
                pairs(stream, None)
    return most


def lenses() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Small random models, and their inputs."""
    text, tokens = {"vocab_size": 99, "num_hidden_layers": 4, "num_attention_heads": 4}, torch.randint(99, (2, 16))
    wide = {**text, "hidden_size": 64, "intermediate_size": 128}
    yield "GPT-2", hf("GPT2LMHeadModel", vocab_size=99, n_embd=64, n_layer=4, n_head=4), tokens
    yield "Llama", hf("LlamaForCausalLM", **wide, num_key_value_heads=2), tokens
    yield "NeoX", hf("GPTNeoXForCausalLM", **wide), tokens
    yield "Qwen3", hf("Qwen3ForCausalLM", **wide, num_key_value_heads=2, head_dim=16), tokens
    from torchvision.models import VisionTransformer, resnet50

    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 4, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}
    vit = VisionTransformer(**sizes).eval()
    nn.init.normal_(vit.heads.head.weight, std=0.02)  # torchvision begins with a head of zeros, which hides everything
    yield "ViT", vit, torch.randn(2, 3, 32, 32)
    yield "ResNet", resnet50(num_classes=10).eval(), torch.randn(2, 3, 64, 64)


def without(model: nn.Module, x: Tensor, names: Iterable[str]) -> Tensor:
    """The output with the named blocks made to give what they get: deletion, and the logit lens, by hand."""
    with hooked(model, names, lambda module, args, output: args[0]):
        output = model(x)
    return output if isinstance(output, Tensor) else output.logits


def apart(ours: Answers, theirs: Answers) -> str:
    """Largest differences, of the lens and of the deletions."""
    both = [zip(a, b, strict=True) for a, b in zip(ours, theirs, strict=True)]
    return " | ".join(f"{max((a - b).abs().max().item() for a, b in outputs):.1e}" for outputs in both)


def tuned_lens(model: nn.Module, x: Tensor, states: Sequence[Tensor], ours: Answers) -> str:
    """How far tuned-lens is from us, or what it raises."""
    if not find_spec("tuned_lens"):
        return "not installed | not installed"
    from tuned_lens.model_surgery import delete_layers
    from tuned_lens.nn.lenses import LogitLens

    try:
        lens = LogitLens.from_model(model)
        logits = [lens(h, i) for i, h in enumerate(states)]
        deleted = []
        for i in range(len(states) - 1):
            with delete_layers(model, [i]):
                deleted.append(model(x).logits)
    except Exception as error:
        return f"{type(error).__name__} | {type(error).__name__}"
    return apart(ours, (logits, deleted))


def lens_table() -> str:
    """Our logits at every state and without every block, against hooks by hand and tuned-lens."""
    lines = [
        "| max abs difference of logits | ours / by hand: lens | deletion | ours / tuned-lens: lens | deletion |",
        "| --- | --- | --- | --- | --- |",
    ]
    torch.manual_seed(0)
    for name, model, x in lenses():
        stream = cut(model, x)
        places = [(s, i) for s, n in enumerate(stream.lengths) for i in range(n)]
        names = [block.name for section in stream.sections for block in section.blocks]
        trace = stream.run()
        # The last state of a section and the first of the next one have the same answer.
        states = [(s, h) for s, row in enumerate(trace.states) for h in (row[1:] if s else row)]
        ours = (
            [stream.exit(h, s) for s, h in states],
            [stream.run(drop(stream.full, s, i), keep=False).output for s, i in places],
        )
        by_hand = (
            [without(model, x, names[k:]) for k in range(len(names) + 1)],
            [without(model, x, [name]) for name in names],
        )
        assert all(not torch.equal(output, trace.output) for output in (ours[0][0], *ours[1])), name
        theirs = tuned_lens(model, x, [h for _, h in states], ours)
        lines.append(f"| {name} | {apart(ours, by_hand)} | {theirs} |")
    return "\n".join(lines)
