"""Builds the ops on interleaved maps beside the GEMM: into bytes and out of them, windows, sums, means.

An interleaved map of C channels is a `MapLayout` of `lanes_of(C)` lane-channels, whose lanes hold four bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoprune.errors import AutopruneError
from autoprune.quantization.grid import LEVELS, Grid
from autoprune.repack.kernels import bytes_copy, bytes_depthwise, bytes_maps, bytes_turn, bytes_window
from autoprune.repack.kernels.bytes_lanes import lane_of
from autoprune.repack.kernels.compiler import Target
from autoprune.repack.kernels.dot_products import starts_of
from autoprune.repack.kernels.fields import Given
from autoprune.repack.lowering import map_nodes
from autoprune.repack.lowering.buffers import MapAt, StridedRef
from autoprune.repack.lowering.geometry import CHUNK_FLOATS, Window
from autoprune.repack.lowering.layout import MapLayout
from autoprune.repack.native.op import NativeOp, op_of
from autoprune.repack.weights.quads import QUAD, lanes_of

Shape = tuple[int, int, int, int]
_LARGEST_SUM = 2**31 - 1


def quantised(name: str, shape: Shape, x: StridedRef, y: MapAt, grid: Grid, target: Target) -> NativeOp:
    """Floats moved onto a grid, as an interleaved map with its border of zero points. NaN becomes the lowest byte.

    Args:
        name: of the value.
        shape: ``(N, C, H, W)``.
        x: strided as `shape`; the floats of a row are neighbours, or of tokens (H is 1) those of all channels.
        y: of ``ceil(C / 4)`` lane-channels; phase planes where x's rows are neighbours.
        grid: y's.
        target: what to compile for.

    Raises:
        AutopruneError: x has neither neighbours.
    """
    low, high = float(-grid.zero_point), float(LEVELS - grid.zero_point)
    if y.layout.phases == 1 and _are_tokens(name, shape, x):
        t = bytes_turn.Field
        turning = _between_tokens(shape, x, y, target) | {
            t.ZERO: grid.zero_point, t.SCALE: grid.inverse, t.LOW: low, t.HIGH: high, t.BORDER: y.layout.behind,
            t.BORDER_FIRST: y.layout.before,
        }  # fmt: skip
        return op_of(name, bytes_turn.tokens_to_bytes(target), t, turning, shape[0] * _blocks(shape, target))
    f = bytes_copy.Field
    given = {f.SCALE: grid.inverse, f.LOW: low, f.HIGH: high}
    form = bytes_copy.Form.QUANTISED
    return _copy(name, form, shape, x, y.ref(), y.layout, lane_of(grid.zero_point), given, target)


def dequantised(
    name: str, shape: Shape, x: MapAt, y: MapAt | StridedRef, grid: Grid, target: Target
) -> NativeOp:  # fmt: skip
    """The floats of an interleaved map: a map with its border of zeros, rows, or rows of tokens.

    Args:
        name: of the value.
        shape: ``(N, C, H, W)``.
        x: of ``ceil(C / 4)`` lane-channels, in one plane.
        y: of C channels, its border left alone where it is not 0; or strided as `shape`, as `quantised` takes it.
        grid: x's.
        target: what to compile for.

    Raises:
        AutopruneError: y has no neighbours.
    """
    layout, into = (y.layout, y.ref()) if isinstance(y, MapAt) else (None, y)
    if _are_tokens(name, shape, into):
        t = bytes_turn.Field
        turning = _between_tokens(shape, into, x, target) | {t.ZERO: grid.zero_point, t.SCALE: step_of(grid)}
        return op_of(name, bytes_turn.bytes_to_tokens(target), t, turning, shape[0] * _blocks(shape, target))
    layout = None if layout is not None and layout.border != 0 else layout
    given = {bytes_copy.Field.SCALE: step_of(grid), bytes_copy.Field.ZERO: grid.zero_point}
    form = bytes_copy.Form.DEQUANTISED
    return _copy(name, form, shape, x.ref(), into, layout, lane_of(grid.zero_point), given, target)


def moved(name: str, batch: int, x: MapAt, y: MapAt, border: int, target: Target) -> NativeOp:
    """An interleaved map in another layout: pitch, padding, phase planes.

    Args:
        name: of the value.
        batch: images.
        x: in one plane; its border is not read.
        y: of x's lane-channels.
        border: the byte around y: the zero point, or 0 for a maximum.
        target: what to compile for.
    """
    shape = (batch, QUAD * x.layout.channels, x.layout.height, x.layout.width)
    return _copy(name, bytes_copy.Form.MOVED, shape, x.ref(), y.ref(), y.layout, lane_of(border), {}, target)


def _copy(
    name: str, form: bytes_copy.Form, shape: Shape, x: StridedRef, y: StridedRef, layout: MapLayout | None, lane: int,
    grid: Mapping[bytes_copy.Field, Given], target: Target,
) -> NativeOp:  # fmt: skip
    """The op that copies; `layout` is y's, None where only the value itself is written."""
    f = bytes_copy.Field
    batch, channels, height, width = shape
    rows, columns, plane, strides, pads, border = height, width, 0, (1, 1), (0, 0), (0, 0, 0)
    if layout is not None:
        columns, plane = layout.pitch, layout.plane
        if layout.phases > 1:  # the rows and columns of the border are part of the planes
            rows, strides, pads = layout.rows, (layout.stride_h, layout.stride_w), (layout.pad_h, layout.pad_w)
        else:
            border = (layout.positions, layout.behind, layout.before)
    block = max(1, min(rows, CHUNK_FLOATS // (columns * strides[0] * strides[1])))
    blocks = -(-rows // block)
    given: dict[bytes_copy.Field, Given] = {
        f.X_SLOT: x.slot, f.X_OFFSET: x.offset_bytes, f.Y_SLOT: y.slot, f.Y_OFFSET: y.offset_bytes,
        f.CHANNELS: channels, f.QUADS: lanes_of(channels), f.HEIGHT: height, f.WIDTH: width,
        f.X_IMAGE: x.strides[0], f.X_CHANNEL: x.strides[1], f.X_ROW: x.strides[2],
        f.Y_IMAGE: y.strides[0], f.Y_CHANNEL: y.strides[1], f.Y_ROW: y.strides[2],
        f.STRIDE_H: strides[0], f.PAD_H: pads[0], f.PAD_W: pads[1], f.ROWS: rows, f.COLUMNS: columns, f.Y_PLANE: plane,
        f.BLOCK: block, f.BLOCKS: blocks, f.POSITIONS: border[0], f.BORDER: border[1], f.BORDER_FIRST: border[2],
        f.BORDER_VALUE: lane,
    }  # fmt: skip
    kernel = bytes_copy.copy_bytes(form, strides[1], target)
    return op_of(name, kernel, f, {**given, **grid}, batch * lanes_of(channels) * blocks)


def _are_tokens(name: str, shape: Shape, at: StridedRef) -> bool:
    """Whether a value's channels are neighbours, not the floats of its rows."""
    _, channel, _, column = at.strides
    if channel == 1 and shape[2] == 1 and (column != 1 or shape[3] == 1):
        return True
    if column == 1 or shape[3] == 1:
        return False
    raise AutopruneError(
        f"{name}, of shape {shape}, has the strides {at.strides}; bytes are made of rows or of one row's channels."
    )


def _blocks(shape: Shape, target: Target) -> int:
    return -(-shape[3] // target.lanes)


def _between_tokens(shape: Shape, rows: StridedRef, map_: MapAt, target: Target) -> dict[bytes_turn.Field, Given]:
    t = bytes_turn.Field
    return {
        t.ROWS_SLOT: rows.slot, t.ROWS_OFFSET: rows.offset_bytes, t.ROWS_IMAGE: rows.strides[0],
        t.ROWS_TOKEN: rows.strides[3], t.MAP_SLOT: map_.buffer.slot, t.MAP_OFFSET: map_.offset,
        t.MAP_IMAGE: map_.layout.image, t.MAP_QUAD: map_.layout.channel(1), t.TOKENS: shape[3], t.FEATURES: shape[1],
        t.QUADS: lanes_of(shape[1]), t.BLOCKS: _blocks(shape, target),
    }  # fmt: skip


def step_of(grid: Grid) -> float:
    """The scale as the float32 that kernels multiply by."""
    return float(np.float32(grid.scale))


def pooled(name: str, window_: Window, batch: int, x: MapAt, y: MapAt, border: int, target: Target) -> NativeOp:
    """The largest byte of each window: those of the padding count as they lie in x's border.

    Args:
        name: of what is computed.
        window_: how it slides, at most `WIDEST_STRIDE` columns a step.
        batch: images.
        x: in one plane, with a border of the window's margin that holds 0, the lowest byte, unless no other is lower.
        y: of x's lane-channels.
        border: the byte around y.
        target: what to compile for.
    """
    columns = tuple(number * window_.dilation[1] for number in range(window_.kernel[1]))
    given, chunks = _sliding(window_, x, y, border, window_.taps()[:: window_.kernel[1]])
    kernel = bytes_window.pool_bytes(bytes_window.Mode.MAX, window_.stride[1], columns, target)
    return op_of(name, kernel, bytes_window.Field, given, batch * chunks)


def averaged_windows(
    name: str, window_: Window, batch: int, x: MapAt, y: MapAt, grids: tuple[Grid, Grid], counted: map_nodes.Counted,
    target: Target,
) -> NativeOp:  # fmt: skip
    """The mean of each window: an exact sum, one float32 product, rounded half to even.

    Args:
        name: of what is computed.
        window_: how it slides, at most `WIDEST_STRIDE` columns a step.
        batch: images.
        x: in one plane, with a border of the window's margin that holds the zero point.
        y: of x's lane-channels.
        grids: x's and y's.
        counted: what a sum is divided by.
        target: what to compile for.
    """
    f, mode = bytes_window.Field, bytes_window.Mode
    given_grid, grid = grids
    taps, columns = len(window_.taps()), tuple(range(window_.kernel[1]))
    given, chunks = _sliding(window_, x, y, grid.zero_point, window_.taps()[:: window_.kernel[1]])
    share = map_nodes.shares(window_, x.layout, y.layout, counted)
    given |= {
        f.SCALE: share * np.float32(given_grid.scale / grid.scale), f.SUM_ZERO: taps * given_grid.zero_point,
        f.ZERO: grid.zero_point, f.LOW: float(-grid.zero_point), f.HIGH: float(LEVELS - grid.zero_point),
    }  # fmt: skip
    form = mode.AVERAGE if taps <= bytes_window.MOST_HALVES else mode.LARGE_AVERAGE
    kernel = bytes_window.pool_bytes(form, window_.stride[1], columns, target)
    return op_of(name, kernel, f, given, batch * chunks)


def _sliding(
    window_: Window, x: MapAt, y: MapAt, border: int, taps: list[tuple[int, int]]
) -> tuple[dict[bytes_window.Field, Given], int]:  # fmt: skip
    """What all sliding windows are given, and the chunks of an image; `taps` are the places their offsets tell."""
    f, layout, out = bytes_window.Field, x.layout, y.layout
    layout.check_windows(out, window_.stride, window_.taps())
    phased = layout.phases > 1  # then what neighbouring outputs read are neighbours
    flat = window_.stride == (1, 1) and layout.pitch == out.pitch
    chunk, chunks = map_nodes.chunked(layout.channels, out.positions)
    return {
        f.X_SLOT: x.buffer.slot, f.X_OFFSET: x.offset, f.Y_SLOT: y.buffer.slot, f.Y_OFFSET: y.offset,
        f.X_IMAGE: layout.image, f.Y_IMAGE: out.image, f.X_QUAD: layout.channel(1), f.Y_QUAD: out.channel(1),
        f.X_ROW: layout.pitch if phased else window_.stride[0] * layout.pitch, f.Y_ROW: out.pitch,
        f.ROWS: 1 if flat else out.height, f.COLUMNS: out.positions if flat else out.pitch, f.QUADS: layout.channels,
        f.CHUNK: chunk, f.CHUNKS: chunks, f.MASK: out.mask(), f.BORDER_VALUE: lane_of(border),
        f.POSITIONS: out.positions, f.BORDER: out.behind, f.BORDER_FIRST: out.before, f.TAPS: len(taps),
        f.OFFSETS: np.array([layout.tap(dy, dx) for dy, dx in taps], np.int32),
    }, chunks  # fmt: skip


def averaged(
    name: str, batch: int, channels: int, x: MapAt, y: StridedRef, grid: Grid, target: Target
) -> NativeOp:  # fmt: skip
    """The mean of each channel as a float: an exact sum, one float32 product.

    Args:
        name: of what is computed.
        batch: images.
        channels: of the value.
        x: an interleaved map in one plane.
        y: ``(batch, channels)``.
        grid: x's.
        target: what to compile for.

    Raises:
        AutopruneError: x has so many positions that a sum might not fit 31 bits.
    """
    f, layout = bytes_maps.MeanField, x.layout
    positions = layout.height * layout.width
    if positions * LEVELS > _LARGEST_SUM:
        raise AutopruneError(f"{name}: the bytes of {positions} positions might sum to more than 31 bits hold.")
    chunk, chunks = map_nodes.chunked(layout.channels, layout.positions)
    given: dict[bytes_maps.MeanField, Given] = {
        f.X_SLOT: x.buffer.slot, f.X_OFFSET: x.offset, f.X_IMAGE: layout.image, f.X_QUAD: layout.channel(1),
        f.Y_SLOT: y.slot, f.Y_OFFSET: y.offset_bytes, f.Y_IMAGE: y.strides[0], f.Y_CHANNEL: y.strides[1],
        f.POSITIONS: layout.positions, f.MASK: layout.mask(), f.CHANNELS: channels, f.QUADS: layout.channels,
        f.CHUNK: chunk, f.CHUNKS: chunks, f.SUM_ZERO: positions * grid.zero_point,
        f.SCALE: float(np.float32(step_of(grid) / positions)),
    }  # fmt: skip
    return op_of(name, bytes_maps.byte_means(target), f, given, batch * chunks)


class On(NamedTuple):
    """A map, and the grid of its bytes; a map of floats where there is none."""

    at: MapAt
    grid: Grid | None


class Ending(NamedTuple):
    """What becomes of sums of products: ``activation(sum * factor + bias + added * residual)``, clamped.

    In steps of the output's grid, its zero point among them, where there is one and no activation; with an activation
    in real units until it is computed.

    Attributes:
        factor, bias: of each channel or row, in float32.
        low, high: what results are clamped to; in steps after an activation.
        activation: a row of `kernels.math.ACTIVATIONS`, or nothing.
        residual: what the bytes or floats that are added are multiplied by.
    """

    factor: NDArray[np.float32]
    bias: NDArray[np.float32]
    low: float
    high: float
    activation: str = ""
    residual: float = 1.0


def depthwise(
    name: str, window_: Window, batch: int, x: MapAt, y: MapAt, weights: NDArray[np.int8], ending: Ending,
    grid: Grid | None, target: Target,
) -> NativeOp:  # fmt: skip
    """A depthwise convolution of bytes.

    Args:
        name: of what is computed.
        window_: how it slides; x in one plane, at most `WIDEST_STRIDE` columns a step.
        batch: images.
        x: with a border of the window's padding that holds the zero point; or in phase planes for the window's stride.
        y: of ``ceil(channels / 4)`` lane-channels, or a map of floats of so many channels.
        weights: ``(channels, taps)``.
        ending: what becomes of their sums.
        grid: y's; None where it holds floats.
        target: what to compile for.

    Raises:
        AutopruneError: sums might not fit 31 bits.
    """
    f = bytes_window.Field
    channels, taps = weights.shape
    if LEVELS * int(np.abs(weights.astype(np.int64)).sum(axis=1).max(initial=0)) > _LARGEST_SUM:
        raise AutopruneError(f"{name}: sums of {taps} products might be larger than 31 bits hold.")
    given, chunks = _sliding(window_, x, y, 0 if grid is None else grid.zero_point, window_.taps())
    lane_channels, fours = lanes_of(channels), -(-taps // QUAD)
    by_four = np.zeros((QUAD * lane_channels, QUAD * fours), np.int8)
    by_four[:channels, :taps] = weights
    by_four = by_four.reshape(lane_channels, QUAD, fours, QUAD).transpose(0, 2, 1, 3)
    given |= {
        f.TAPS: taps // QUAD, f.CHANNELS: channels, f.WEIGHTS: np.ascontiguousarray(by_four).view(np.int32),
        f.FACTOR: _whole(ending.factor), f.BIAS: _whole(ending.bias), f.LOW: ending.low, f.HIGH: ending.high,
        f.Y_CHANNEL: y.layout.channel(1),
    }  # fmt: skip
    if target.signed:
        given[f.START] = starts_of(by_four.sum(axis=(1, 3), dtype=np.int64).ravel())
    if grid is None:
        given[f.Y_QUAD] = QUAD * y.layout.channel(1)
    if grid is not None and ending.activation:
        given |= {f.INVERSE: grid.inverse, f.OUTPUT_ZERO: float(grid.zero_point)}
    step = window_.stride[1] if x.layout.phases == 1 else 1
    kernel = bytes_depthwise.depthwise_bytes(step, taps % QUAD, grid is None, target, ending.activation)
    return op_of(name, kernel, f, given, batch * chunks)


def _whole(row: NDArray[np.float32]) -> NDArray[np.float32]:
    """With zeros up to whole lane-channels."""
    return np.pad(row, (0, -len(row) % QUAD))
