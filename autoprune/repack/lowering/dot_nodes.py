"""Builds the native ops of layers whose weights are bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autoprune.errors import AutopruneError
from autoprune.quantization.grid import LEVELS, Grid
from autoprune.repack.kernels import dot_amx, dot_gemm
from autoprune.repack.kernels.bytes_lanes import lane_of
from autoprune.repack.kernels.compiler import Target
from autoprune.repack.kernels.dot_products import starts_of
from autoprune.repack.kernels.dot_tile import Form
from autoprune.repack.kernels.fields import Given
from autoprune.repack.kernels.math import clamped
from autoprune.repack.lowering.byte_nodes import Ending, On
from autoprune.repack.lowering.geometry import Tiling, Window
from autoprune.repack.lowering.layout import MapLayout
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.native.op import NativeOp, op_of
from autoprune.repack.weights.quads import QUAD

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


def steps_of(
    factor: Floats, bias: Floats, sums: NDArray[np.int64], x: Grid, y: Grid | None, residual: Grid | None,
    activation: str | None,
) -> Ending:  # fmt: skip
    """The epilogue of rows of integer sums.

    Args:
        factor: of each row: a weight's scale.
        bias: of each row, in real units.
        sums: of each row's weights.
        x: grid of the input.
        y: of the output; None where it is floats.
        residual: of the residual; None where it is floats, or there is none.
        activation: a name, see `kernels.math`.
    """
    low, high, function = clamped(activation)
    real = factor.astype(np.float64) * np.float32(x.scale)
    offset = bias.astype(np.float64) - real * x.zero_point * sums
    share = 1.0
    if residual is not None:
        share = float(np.float32(residual.scale))
        offset = offset - share * residual.zero_point
    if y is not None and not function:
        step = float(np.float32(y.scale))
        real, offset, share = real / step, offset / step + y.zero_point, share / step
        low, high = max(low / step + y.zero_point, 0.0), min(high / step + y.zero_point, float(LEVELS))
    elif y is not None:
        low, high = 0.0, float(LEVELS)
    return Ending(real.astype(np.float32), offset.astype(np.float32), low, high, function, share)


def convolution(
    name: str, weights: Weights, window: Window, activation: str | None, tiling: Tiling, batch: int,
    x: On, y: On, residual: On | None, target: Target,
) -> NativeOp:  # fmt: skip
    """A packed convolution of bytes.

    Args:
        name: of what is computed.
        weights: of the layer, bytes.
        window: how it slides.
        activation: a name, see `kernels.math`.
        tiling: how the work is cut.
        batch: images.
        x: interleaved, with a border of the window's padding, or in phase planes for its stride.
        y: of x's pitch, interleaved or of floats.
        residual: added before the activation, of y's shape and pitch; None for none.
        target: what to compile for.
    """
    f, packed, cells = dot_gemm.Field, weights.packed, weights.quads(tiling.whole)
    assert x.grid is not None
    check_sums(name, weights)
    check_lanes(name, weights, y, residual)
    taps = np.array([x.at.layout.tap(dy, dx) for dy, dx in window.taps()], np.int64)

    def distance(lane: NDArray[np.int64], tap: NDArray[np.int64]) -> NDArray[np.int32]:
        return (lane * x.at.layout.channel(1) + taps[tap]).astype(np.int32)

    tiled = tiling.tiles and target.amx
    key = ("whole", tiling.whole)
    pointer, index, values = _in_order(weights, key, tiled, cells.pointer, cells.index, cells.values)
    steps = row_steps(weights, x.grid, y.grid, None if residual is None else residual.grid, activation)
    work, items = tiling.cut(y.at.layout.positions, packed.groups, batch, target.lanes)
    given: dict[dot_gemm.Field, Given] = {
        f.X_SLOT: x.at.buffer.slot, f.X_OFFSET: x.at.offset, f.X_IMAGE: x.at.layout.image,
        f.Y_SLOT: y.at.buffer.slot, f.Y_OFFSET: y.at.offset, f.Y_IMAGE: y.at.layout.image,
        f.MASK: y.at.layout.mask(), f.GROUP_POINTER: pointer,
        f.OFFSETS: distance(*np.divmod(index.astype(np.int64), packed.taps)), f.VALUES: values,
        f.FACTOR: steps.factor, f.BIAS: steps.bias, f.Y_CHANNEL: _channels(weights, y), f.LOW: steps.low,
        f.HIGH: steps.high, f.BORDER_VALUE: 0 if y.grid is None else lane_of(y.grid.zero_point),
        f.BORDER: y.at.layout.behind, f.BORDER_FIRST: y.at.layout.before,
        **{f[key]: number for key, number in work.items()},
    }  # fmt: skip
    if target.signed:
        given[f.START] = starts_of(weights.row_sums)
    if mixed := bool(len(cells.mixed_index)):
        given |= _mixed(weights, tiling, tiled, distance)
    if residual is not None:
        given |= {
            f.RESIDUAL_SLOT: residual.at.buffer.slot, f.RESIDUAL_OFFSET: residual.at.offset,
            f.RESIDUAL_IMAGE: residual.at.layout.image, f.RESIDUAL_CHANNEL: _channels(weights, residual),
            f.RESIDUAL_SCALE: steps.residual,
        }  # fmt: skip
    given |= {f[key]: value for key, value in behind_activation(steps, y.grid).items()}
    form: Form | Literal[""] = "" if residual is None else form_of(residual.grid)
    kernel = dot_gemm.dot_gemm(packed.group_size, target, form_of(y.grid), steps.activation, form, mixed, tiled)
    return op_of(name, kernel, f, given, items)


def _mixed(
    weights: Weights, tiling: Tiling, tiled: bool, distance: Callable[[NDArray[np.int64], NDArray[np.int64]], Ints]
) -> dict[dot_gemm.Field, Given]:
    """The fields of cells whose four bytes lie anywhere."""
    f, cells, key = dot_gemm.Field, weights.quads(tiling.whole), ("mixed", tiling.whole)
    pointer, index, values = _in_order(weights, key, tiled, cells.mixed_pointer, cells.mixed_index, cells.mixed_values)
    channel, tap = np.divmod(index.astype(np.int64), weights.packed.taps)
    return {
        f.MIXED_POINTER: pointer, f.MIXED_OFFSETS: distance(channel // QUAD, tap),
        f.MIXED_BYTES: (channel % QUAD).astype(np.int32), f.MIXED_VALUES: values,
    }  # fmt: skip


def _in_order(
    weights: Weights, key: tuple[str, int], tiled: bool, pointer: Ints, index: Ints, values: Ints
) -> tuple[Ints, Ints, Ints]:
    """Cells as a kernel walks them: as they are, or in blocks for tile registers."""
    if not tiled:
        return pointer, index, values
    begins, cells, blocks = weights.ordered(key, lambda: dot_amx.in_blocks(pointer, values))
    return begins, index[cells], blocks


def row_steps(weights: Weights, x: Grid, y: Grid | None, residual: Grid | None, activation: str | None) -> Ending:
    """The epilogue of each row; one without a filter becomes zero where rows share a lane."""
    scale = weights.packed.scale
    assert scale is not None
    missing = (weights.packed.out_index < 0).ravel() & (y is not None)
    factor = np.where(missing, np.float32(0), scale[weights.rows])
    bias = np.where(missing, np.float32(0), weights.bias_rows)
    return steps_of(factor, bias, weights.row_sums, x, y, residual, activation)


def behind_activation(ending: Ending, grid: Grid | None) -> dict[str, float]:
    """The fields that bring what an activation gives onto the output's grid, by name; none without an activation."""
    if not ending.activation:
        return {}
    return {"INVERSE": 1.0, "ZERO": 0.0} if grid is None else {"INVERSE": grid.inverse, "ZERO": float(grid.zero_point)}


def check_lanes(name: str, weights: Weights, *written: On | None) -> None:
    """Raises AutopruneError where bytes are written or added and the packed rows are not filters of whole lanes."""
    if not weights.fills_lanes and any(each is not None and each.grid is not None for each in written):
        raise AutopruneError(f"the filters of {name!r} are packed in an order that fills no lanes of bytes.")


def check_sums(name: str, weights: Weights) -> None:
    """Raises AutopruneError where a sum of products might not fit 32 bits."""
    if weights.largest_sum * LEVELS >= 2**31:
        raise AutopruneError(f"the sums of {name!r} do not fit 32 bits: it keeps too many weights for int8.")


def form_of(grid: Grid | None) -> Form:
    """How a value on a grid, or on none, is stored."""
    return "floats" if grid is None else "bytes"


def _channels(weights: Weights, value: On) -> NDArray[np.int32]:
    """Where each row's channel lies; of an interleaved map where each four rows' lane does."""
    return channels_of(weights.rows, value.at.layout, value.grid is not None)


def channels_of(rows: NDArray[np.int32], layout: MapLayout, interleaved: bool) -> NDArray[np.int32]:
    """Distances from the first channel to that of each row, or of each four rows."""
    which = rows[::QUAD] // QUAD if interleaved else rows
    return (which.astype(np.int64) * layout.channel(1)).astype(np.int32)
