"""Laws that hold for every network and schedule, by property-based tests on random small networks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from residuum.cutting import cut
from residuum.models import ResNet, ResNetConfig
from residuum.schedules import prefix, repeat, shuffle, tree_size
from residuum.streams import run_all

depths = st.lists(st.integers(1, 3), min_size=1, max_size=3)
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=15, deadline=None)


def own(blocks: list[int], seed: int) -> tuple[ResNet, Tensor]:
    config = ResNetConfig(blocks=tuple(blocks), widths=(2, 3, 4)[: len(blocks)], channels=1, classes=3)
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return ResNet(config, seed=seed).double().eval(), images


class Cell(nn.Module):
    def __init__(self, width: int, width_out: int) -> None:
        super().__init__()
        self.inner, self.widen = nn.Linear(width, width), nn.Linear(width, width_out)
        self.keeps = width == width_out

    def forward(self, h: Tensor) -> Tensor:
        h = h + torch.tanh(self.inner(h))
        return h if self.keeps else self.widen(h)


class Stranger(nn.Module):
    """A user's class never seen before: sections of cells, every first one of a later section widens the state."""

    def __init__(self, blocks: list[int]) -> None:
        super().__init__()
        widths = [4 + s for s, n in enumerate(blocks) for _ in range(n + 1)]
        pairs = zip(widths, [*widths[1:], widths[-1]], strict=True)
        self.cells = nn.ModuleList(Cell(a, b) for a, b in pairs)
        self.head = nn.Linear(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        for cell in self.cells:
            x = cell(x)
        return self.head(x)


@few
@given(depths, seeds)
def test_the_full_schedule_is_the_model(blocks: list[int], seed: int) -> None:
    model, x = own(blocks, seed)
    assert torch.equal(model.cut(x).run().output, model(x))


@few
@given(depths.filter(lambda blocks: sum(blocks) > 1), seeds)
def test_the_full_schedule_is_the_model_for_classes_never_seen(blocks: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Stranger(blocks).double().eval(), torch.randn(3, 4, dtype=torch.float64)
    stream = cut(model, x)
    assert sum(stream.lengths) == sum(blocks) + 1  # the last cell keeps the shape too
    assert torch.allclose(stream.run().output, model(x), rtol=1e-12, atol=1e-12)


@few
@given(depths, seeds, st.data())
def test_a_prefix_has_the_same_first_states(blocks: list[int], seed: int, data: st.DataObject) -> None:
    model, x = own(blocks, seed)
    stream = model.cut(x)
    section = data.draw(st.integers(0, len(blocks) - 1))
    length = data.draw(st.integers(0, blocks[section]))
    whole, part = stream.run(), stream.run(prefix(stream.full, section, length))
    for s, states in enumerate(part.states[: section + 1]):
        assert all(torch.equal(a, b) for a, b in zip(states, whole.states[s], strict=False))
    assert [len(states) for states in part.states] == [
        *(n + 1 for n in blocks[:section]),
        length + 1,
        *(1 for _ in blocks[section + 1 :]),
    ]


@few
@given(depths, seeds, st.randoms(use_true_random=False))
def test_shuffles_compose_with_their_inverse(blocks: list[int], seed: int, random) -> None:
    model, x = own(blocks, seed)
    stream = model.cut(x)
    order = list(range(blocks[0]))
    random.shuffle(order)
    inverse = [order.index(i) for i in range(len(order))]
    there_and_back = shuffle(shuffle(stream.full, 0, order), 0, inverse)
    assert torch.equal(stream.run(there_and_back).output, stream.run().output)


@few
@given(depths, seeds, st.floats(-2, 2))
def test_a_scale_on_one_block_is_linear_in_its_update(blocks: list[int], seed: int, scale: float) -> None:
    model, x = own(blocks, seed)
    stream = model.cut(x)
    plain = stream.run().states[0]
    scales = tuple(tuple(scale if (s, i) == (0, 0) else 1.0 for i in range(n)) for s, n in enumerate(blocks))
    scaled = stream.run(scales=scales).states[0]
    assert torch.allclose(scaled[1] - scaled[0], scale * (plain[1] - plain[0]), atol=1e-12)


@few
@given(depths, seeds, st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=4))
def test_many_schedules_are_single_runs(blocks: list[int], seed: int, repeats: list[tuple[int, int]]) -> None:
    model, x = own(blocks, seed)
    stream = model.cut(x)
    schedules = [stream.full]
    for position, times in repeats:
        schedules.append(repeat(stream.full, 0, position % blocks[0], times=times))
    results = dict(run_all(stream, schedules))
    assert tree_size(results) <= sum(sum(map(len, schedule)) for schedule in results)
    for schedule, trace in results.items():
        assert torch.equal(trace.output, stream.run(schedule).output)
