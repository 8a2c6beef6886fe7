"""Builds the ops that bring values onto one grid: sums of two, and what is joined along channels."""

from __future__ import annotations

import math

from autoprune.quantization.grid import LEVELS, Grid
from autoprune.repack.kernels import bytes_sum
from autoprune.repack.kernels.bytes_lanes import lane_of
from autoprune.repack.kernels.compiler import Target
from autoprune.repack.kernels.fields import Given
from autoprune.repack.lowering import map_nodes
from autoprune.repack.lowering.buffers import MapAt
from autoprune.repack.lowering.byte_nodes import On, Shape, step_of
from autoprune.repack.native.op import NativeOp, op_of
from autoprune.repack.weights.quads import QUAD, lanes_of


def added(
    name: str, shape: Shape, a: On, b: On, y: MapAt, grid: Grid, target: Target,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> NativeOp:  # fmt: skip
    """The sum of two values on a grid, in float32 steps; NaN becomes the lowest byte.

    Args:
        name: of the sum.
        shape: ``(N, C, H, W)``.
        a: one value; a map in one plane, of y's pitch.
        b: the other; likewise.
        y: of ``ceil(C / 4)`` lane-channels.
        grid: y's.
        target: what to compile for.
        bounds: what the sum is clamped to, before it is rounded.
    """
    return _sum(name, shape, (a, b), y, grid, 0, bounds, target)


def joined(name: str, shape: Shape, x: On, y: MapAt, grid: Grid, first: int, target: Target) -> NativeOp:
    """A value among others, joined along channels: moved as it is where the grids are the same.

    The values of the channels before it are joined before, those behind it afterwards.

    Args:
        name: of what is joined.
        shape: of x: ``(N, C, H, W)``.
        x: the value; a map in one plane, of y's pitch.
        y: of at least ``ceil((first + C) / 4)`` lane-channels.
        grid: y's.
        first: which of y's channels is x's first.
        target: what to compile for.
    """
    return _sum(name, shape, (x,), y, grid, first, (-math.inf, math.inf), target)


def _sum(
    name: str, shape: Shape, given: tuple[On, ...], y: MapAt, grid: Grid, first: int, bounds: tuple[float, float],
    target: Target,
) -> NativeOp:  # fmt: skip
    f, step = bytes_sum.Field, step_of(grid)
    batch, channels, *_ = shape
    shift, out = first % QUAD, y.layout
    written = lanes_of(shift + channels)
    chunk, chunks = map_nodes.chunked(written, out.positions)
    into = y.ref(first // QUAD)
    bias, fields = float(grid.zero_point), dict[bytes_sum.Field, Given]()
    for side, (at, on) in zip(("X", "OTHER"), given, strict=False):
        factor = (1.0 if on is None else step_of(on)) / step
        bias -= 0.0 if on is None else on.zero_point * factor
        layout, wide = at.layout, QUAD if on is None else 1
        fields |= {
            f[f"{side}_SLOT"]: at.buffer.slot, f[f"{side}_OFFSET"]: at.offset, f[f"{side}_IMAGE"]: layout.image,
            f[f"{side}_QUAD"]: wide * layout.channel(1), f[f"{side}_CHANNEL"]: layout.channel(1),
            f[f"{side}_FACTOR"]: factor,
        }  # fmt: skip
    low, high = (bound / step + grid.zero_point for bound in bounds)
    fields |= {
        f.Y_SLOT: into.slot, f.Y_OFFSET: into.offset_bytes, f.Y_IMAGE: out.image, f.Y_QUAD: out.channel(1),
        f.BIAS: bias, f.LOW: max(low, 0.0), f.HIGH: min(high, float(LEVELS)), f.CHANNELS: channels, f.QUADS: written,
        f.CHUNK: chunk, f.CHUNKS: chunks, f.POSITIONS: out.positions, f.MASK: out.mask(),
        f.BORDER_VALUE: lane_of(grid.zero_point), f.BORDER: out.behind, f.BORDER_FIRST: out.before,
    }  # fmt: skip
    sources = tuple[bytes_sum.Source, ...]("floats" if on is None else "bytes" for _, on in given)
    if len(given) == 1 and given[0].grid == grid:
        sources = ("lanes",)
    return op_of(name, bytes_sum.sum_bytes(sources, shift, target), f, fields, batch * chunks)
