"""Streams: runs, walks, continuations, and many schedules with each prefix evaluated once."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from residuum.models import ResNet, ResNetConfig
from residuum.schedules import drop, prefix, repeat, tree_size, unroll
from residuum.streams import Block, Section, Stream, run_all


def toy(lengths: tuple[int, ...] = (3, 2), *, count: Counter[str] | None = None) -> Stream:
    """h -> h + sin(k h) for block k of all, entries that double, readout that sums."""

    def block(k: int) -> Block:
        def branch(h: Tensor) -> Tensor:
            if count is not None:
                count[f"block {k}"] += 1
            return torch.sin((k + 1) * h)

        return Block(f"block {k}", lambda h: h + branch(h), branch)

    sections, k = [], 0
    for s, n in enumerate(lengths):
        sections.append(Section(f"section {s}", lambda h: 2 * h, tuple(block(k + i) for i in range(n))))
        k += n
    return Stream(torch.randn(4, 6, dtype=torch.float64), tuple(sections), lambda h: h.sum(1))


def by_hand(stream: Stream, schedule: tuple[tuple[int, ...], ...]) -> Tensor:
    h, first = stream.input, 0
    for row, n in zip(schedule, stream.lengths, strict=True):
        h = 2 * h
        for block in row:
            h = h + torch.sin((first + block + 1) * h)
        first += n
    return h.sum(1)


def test_run_does_what_the_schedule_says() -> None:
    stream = toy()
    for schedule in (stream.full, ((2, 0, 0), ()), ((), (1, 0)), drop(stream.full, 0, 1), unroll(stream.full, 1, 5)):
        trace = stream.run(schedule)
        assert torch.allclose(trace.output, by_hand(stream, schedule), rtol=1e-12)
        assert [len(states) - 1 for states in trace.states] == [len(row) for row in schedule]


def test_scales_multiply_updates() -> None:
    stream = toy((2,))
    h = 2 * stream.input
    h = h + 0.5 * torch.sin(h)
    h = h - 3 * torch.sin(2 * h)
    assert torch.allclose(stream.run(scales=((0.5, -3.0),)).output, h.sum(1))
    assert torch.equal(stream.run(scales=((1.0, 1.0),)).output, stream.run().output)
    assert torch.equal(stream.run(scales=((0.0, 0.0),)).output, stream.run(((),)).output)


def test_an_update_is_after_minus_before_where_the_branch_is_unknown() -> None:
    block = Block("squares", lambda h: h**2)
    h = torch.tensor([[2.0, 3.0]])
    after, update = block.step(h)
    assert torch.equal(after, torch.tensor([[4.0, 9.0]]))
    assert torch.equal(update, torch.tensor([[2.0, 6.0]]))
    assert torch.equal(block(h, 0.5), torch.tensor([[3.0, 6.0]]))


def test_walk_says_whose_update_it_is_and_runs_every_block_once() -> None:
    count: Counter[str] = Counter()
    stream = toy(count=count)
    steps = list(stream.walk())
    assert [(step.section, step.index) for step in steps] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert all(step.own_branch for step in steps)
    assert set(count.values()) == {1}
    unknown = Stream(stream.input, (Section("s", lambda h: h, (Block("b", torch.tanh),)),), lambda h: h)
    assert [step.own_branch for step in unknown.walk()] == [False]


def test_walk_keeps_at_most_three_states_alive() -> None:
    import gc
    import weakref

    stream, alive = toy((12,)), []
    for step in stream.walk():
        alive += [weakref.ref(step.after), weakref.ref(step.before), weakref.ref(step.update)]
        gc.collect()
        assert len({id(t()) for t in alive if t() is not None}) <= 4  # the entry's result of the toy is one more


def test_finish_and_exit() -> None:
    stream = toy()
    trace = stream.run()
    for s, states in enumerate(trace.states):
        for i, state in enumerate(states):
            assert torch.equal(stream.finish(state, (s, i - 1)), trace.output)
            early = stream.run(prefix(stream.full, s, i)).output
            assert torch.equal(stream.exit(state, s), early)


def test_run_all_equals_single_runs_and_counts_the_prefix_tree() -> None:
    count: Counter[str] = Counter()
    stream = toy((4, 3), count=count)
    schedules = [stream.full, ((), ()), repeat(stream.full, 0, 2, times=3), stream.full]
    schedules += [drop(stream.full, s, i) for s, n in enumerate(stream.lengths) for i in range(n)]
    results = dict(run_all(stream, schedules))
    assert sum(count.values()) == tree_size(schedules)
    assert set(results) == set(schedules)
    for schedule, trace in results.items():
        single = stream.run(schedule)
        assert torch.equal(trace.output, single.output)
        for ours, theirs in zip(trace.states, single.states, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("blocks", [1, 2, 7, 48])
def test_dropping_each_block_costs_n_times_n_plus_1_over_2(blocks: int) -> None:
    count: Counter[str] = Counter()
    stream = toy((blocks,), count=count)
    schedules = [stream.full, *(drop(stream.full, 0, i) for i in range(blocks))]
    assert len(list(run_all(stream, schedules))) == blocks + 1
    assert sum(count.values()) == blocks * (blocks + 1) // 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.run(((0, 3), (0,))), r'names block 3 of section "section 0", which has blocks 0..2'),
        (lambda s: s.run(((0,),)), "schedule has 1 sections, the stream has 2"),
        (lambda s: s.run(s.full, ((1.0,), (1.0,))), r"one factor per applied block.*\(3, 2\).*\(1, 1\)"),
        (lambda s: s.finish(s.input, (2, 0)), "no block 0 in section 2"),
        (lambda s: s.finish(s.input, (0, 3)), "no block 3 in section 0"),
        (lambda s: s.exit(s.input, 2), r"no section 2; there are sections 0\.\.1"),
        (lambda s: s.exit(s.input, -1), "no section -1"),
        (lambda s: list(run_all(s, [((9,), ())])), "names block 9"),
    ],
)
def test_says_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(toy())


@pytest.mark.parametrize("transition", ["separate", "projection"])
@pytest.mark.parametrize("head", ["norm", "pool"])
def test_own_network_is_its_stream(transition, head) -> None:
    config = ResNetConfig(blocks=(3, 2, 2), widths=(4, 6, 8), channels=1, classes=5, transition=transition, head=head)
    model = ResNet(config, seed=1).double()
    x = torch.randn(3, 1, 12, 12, dtype=torch.float64)
    model.train()
    model(x)
    model.eval()
    assert torch.equal(model.cut(x).run().output, model(x))
    assert model(x).shape == (3, 5)
    for step in model.cut(x).walk():
        assert step.own_branch
        assert torch.allclose(step.after, step.before + step.update)


def test_own_networks_weights_follow_their_seed_and_leave_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    a, b, c = (ResNet(ResNetConfig(), seed=s) for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.stem.weight, c.stem.weight)


def test_own_network_is_initialised_as_he() -> None:
    model = ResNet(ResNetConfig(blocks=(2,), widths=(64,)))
    weight = model.sections[0][0].conv1.weight
    assert float(weight.detach().var()) == pytest.approx(2 / (9 * 64), rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": (2, 2)}, "one number per section"),
        ({"blocks": (2, 0, 2)}, "every section needs at least 1 block"),
        ({"blocks": (), "widths": ()}, "at least one section"),
        ({"classes": 0}, "at least 1"),
        ({"transition": "jump"}, r"transition is 'jump'; allowed are \('separate', 'projection', 'pool'\)"),
        ({"head": "mlp"}, "head is 'mlp'"),
    ],
)
def test_config_says_what_is_wrong(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNetConfig(**options)
