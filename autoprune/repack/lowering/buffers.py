"""Which buffers share memory: a call's values lie in one arena; a value's place is used again after its last use.

A feature map whose border is not zero only takes the place of one whose borders lie at the same addresses: they are
filled once, when the arena is made, and nothing ever writes to them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoprune.repack.lowering.layout import ALIGN, FLOAT_BYTES, MapLayout, aligned


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
        over: what may be overwritten by it, position by position, when it is read for the last time.
    """

    size: int
    layout: MapLayout | None = None
    slot: int = -1
    offset: int = 0
    first: int = -1
    last: int = -1
    over: Buffer | None = None
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
    key: Hashable
    size: int
    free_from: int
    users: list[Buffer] = field(default_factory=list)


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
    """Gives every buffer its offset in the arena in `slot`, in the order they come into use."""
    blocks: list[_Block] = []
    for buffer in sorted((each for each in buffers if each.first >= 0), key=lambda each: each.first):
        key, over = _key(buffer.layout), buffer.over
        free = [block for block in blocks if block.key == key and block.free_from <= buffer.first]
        if over is not None and over.last == buffer.first and over.layout == buffer.layout:
            fitting = next((block for block in blocks if over in block.users), None)
        else:  # of those that are large enough the one used last: it is still in a cache
            fitting = min(
                free, key=lambda block: (max(0, buffer.size - block.size), -block.free_from, block.size), default=None
            )
        if fitting is None:
            fitting = _Block(key, 0, 0)
            blocks.append(fitting)
        fitting.size = max(fitting.size, aligned(buffer.size))
        fitting.free_from = buffer.last + 1
        fitting.users.append(buffer)
    borders, start = [], 0
    for block in blocks:
        for buffer in block.users:
            buffer.slot, buffer.offset = slot, start * FLOAT_BYTES
        layout = block.users[0].layout
        if layout is not None and layout.border != 0:
            borders.append((start, block.size, layout.border))
        start += block.size
    return Arena(max(start, ALIGN), tuple(borders))
