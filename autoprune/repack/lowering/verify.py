"""Whether a lowered program may run: nothing is read before it is written, and no two values in use share memory."""

from __future__ import annotations

from collections.abc import Iterator

from autoprune.repack.lowering.buffers import Buffer
from autoprune.repack.lowering.layout import FLOAT_BYTES
from autoprune.repack.lowering.steps import ARENA, Lowered, NativeStep, TorchStep


def verify(lowered: Lowered) -> Lowered:
    """Returns it.

    Raises AssertionError where a step reads what no step before it wrote and no call brings, where two buffers that
    are in use at the same time overlap, where one lies outside the arena, or where something is written over borders
    that are filled once.
    """
    written: set[int] = set()  # ids of buffers in the arena
    filled = {0, *lowered.inputs, *lowered.constants}  # slots
    for step in lowered.steps:
        for buffer in step.sources:
            fine = buffer.scratch or (id(buffer) in written if buffer.slot == ARENA else buffer.slot in filled)
            assert fine, f"{_name(step)} reads slot {buffer.slot}, byte {buffer.offset} before anything writes there"
        if not isinstance(step, NativeStep):
            filled.add(step.slot)
        elif step.writes.slot == ARENA:
            written.add(id(step.writes))
        else:
            filled.add(step.writes.slot)
    for name, view in lowered.returned.items():
        there = id(view.buffer) in written if view.buffer.slot == ARENA else view.buffer.slot in filled
        assert there, f"the result {name} is never written"
    buffers = list(_in_arena(lowered))
    _check_overlaps(buffers, lowered.arena.size)
    _check_borders(buffers, lowered.arena.borders)
    return lowered


def _in_arena(lowered: Lowered) -> Iterator[Buffer]:
    """Each buffer of the arena that a step uses, once."""
    seen: set[int] = set()
    for step in lowered.steps:
        for buffer in step.touched:
            if buffer.slot == ARENA and id(buffer) not in seen:
                seen.add(id(buffer))
                yield buffer


def _check_overlaps(buffers: list[Buffer], size: int) -> None:
    for at, one in enumerate(buffers):
        begin, end = one.offset // FLOAT_BYTES, one.offset // FLOAT_BYTES + one.size
        assert 0 <= begin <= end <= size, f"a buffer of {one.size} floats at {begin} lies outside an arena of {size}"
        for other in buffers[:at]:
            apart = end <= other.offset // FLOAT_BYTES or other.offset // FLOAT_BYTES + other.size <= begin
            together = one.first <= other.last and other.first <= one.last
            assert apart or not together or _written_over(one, other) or _written_over(other, one), (
                f"buffers at {begin} and {other.offset // FLOAT_BYTES} overlap, in use in steps "
                f"{one.first} to {one.last} and {other.first} to {other.last}"
            )


def _check_borders(buffers: list[Buffer], borders: tuple[tuple[int, int, float], ...]) -> None:
    for start, size, value in borders:
        for each in buffers:
            begin = each.offset // FLOAT_BYTES
            apart = begin + each.size <= start or start + size <= begin
            same = each.layout is not None and each.layout.border == value
            assert apart or same, f"a buffer at {begin} lies over the borders at {start}, which are filled once"


def _written_over(one: Buffer, other: Buffer) -> bool:
    """Whether `one` takes the place of `other` position by position, in the step that reads it for the last time."""
    return other in one.over and other.last == one.first and one.offset == other.offset and one.layout == other.layout


def _name(step: NativeStep | TorchStep) -> str:
    return repr(step.name if isinstance(step, NativeStep) else step.op.output)
