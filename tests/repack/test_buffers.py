"""Where a call's values lie in its arena."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.repack import ProgramModel, repack
from autoprune.repack.lowering.buffers import Buffer, place
from autoprune.repack.lowering.layout import ALIGN, FLOAT_BYTES, MapLayout, aligned
from autoprune.repack.lowering.lower import lower
from autoprune.repack.lowering.steps import ARENA, Lowered, NativeStep

SPANS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4), st.integers(1, 200)), min_size=1, max_size=12)


def used(first: int, last: int, size: int, layout: MapLayout | None = None) -> Buffer:
    buffer = Buffer(size, layout)
    buffer.used(first)
    buffer.used(last)
    return buffer


def kib(buffers: list[Buffer]) -> int:
    return place(buffers, ARENA).size * FLOAT_BYTES // 1024


@given(SPANS)
def test_buffers_in_use_at_once_lie_apart(spans: list[tuple[int, int, int]]) -> None:
    buffers = [used(first, first + more, size) for first, more, size in spans]
    arena = place(buffers, ARENA)
    lie = [(each.offset // FLOAT_BYTES, each.offset // FLOAT_BYTES + each.size) for each in buffers]
    assert all(begin % ALIGN == 0 and end <= arena.size for begin, end in lie)
    for number, one in enumerate(buffers):
        for other in range(number):
            together = one.first <= buffers[other].last and buffers[other].first <= one.last
            assert not together or lie[number][1] <= lie[other][0] or lie[other][1] <= lie[number][0]


def test_a_small_buffer_lies_inside_the_place_of_a_large_one() -> None:
    assert kib([used(0, 1, 1024), used(1, 2, 8192), used(2, 3, 4096), used(3, 4, 4096), used(4, 5, 8192)]) == 48


def test_what_is_placed_first_does_not_cost_memory() -> None:
    """The sizes of a residual network of 16, 32 and 64 channels: two maps and some scratch are in use at once."""
    spans = [(0, 1, 1504), (1, 4, 18064), (2, 3, 18064), (3, 3, 3200), (4, 6, 17968), (5, 7, 9040), (6, 8, 8976)]
    spans += [(8, 10, 11056), (9, 9, 6400), (9, 11, 5424), (10, 11, 752), (11, 12, 752)]
    assert place([used(*span) for span in spans], ARENA).size == 2 * 18064 + 3200


def test_nothing_lies_over_borders_that_are_filled_once() -> None:
    layout = MapLayout(1, 8, 8, 9, 1, 1, border=float("-inf"))
    framed = [used(step, step, layout.size(1), layout) for step in (0, 4)]
    others = [used(step, step + 1, 1000) for step in range(1, 5)]
    arena = place([*framed, *others], ARENA)
    assert framed[0].offset == framed[1].offset
    ((start, size, _),) = arena.borders
    for other in others:
        begin = other.offset // FLOAT_BYTES
        assert begin + other.size <= start or start + size <= begin


def test_scratch_of_no_size_takes_no_room() -> None:
    scratch = Buffer(0, scratch=True)
    scratch.used(1)
    assert place([scratch, used(0, 2, 64)], ARENA).size == aligned(64)
    assert (scratch.slot, scratch.offset) == (ARENA, 0)


class Elements(nn.Module):
    """Elements of which each may be written over one before it that is not read again."""

    def forward(self, x: Tensor) -> Tensor:
        kept = x * 2.0
        y = torch.tanh(torch.relu(kept + x) + 0.5)
        return (y + kept) * y.transpose(0, 1)


class Maps(nn.Module):
    """A sum of maps of which the first is not read again, the second is."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.last = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.one(x))
        z = torch.tanh(self.other(y) + y)
        result: Tensor = self.last(torch.relu(y + z)) + z
        return result


def lowered(model: nn.Module, x: Tensor) -> Lowered:
    fast = repack(model.eval(), x, form="program", threads=1)
    assert isinstance(fast, ProgramModel)
    torch.testing.assert_close(fast(x), model(x))
    return lower(fast.program.graph, fast.program.weights, (tuple(x.shape),), fast.program.target, 1)


def overwriting(found: Lowered) -> list[str]:
    """The values that lie where one of their operands lay."""
    native = [step for step in found.steps if isinstance(step, NativeStep) and step.writes.slot == ARENA]
    return [step.name for step in native if step.writes.offset in {over.offset for over in step.writes.over}]


def test_elements_are_written_over_operands_that_are_read_for_the_last_time() -> None:
    found = lowered(Elements(), torch.randn(64, 64))
    assert found.arena.size == 2 * 64 * 64
    assert overwriting(found) == ["add_1", "tanh", "add_2"]


def test_a_transposed_operand_is_not_written_over() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(x)
            return torch.relu(y + y.transpose(0, 1)) + 1.0

    found = lowered(Twice(), torch.randn(48, 48))
    assert overwriting(found) == []
    assert found.arena.size == 2 * 48 * 48


def test_a_sum_of_maps_is_written_over_the_one_that_ends() -> None:
    found = lowered(Maps(), torch.randn(1, 8, 12, 12))
    assert overwriting(found) == ["relu_1"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_sequence_of_an_empty_batch_needs_no_room(kind: type[nn.LSTM] | type[nn.GRU]) -> None:
    torch.manual_seed(0)
    model = kind(6, 8, batch_first=True).eval()
    fast = repack(model, torch.randn(2, 5, 6), form="program")
    with torch.no_grad():
        assert fast(torch.zeros(0, 5, 6))[0].shape == (0, 5, 8)
