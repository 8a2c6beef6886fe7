"""What a packed layer fetches: the cache lines of one inference, told apart by what lies in them.

The kernels' order of work is known, so the lines they touch are listed as they touch them, and looked up in a model of
a cache. Nothing is run and nothing is timed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from autoprune.errors import AutopruneError
from autoprune.repack.graph.ops import Conv2d, GatedConv2d, LayerOp, Linear, Recurrent
from autoprune.repack.kernels import offset_gemm, register_tile, rows_gemm
from autoprune.repack.kernels.compiler import Target
from autoprune.repack.kernels.lru import lru
from autoprune.repack.lowering.layout import FLOAT_BYTES
from autoprune.repack.native.op import NativeOp

Longs = NDArray[np.int64]
_F, _R = offset_gemm.Field, rows_gemm.Field
INDEX_BYTES = 4
SAMPLED_GROUPS = 6


class What(IntEnum):
    """What a line holds."""

    INPUT = 0
    WEIGHT = 1  # and biases
    INDEX = 2
    OUTPUT = 3  # residuals, masks and partial sums too


@dataclass(frozen=True)
class Cache:
    """One level of a cache that replaces what was used least recently.

    Attributes:
        capacity: bytes.
        line: bytes, a power of two.
        ways: lines of a set.
    """

    capacity: int = 32 * 1024
    line: int = 64
    ways: int = 8

    def __post_init__(self) -> None:
        fine = all(type(n) is int and n > 0 for n in (self.capacity, self.line, self.ways))
        if not fine or self.line < _STEP or self.line & (self.line - 1) or self.capacity % (self.line * self.ways):
            raise AutopruneError(
                f"a cache has a line of a power of two bytes, {_STEP} at least, and a capacity of whole sets "
                f"(ways x line bytes), not capacity {self.capacity}, line {self.line}, ways {self.ways}."
            )

    @property
    def sets(self) -> int:
        return self.capacity // (self.line * self.ways)


@dataclass
class CacheState:
    """What a cache holds.

    Attributes:
        cache: its shape.
        tags: ``(sets, ways)`` lines, most recent first; -1 for none.
    """

    cache: Cache
    tags: Longs = field(init=False)

    def __post_init__(self) -> None:
        self.tags = np.full((self.cache.sets, self.cache.ways), -1, np.int64)

    def misses(self, addresses: Longs) -> NDArray[np.bool_]:
        """Looks up byte addresses one after another; where they were not there."""
        lines = np.ascontiguousarray(addresses // self.cache.line)
        missed = np.empty(len(lines), np.uint8)
        where = (lines.ctypes.data, len(lines), self.cache.sets, self.cache.ways, self.tags.ctypes.data)
        lru()(*where, missed.ctypes.data)
        return missed.view(np.bool_)


@dataclass(frozen=True)
class Fetched:
    """Lines fetched in one inference.

    Attributes:
        lines: how many hold each of `What`.
        line: bytes of one.
    """

    lines: Mapping[What, int]
    line: int

    @property
    def total(self) -> int:
        return sum(self.lines.values())

    @property
    def bytes(self) -> int:
        return self.total * self.line

    def bytes_of(self, what: What) -> int:
        return self.lines[what] * self.line


@dataclass(frozen=True)
class Touches:
    """Memory accesses in order.

    Attributes:
        address: bytes, of a tile at position 0.
        moves: bytes each address moves by from a position to the next.
        what: of `What`.
    """

    address: Longs
    moves: Longs
    what: NDArray[np.uint8]

    @classmethod
    def joined(cls, parts: list[Touches]) -> Touches:
        return cls(
            np.concatenate([part.address for part in parts]),
            np.concatenate([part.moves for part in parts]),
            np.concatenate([part.what for part in parts]),
        )

    def at(self, positions: Longs) -> tuple[Longs, NDArray[np.uint8]]:
        """The accesses of one tile after another."""
        address = self.address[None] + positions[:, None] * self.moves[None]
        return address.ravel(), np.tile(self.what, len(positions))


def fetched(
    op: NativeOp, form: type[LayerOp], rows: int, target: Target, slots: Longs, cache: Cache, *, sample: bool = False
) -> Fetched:
    """Lines a packed layer fetches in an inference that follows another one, on one thread.

    Args:
        op: of `lowering.convolutions.convolution` or `lowering.token_nodes.linear`.
        form: the class of layers its kernel is made for, of `MODELLED`; a gated convolution as if every channel lived.
        rows: filters in a group.
        target: what its kernel was compiled for.
        slots: base addresses, as the kernel gets them.
        cache: the model's.
        sample: only the first groups of the first positions, into an empty cache: enough to compare two orders of the
            same work, in a few milliseconds.

    Source: the order of accesses is that of `kernels.offset_gemm` and `kernels.rows_gemm`.
    """
    accesses = ACCESSES[form]
    if accesses is None:
        raise AutopruneError(f"what a {form.kind} layer fetches cannot be told.")
    work = accesses(op, rows, target, slots, sample)
    state, lines = CacheState(cache), np.zeros(len(What), np.int64)
    for counted in (True,) if sample else (False, True):  # the first inference fills the cache
        for item in range(1 if sample else op.items):
            for address, what in work.accesses(item):
                missed = state.misses(address)
                if counted:
                    lines += np.bincount(what[missed], minlength=len(What))
    return Fetched({what: int(lines[what]) for what in What}, cache.line)


class _Work(ABC):
    """What a kernel does, in its order."""

    @abstractmethod
    def __init__(self, op: NativeOp, rows: int, target: Target, slots: Longs, sample: bool) -> None: ...

    @abstractmethod
    def accesses(self, item: int) -> Iterator[tuple[Longs, NDArray[np.uint8]]]:
        """An item's accesses: byte addresses and what lies there."""


class _Linear(_Work):
    """The accesses of one Linear, item by item."""

    def __init__(self, op: NativeOp, rows: int, target: Target, slots: Longs, sample: bool) -> None:
        self.fields = op.addresses()
        self.rows, self.slots, self.sample = rows, slots, sample
        self.most = {groups: rows_gemm.token_counts(groups * rows, target)[0] for groups in (1, 2)}
        self.twin = op.arrays.get(_R.TWIN)
        self.pointer, self.index = op.arrays[_R.GROUP_POINTER], op.arrays[_R.INDEX].astype(np.int64)
        self.out_index = op.arrays[_R.OUT_INDEX].ravel().astype(np.int64)

    def accesses(self, item: int) -> Iterator[tuple[Longs, NDArray[np.uint8]]]:
        f = self.fields
        chunk, block = item % f[_R.CHUNKS], item // f[_R.CHUNKS]
        first, last = int(chunk * f[_R.CHUNK]), int(min((chunk + 1) * f[_R.CHUNK], f[_R.GROUPS]))
        start, stop = int(block * f[_R.BLOCK]), int(min((block + 1) * f[_R.BLOCK], f[_R.TOKENS]))
        if self.sample:
            stop, last = min(stop, start + 2 * self.most[1]), min(last, first + SAMPLED_GROUPS)
        for group in range(first, last):
            twin = rows_gemm.Twin.NONE if self.twin is None else self.twin[group]
            if twin == rows_gemm.Twin.SECOND:
                continue  # computed with the one before
            groups, token = 2 if twin == rows_gemm.Twin.FIRST else 1, start
            for count in (self.most[groups], (stop - start) % self.most[groups]):
                tiles = (stop - token) // max(1, count)
                if tiles:
                    yield self._compute(group, groups, count).at(token + count * np.arange(tiles, dtype=np.int64))
                token += tiles * count

    def _compute(self, group: int, groups: int, tokens: int) -> Touches:
        """The filters of one group or of twins for one tile of tokens, with addresses of token 0: see `rows_gemm`."""
        f, rows = self.fields, self.rows
        x, y, residual = (
            (int(self.slots[f[slot]] + f[offset]), FLOAT_BYTES * int(f[token]))
            for slot, offset, token in (
                (_R.X_SLOT, _R.X_OFFSET, _R.X_TOKEN),
                (_R.Y_SLOT, _R.Y_OFFSET, _R.Y_TOKEN),
                (_R.RESIDUAL_SLOT, _R.RESIDUAL_OFFSET, _R.RESIDUAL_TOKEN),
            )
        )
        begin, end = int(self.pointer[group]), int(self.pointer[group + 1])
        kept, width = np.arange(begin, end), FLOAT_BYTES * rows
        given = [
            _touches(x[0] + token * x[1] + FLOAT_BYTES * self.index[begin:end], FLOAT_BYTES, What.INPUT, x[1])
            for token in range(tokens)
        ]
        filters = self.out_index[group * rows : (group + groups) * rows]
        filters = FLOAT_BYTES * filters[filters >= 0]
        values = [int(f[_R.VALUES]) + width * (kept + number * (end - begin)) for number in range(groups)]
        parts = [
            _in_turn(_touches(int(f[_R.BIAS]) + group * width, groups * width, What.WEIGHT)),
            _in_turn(
                _touches(int(f[_R.INDEX]) + INDEX_BYTES * kept, INDEX_BYTES, What.INDEX),
                *(_touches(each, width, What.WEIGHT) for each in values),
                *given,
            ),
        ]
        for token in range(tokens):
            for base, stride in (residual, y) if f[_R.RESIDUAL] else (y,):
                parts.append(_in_turn(_touches(base + token * stride + filters, FLOAT_BYTES, What.OUTPUT, stride)))
        return Touches.joined(parts)


class _Convolution(_Work):
    """The accesses of one offset-GEMM, item by item."""

    def __init__(self, op: NativeOp, rows: int, target: Target, slots: Longs, sample: bool) -> None:
        self.rows, self.slots, self.sample = rows, slots, sample
        f = self.fields = op.addresses()
        masks = bool(f[_F.RUNS])
        self.lanes, self.heights = target.lanes, register_tile.tiles(rows, target, masks=masks)
        self.widest = max(self.heights)
        gated = len(f) > max(_F) + 1  # then no position is taken singly
        self.singles = None if gated else register_tile.singles(rows, target, masks)
        self.pointer, self.offsets = op.arrays[_F.GROUP_POINTER], op.arrays[_F.OFFSETS].astype(np.int64)
        self.y_channel = op.arrays[_F.Y_CHANNEL].astype(np.int64)
        self.residual_channel = op.arrays[_F.RESIDUAL_CHANNEL].astype(np.int64)
        self.panels = int(f[_F.PANELS])

    def accesses(self, item: int) -> Iterator[tuple[Longs, NDArray[np.uint8]]]:
        f = self.fields
        chunk = item // f[_F.CHUNK_STRIDE] % f[_F.CHUNKS]
        block = item // f[_F.BLOCK_STRIDE] % f[_F.BLOCKS]
        image = item // f[_F.IMAGE_STRIDE] % f[_F.BATCH]
        start = int(block * f[_F.BLOCK])
        length = int(f[_F.POSITIONS] - start if block == f[_F.BLOCKS] - 1 else f[_F.BLOCK])
        first, last = int(chunk * f[_F.CHUNK]), int(min((chunk + 1) * f[_F.CHUNK], f[_F.GROUPS]))
        if self.sample:
            length, last = min(length, 2 * self.widest * self.lanes), min(last, first + SAMPLED_GROUPS)
        groups = range(first, last)
        x, y, residual = (
            int(self.slots[f[slot]] + f[offset] + FLOAT_BYTES * (image * f[stride] + start))
            for slot, offset, stride in (
                (_F.X_SLOT, _F.X_OFFSET, _F.X_IMAGE),
                (_F.Y_SLOT, _F.Y_OFFSET, _F.Y_IMAGE),
                (_F.RESIDUAL_SLOT, _F.RESIDUAL_OFFSET, _F.RESIDUAL_IMAGE),
            )
        )
        mask = int(f[_F.MASK]) + FLOAT_BYTES * start
        ends = (y, residual, mask)
        scratch = int(self.slots[f[_F.SCRATCH_SLOT]] + f[_F.SCRATCH_OFFSET]) if self.panels else 0  # the first thread's
        for group in groups:
            for panel in range(max(1, self.panels)):
                list_ = group * max(1, self.panels) + panel
                carry = (register_tile.CARRY_IN if panel else 0) | (
                    register_tile.CARRY_OUT if panel < self.panels - 1 else 0
                )
                for count, positions, alone in self._cover(length):
                    yield self._compute(group, list_, x, count, ends, scratch, carry, alone).at(positions)

    def _cover(self, length: int) -> Iterator[tuple[int, Longs, int]]:
        """As `register_tile.cover`: vectors of a tile, where such tiles begin, how far the single position is, or 0."""
        vectors, lanes, widest, begin = -(-length // self.lanes), self.lanes, self.widest, 0
        few, single = length % lanes, self.singles
        if single and 0 < few <= single.most and few * single.count <= length // lanes:
            for number in range(few):
                begin = number * single.count * lanes
                yield single.count, np.array([begin], np.int64), length // lanes * lanes + number - begin
            begin = few * single.count * lanes
            vectors = length // lanes - few * single.count
        rest = vectors % widest
        whole = vectors - rest
        if widest > 2 and rest == 1 and vectors > 1:
            whole -= widest
        if whole:
            yield widest, begin + np.arange(0, whole, widest, dtype=np.int64) * lanes, 0
        left = vectors - whole
        parts = [left] if left < widest else [-(-left // 2), left // 2]
        for part in parts:
            if part:
                yield part, np.array([begin + whole * lanes], np.int64), 0
            whole += part

    def _compute(
        self, group: int, list_: int, x: int, count: int, ends: tuple[int, int, int], scratch: int, carry: int,
        alone: int,
    ) -> Touches:  # fmt: skip
        """A group's sums over one list of kept positions, for one tile: see `register_tile.tile`.

        Of a single position, its input and its output are looked at: the rest lies in lines that are met anyway.
        """
        f, rows, height, moving = self.fields, self.rows, self.heights[count], FLOAT_BYTES
        begin, end = int(self.pointer[list_]), int(self.pointer[list_ + 1])
        kept, span = np.arange(begin, end), FLOAT_BYTES * count * self.lanes
        index = _touches(int(f[_F.OFFSETS]) + INDEX_BYTES * kept, INDEX_BYTES, What.INDEX)
        inputs = [_touches(x + FLOAT_BYTES * self.offsets[begin:end], span, What.INPUT, moving)]
        if alone:
            inputs.append(_touches(inputs[0][0][:, 0] + FLOAT_BYTES * alone, FLOAT_BYTES, What.INPUT, moving))
        y, residual, mask = ends
        parts = []
        for row in reversed(range(0, rows, height)):
            sums = _touches(scratch + row * span, height * span, What.OUTPUT, rows * moving)
            bias = _touches(int(f[_F.BIAS]) + FLOAT_BYTES * (group * rows + row), FLOAT_BYTES * height, What.WEIGHT)
            parts.append(_in_turn(sums if carry & register_tile.CARRY_IN else bias))
            values = int(f[_F.VALUES]) + FLOAT_BYTES * (kept * rows + row)
            parts.append(_in_turn(index, *inputs, _touches(values, FLOAT_BYTES * height, What.WEIGHT)))
            if carry & register_tile.CARRY_OUT:
                parts.append(_in_turn(sums))
                continue
            each = group * rows + row + np.arange(height)
            if f[_F.RESIDUAL]:
                lines = residual + FLOAT_BYTES * self.residual_channel[each]
                parts.append(_in_turn(_touches(lines, span, What.OUTPUT, moving)))
            parts.append(_in_turn(_touches(mask, span, What.OUTPUT, moving)))
            lines = y + FLOAT_BYTES * self.y_channel[each[::-1]]
            parts.append(_in_turn(_touches(lines, span, What.OUTPUT, moving)))
            if alone:
                parts.append(_in_turn(_touches(lines + FLOAT_BYTES * alone, FLOAT_BYTES, What.OUTPUT, moving)))
        return Touches.joined(parts)


ACCESSES: Mapping[type[LayerOp], type[_Work] | None] = {
    Conv2d: _Convolution,
    GatedConv2d: _Convolution,
    Linear: _Linear,
    Recurrent: None,
}
"""Class of layers -> the order in which its kernel works; None where it is not modelled."""
MODELLED = frozenset(form for form, accesses in ACCESSES.items() if accesses is not None)
"""The classes of layers whose fetches can be told."""


_STEP = 32  # bytes; no more than any line modelled
_Columns = tuple[Longs, What, int]


def _touches(address: Longs | int, span: int, what: What, moves: int = 0) -> _Columns:
    """`span` bytes from each address: addresses in every line they may lie in, ``(n, lines)``."""
    within = np.unique([*range(0, span, _STEP), span - 1])
    return np.atleast_1d(address)[:, None] + within, what, moves


def _in_turn(*columns: _Columns) -> Touches:
    """The first of each, then the second of each, and so on."""
    counts = [part[0].shape[1] for part in columns]
    address = np.concatenate([part[0] for part in columns], axis=1)
    what = np.repeat([int(part[1]) for part in columns], counts).astype(np.uint8)
    moves = np.repeat([part[2] for part in columns], counts)
    return Touches(address.ravel(), np.tile(moves, len(address)), np.tile(what, len(address)))
