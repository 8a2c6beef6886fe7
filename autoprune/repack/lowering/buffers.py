"""Which buffers share memory: a call's values lie in one arena; a value's place is used again after its last use.

A feature map whose border is not zero only takes the place of one whose borders lie at the same addresses: they are
filled once, when the arena is made, and nothing ever writes to them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoprune.repack.lowering.layout import ALIGN, FLOAT_BYTES, MapLayout, aligned

ORDERS = 12  # in which places are looked for, from each of two on
FOREVER = 1 << 60  # later than any step, and larger than any arena


@dataclass(eq=False)
class Buffer:
    """A stretch of memory in one of a call's slots.

    Attributes:
        size: floats.
        layout: of a feature map; None for plain rows.
        slot: index into the call's base addresses.
        offset: bytes.
        first, last: the steps between which it is in use.
        scratch: whether nothing that it holds before a step is read by it.
        over: those that it may be written over, position by position, in the step that reads them for the last time.
    """

    size: int
    layout: MapLayout | None = None
    slot: int = -1
    offset: int = 0
    first: int = -1
    last: int = -1
    over: tuple[Buffer, ...] = ()
    scratch: bool = False

    def __str__(self) -> str:
        where = "unplaced" if self.slot < 0 else f"slot {self.slot}"
        return f"{where} at {self.offset}, {self.size} floats, steps {self.first} to {self.last}"

    def used(self, step: int) -> None:
        self.first = step if self.first < 0 else self.first
        self.last = max(self.last, step)

    def ref(self, *strides: int) -> StridedRef:
        """A value that begins where it does; once its place is known."""
        return StridedRef(self.slot, self.offset, strides)


@dataclass(frozen=True, eq=False)
class StridedRef:
    """Where a value lies, as an op's fields tell a kernel.

    Attributes:
        slot: index into the call's base addresses.
        offset_bytes: from the slot's base to the first entry; or with slot 0 an array that is read in its place.
        strides: entries from one to the next along each axis; those of the last axes may be left out where an op's
            kernel takes them as given.
        dtype: of an entry.
    """

    slot: int
    offset_bytes: int | NDArray[np.float32]
    strides: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class MapAt:
    """A feature map in its buffer."""

    buffer: Buffer
    layout: MapLayout

    @property
    def offset(self) -> int:
        """Bytes from the slot's base to position (0, 0) of the first channel."""
        return self.buffer.offset + self.layout.origin * FLOAT_BYTES

    def ref(self, channel: int = 0) -> StridedRef:
        """The map as (N, C, H, W), its channels from `channel` on."""
        layout = self.layout
        offset = self.offset + layout.channel(channel) * FLOAT_BYTES
        return StridedRef(self.buffer.slot, offset, (layout.image, layout.channel(1), layout.pitch, 1))


@dataclass
class _Block:
    """A place in the arena, of buffers that follow each other there.

    Attributes:
        size: floats.
        first, last: the steps between which nothing else may lie there.
    """

    users: list[Buffer]
    size: int
    first: int
    last: int


def _key(layout: MapLayout | None) -> Hashable:
    """Buffers of one key may follow each other in one place; those of None hold nothing that must stay."""
    if layout is None or layout.border == 0:
        return None  # what writes a map clears its border
    return (layout.height, layout.width, layout.pitch, layout.pad_h, layout.pad_w, layout.border)


@dataclass(frozen=True)
class Arena:
    """The memory plan of a call.

    Attributes:
        size: floats.
        borders: buffers' places to be filled with a border value other than zero.
    """

    size: int
    borders: tuple[tuple[int, int, float], ...]

    def allocate(self) -> Tensor:
        """Zeroed memory, its borders filled; aligned to a cache line."""
        memory = torch.zeros(self.size + ALIGN, dtype=torch.float32, device="cpu")
        shift = -(memory.data_ptr() // FLOAT_BYTES) % ALIGN
        memory = memory[shift : shift + self.size]
        for start, size, value in self.borders:
            memory[start : start + size] = value
        return memory


def place(buffers: list[Buffer], slot: int) -> Arena:
    """Gives every buffer its offset in the arena in `slot`: as little memory as is found in some orders of placing."""
    used = [each for each in buffers if each.first >= 0 and (each.size or not each.scratch)]
    ordered, starts, size = _smallest(_blocks(sorted(used, key=lambda each: each.first)))
    for empty in (each for each in buffers if each.scratch and not each.size):
        empty.slot, empty.offset = slot, 0  # a batch of nothing needs room for nothing
    borders = []
    for block, start in zip(ordered, starts, strict=True):
        for buffer in block.users:
            buffer.slot, buffer.offset = slot, start * FLOAT_BYTES
        layout = block.users[0].layout
        if layout is not None and layout.border != 0:
            borders.append((start, block.size, layout.border))
    return Arena(max(size, ALIGN), tuple(borders))


def _blocks(buffers: list[Buffer]) -> list[_Block]:
    """Buffers, in the order they come into use, that take each other's place.

    One that is written over another lies where that one does. Those whose border is filled keep it for all steps: only
    one of the same key may follow there.
    """
    block_of, kept, blocks = dict[Buffer, _Block](), dict[Hashable, list[_Block]](), list[_Block]()
    for buffer in buffers:
        key = _key(buffer.layout)
        ending = [each for each in buffer.over if each.last == buffer.first and each.layout == buffer.layout]
        block = next((block_of[each] for each in ending if each in block_of), None)
        if block is None and key is not None:
            free = [each for each in kept.get(key, []) if each.users[-1].last < buffer.first]
            block = min(free, key=lambda each: max(0, buffer.size - each.size), default=None)
        if block is None:
            block = _Block([], 0, buffer.first, buffer.last)
            blocks.append(block)
            if key is not None:
                block.first, block.last = 0, FOREVER
                kept.setdefault(key, []).append(block)
        block.users.append(buffer)
        block.size, block.last = max(block.size, aligned(buffer.size)), max(block.last, buffer.last)
        block_of[buffer] = block
    return blocks


def _smallest(blocks: list[_Block]) -> tuple[list[_Block], list[int], int]:
    """Blocks and where they begin, and how large all are: by size, by time, then what lies highest is placed first."""
    steps = {step for each in blocks for step in (each.first, each.last)}
    least = max((sum(each.size for each in blocks if each.first <= step <= each.last) for step in steps), default=0)
    best = None
    for order in (sorted(blocks, key=lambda each: -each.size), blocks):
        for _ in range(ORDERS):
            starts, size = _starts(order)
            if best is None or size < best[2]:
                best = order, starts, size
            if best[2] == least:
                return best
            highest = max(range(len(order)), key=lambda number: starts[number] + order[number].size)
            order = [order[highest], *order[:highest], *order[highest + 1 :]]
    assert best is not None
    return best


def _starts(blocks: list[_Block]) -> tuple[list[int], int]:
    """Where each block begins, one after the other in the smallest gap that holds it, and how large all are, floats."""
    spans = np.array([(each.first, each.last) for each in blocks], np.int64).reshape(-1, 2)
    starts, ends = np.zeros(len(blocks), np.int64), np.zeros(len(blocks), np.int64)
    for number, block in enumerate(blocks):
        together = np.flatnonzero((spans[:number, 0] <= block.last) & (spans[:number, 1] >= block.first))
        order = together[np.argsort(starts[together], kind="stable")]
        begins = np.concatenate([[0], np.maximum.accumulate(ends[order], dtype=np.int64)])
        rooms = np.concatenate([starts[order], [FOREVER]]) - begins
        fitting = np.flatnonzero(rooms >= block.size)
        starts[number] = begins[fitting[np.argmin(rooms[fitting])]]
        ends[number] = starts[number] + block.size
    return starts.tolist(), int(ends.max(initial=0))
