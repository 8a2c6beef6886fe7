"""What tests of the kernels on interleaved maps share: buffers between walls, random maps, and the same in numpy."""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from autoprune.quantization.grid import Grid
from autoprune.repack.kernels.compiler import host, narrowed
from autoprune.repack.lowering.buffers import Buffer, MapAt, StridedRef
from autoprune.repack.lowering.layout import FLOAT_BYTES, MapLayout
from autoprune.repack.native.op import NativeOp
from autoprune.repack.weights.quads import lanes_of
from tests.repack.processors import run_op
from tests.repack.test_kernels import LIBC

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Shape = tuple[int, int, int, int]

TARGETS = {"host": host(), "8 lanes": narrowed(8), "4 lanes": narrowed(4)}
targets = pytest.mark.parametrize("target", list(TARGETS.values()), ids=list(TARGETS))


class Memory:
    """A slot for each buffer, which begins or ends where memory does: to touch what lies outside kills the process.

    On its other side, and where a buffer is only read, nothing may change.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.behind = seed % 2 == 1
        self.slots: list[NDArray[np.int32]] = [np.zeros(1, np.int32)]
        self.written: dict[int, int] = {}

    def buffer(self, size: int, layout: MapLayout | None = None, written: bool = False) -> Buffer:
        page = mmap.PAGESIZE
        room = -(-size * FLOAT_BYTES // page) * page
        region = mmap.mmap(-1, room + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(region))
        for guard in (start, start + page + room) if LIBC is not None else ():
            assert LIBC.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
        lanes = np.frombuffer(region, np.int32, room // FLOAT_BYTES, page)
        lanes[:] = self.rng.integers(-(2**31), 2**31, len(lanes))
        self.slots.append(lanes)
        if written:
            self.written[len(self.slots) - 1] = size
        first = len(lanes) - size if self.behind else 0
        return Buffer(size, layout, len(self.slots) - 1, first * FLOAT_BYTES)

    def map(self, batch: int, layout: MapLayout, written: bool = False) -> MapAt:
        return MapAt(self.buffer(layout.size(batch), layout, written), layout)

    def places(self, at: MapAt, batch: int) -> NDArray[np.int64]:
        """Of all lanes of a map and its border, (N, channels, rows, columns)."""
        layout = at.layout
        rows, columns = (
            range(-pad, size + pad) for size, pad in ((layout.height, layout.pad_h), (layout.width, layout.pad_w))
        )
        taps = np.array([[layout.tap(dy, dx) for dx in columns] for dy in rows])
        channels = np.array([layout.channel(number) for number in range(layout.channels)])
        images = at.offset // FLOAT_BYTES + np.arange(batch) * layout.image
        found: NDArray[np.int64] = images[:, None, None, None] + channels[:, None, None] + taps
        return found

    def put(self, at: MapAt, q: Bytes, border: int) -> None:
        """Bytes of shape (N, C, H, W) into an interleaved map, and around them."""
        whole = bordered(q, at.layout, border)
        self.slots[at.buffer.slot][self.places(at, len(q))] = in_lanes(whole)

    def put_floats(self, at: MapAt, x: Floats) -> None:
        layout = at.layout
        whole = np.pad(x, ((0, 0), (0, 0), (layout.pad_h,) * 2, (layout.pad_w,) * 2))
        self.slots[at.buffer.slot][self.places(at, len(x))] = whole.view(np.int32)

    def get(self, at: MapAt, batch: int) -> NDArray[np.int32]:
        return self.slots[at.buffer.slot][self.places(at, batch)]

    def floats(self, shape: tuple[int, ...], strides: tuple[int, ...], x: Floats | None = None) -> StridedRef:
        """A strided value; `x` where it is read, else it is written."""
        size = 1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
        buffer = self.buffer(size, written=x is None)
        ref = buffer.ref(*strides)
        if x is not None:
            self.strided(ref, shape)[...] = x.view(np.int32)
        return ref

    def strided(self, ref: StridedRef, shape: tuple[int, ...]) -> NDArray[np.int32]:
        assert isinstance(ref.offset_bytes, int)
        start = self.slots[ref.slot][ref.offset_bytes // FLOAT_BYTES :]
        return np.lib.stride_tricks.as_strided(start, shape, [stride * FLOAT_BYTES for stride in ref.strides])

    def run(self, op: NativeOp) -> None:
        """In any order of its items; nothing outside of the written buffers changes."""
        before = [lanes.copy() for lanes in self.slots]
        run_op(op, self.slots, self.rng.permutation(op.items))
        for slot, size in self.written.items():
            there = slice(-size, None) if self.behind else slice(size)
            before[slot][there] = self.slots[slot][there]
        assert all(map(np.array_equal, before, self.slots))


def in_lanes(q: Bytes) -> NDArray[np.int32]:
    """Bytes of shape (N, 4 quads, H, W) as lanes (N, quads, H, W)."""
    n, c, h, w = q.shape
    together = np.ascontiguousarray(q.reshape(n, c // 4, 4, h, w).transpose(0, 1, 3, 4, 2))
    return together.view(np.int32)[..., 0]


def whole_quads(q: Bytes, zero: int) -> Bytes:
    """With channels of the zero point up to a multiple of four."""
    return np.pad(q, ((0, 0), (0, -q.shape[1] % 4), (0, 0), (0, 0)), constant_values=zero)


def bordered(q: Bytes, layout: MapLayout, border: int, zero: int | None = None) -> Bytes:
    """A map's bytes and those around it; missing channels hold `zero`, or what the border does."""
    q = whole_quads(q, border if zero is None else zero)
    return np.pad(q, ((0, 0), (0, 0), (layout.pad_h,) * 2, (layout.pad_w,) * 2), constant_values=border)


def to_bytes(steps: Floats, zero: int = 0) -> Bytes:
    """Float32 values in steps, rounded half to even; NaN is the lowest."""
    rounded = np.rint(np.nan_to_num(steps, nan=-np.inf)).astype(np.float64) + zero
    return np.clip(rounded, 0, 255).astype(np.uint8)


def fma(x: NDArray[Any], y: NDArray[Any] | float, z: NDArray[Any] | float) -> Floats:
    """Float32 operands; their product and sum rounded once."""
    product = np.asarray(x, np.float32).astype(np.float64) * np.asarray(y, np.float32).astype(np.float64)
    made: Floats = (product + np.asarray(z, np.float32).astype(np.float64)).astype(np.float32)
    return made


def layout_of(
    rng: random.Random, shape: Shape, stride: tuple[int, int] = (1, 1), pad: tuple[int, int] | None = None,
    channels: int | None = None, width: int = 0,
) -> MapLayout:  # fmt: skip
    """Of an interleaved map (or of `channels`), its pitch perhaps wider than needed, and than `width`."""
    _, c, h, w = shape
    ph, pw = (rng.randint(0, 2), rng.randint(0, 2)) if pad is None else pad
    needed = w + pw if stride == (1, 1) else -(-(w + 2 * pw) // stride[1])
    pitch = max(needed, width) + rng.choice([0, 0, 1, 5])
    return MapLayout(lanes_of(c) if channels is None else channels, h, w, pitch, ph, pw, *stride)


def shape_of(rng: random.Random, least: int = 1) -> Shape:
    height, width = (rng.choice([least, least + rng.randint(0, 5), rng.randint(9, 40)]) for _ in range(2))
    return rng.randint(1, 2), rng.choice([1, 3, 4, 5, 8, 11, 16]), height, width


def grid_of(rng: random.Random) -> Grid:
    return Grid(float(np.float32(rng.uniform(0.01, 0.1))), rng.choice([0, 0, 128, 255, rng.randint(1, 254)]))


def bytes_of(memory: Memory, shape: Shape) -> Bytes:
    return memory.rng.integers(0, 256, shape).astype(np.uint8)


def floats_of(memory: Memory, shape: Shape, grid: Grid) -> Floats:
    """Values on and beyond a grid, ties among them, infinities and NaN."""
    x = memory.rng.normal(0, 150 * grid.scale, shape).astype(np.float32)
    ties = ((memory.rng.integers(-300, 300, shape) + 0.5) * np.float32(grid.scale)).astype(np.float32)
    x = np.where(memory.rng.random(shape) < 0.3, ties, x)
    for value in (np.nan, np.inf, -np.inf, -0.0):
        x[memory.rng.random(shape) < 0.02] = value
    return x


def quantised(x: Floats, grid: Grid) -> Bytes:
    with np.errstate(invalid="ignore"):
        return to_bytes(x * np.float32(grid.inverse), grid.zero_point)


def dequantised(q: Bytes, grid: Grid) -> Floats:
    steps: Floats = (q.astype(np.int32) - grid.zero_point).astype(np.float32)
    return steps * np.float32(grid.scale)


def each_seed(count: int, check: Callable[[random.Random, Memory], None]) -> None:
    for seed in range(count):
        check(random.Random(seed), Memory(seed))
