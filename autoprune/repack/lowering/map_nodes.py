"""Builds the ops on feature maps that hold no packed weight: sliding windows, sums, means, copies."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoprune.repack.kernels import copy, maps, resample, window
from autoprune.repack.kernels import group_norm as norms
from autoprune.repack.kernels.compiler import Target
from autoprune.repack.kernels.fields import Given
from autoprune.repack.kernels.math import clamped
from autoprune.repack.lowering.buffers import Buffer, MapAt, StridedRef
from autoprune.repack.lowering.geometry import CHUNK_FLOATS, Window
from autoprune.repack.lowering.layout import MapLayout, aligned
from autoprune.repack.native.op import NativeOp, op_of


def sliding(
    name: str, mode: window.Mode, window_: Window, batch: int, x: MapAt, y: MapAt, target: Target, *,
    activation: str | None = None, weights: NDArray[np.float32] | None = None, bias: NDArray[np.float32] | None = None,
    counted: Counted | None = None,
) -> NativeOp:  # fmt: skip
    """Depthwise convolution or pooling of a map.

    Args:
        name: of what is computed.
        mode: which of them.
        window_: how it slides.
        batch: images.
        x: with a border of the window's padding.
        y: of x's channels.
        target: what to compile for.
        activation: a name, see `kernels.math`.
        weights: ``(channels, taps)``; depthwise alone.
        bias: ``(channels,)``; depthwise alone.
        counted: what a sum is divided by; average alone.
    """
    f = window.Field
    (sh, sw), layout, out = window_.stride, x.layout, y.layout
    flat = (sh, sw) == (1, 1)  # then input and output have one pitch
    low, high, other = clamped(activation)
    chunk, chunks = chunked(out.channels, out.positions)
    layout.check_windows(out, window_.stride, window_.taps())
    taps, columns = window_.taps(), tuple[int, ...]()
    if mode is not window.Mode.DEPTHWISE:
        columns = tuple(number * window_.dilation[1] for number in range(window_.kernel[1]))
        taps = taps[:: window_.kernel[1]]  # the first of each row
    offsets = np.array([layout.tap(dy, dx) for dy, dx in taps], np.int32)
    scale = np.zeros(1, np.float32) if counted is None else shares(window_, layout, out, counted)
    given: dict[window.Field, Given] = {
        f.X_SLOT: x.buffer.slot, f.X_OFFSET: x.offset, f.Y_SLOT: y.buffer.slot, f.Y_OFFSET: y.offset,
        f.X_IMAGE: layout.image, f.Y_IMAGE: out.image, f.X_CHANNEL: layout.channel(1), f.Y_CHANNEL: out.channel(1),
        f.X_ROW: sh * layout.pitch, f.Y_ROW: out.pitch, f.ROWS: 1 if flat else out.height,
        f.COLUMNS: out.positions if flat else out.pitch, f.CHANNELS: out.channels, f.CHUNK: chunk, f.CHUNKS: chunks,
        f.TAPS: len(offsets), f.OFFSETS: offsets, f.SCALE: scale, f.MASK: out.mask(), f.LOW: low, f.HIGH: high,
        f.POSITIONS: out.positions, f.BORDER: out.behind, f.BORDER_FIRST: out.before,
    }  # fmt: skip
    if weights is not None and bias is not None:
        given |= {f.WEIGHTS: weights, f.BIAS: bias}
    return op_of(name, window.window(mode, sw, target, other, columns), f, given, batch * chunks)


class Counted(NamedTuple):
    """What an average divides by.

    Attributes:
        padding: whether the border of the window's padding counts; what lies beyond it never does.
        divisor: this number instead.
    """

    padding: bool
    divisor: int | None


def shares(window_: Window, layout: MapLayout, out: MapLayout, counted: Counted) -> NDArray[np.float32]:
    """One over the number of floats averaged, for every flat position of the output."""

    def inside(size: int, outputs: int, step: int, pad: int, kernel: int) -> NDArray[np.int64]:
        first, border = np.arange(outputs) * step - pad, pad if counted.padding else 0
        return np.minimum(first + kernel, size + border) - np.maximum(first, -border)

    sizes, outputs = (layout.height, layout.width), (out.height, out.width)
    rows, columns = map(inside, sizes, outputs, window_.stride, window_.padding, window_.kernel)
    floats = np.outer(rows, columns) if counted.divisor is None else np.full(outputs, counted.divisor)
    padded = np.zeros((out.height, out.pitch), np.float32)
    padded[:, : out.width] = 1 / floats
    flat = np.zeros(len(out.mask()), np.float32)
    flat[: padded.size] = padded.ravel()[: len(flat)]
    return flat


def combine(
    name: str, batch: int, x: MapAt, other: MapAt | None, y: MapAt, activation: str | None, target: Target
) -> NativeOp:
    """The sum of two maps of `batch` images and one pitch, or one map alone, through an activation."""
    f = maps.Field
    low, high, function = clamped(activation)
    chunk, chunks = chunked(x.layout.channels, y.layout.positions)
    given: dict[maps.Field, Given] = {
        f.X_SLOT: x.buffer.slot, f.X_OFFSET: x.offset, f.X_IMAGE: x.layout.image, f.X_CHANNEL: x.layout.channel(1),
        f.Y_SLOT: y.buffer.slot, f.Y_OFFSET: y.offset, f.Y_IMAGE: y.layout.image, f.Y_CHANNEL: y.layout.channel(1),
        f.POSITIONS: y.layout.positions, f.CHANNELS: x.layout.channels, f.CHUNK: chunk, f.CHUNKS: chunks,
        f.MASK: y.layout.mask(), f.LOW: low, f.HIGH: high, f.BORDER: y.layout.behind, f.BORDER_FIRST: y.layout.before,
    }  # fmt: skip
    if other is not None:
        given |= {
            f.OTHER_SLOT: other.buffer.slot, f.OTHER_OFFSET: other.offset, f.OTHER_IMAGE: other.layout.image,
            f.OTHER_CHANNEL: other.layout.channel(1),
        }  # fmt: skip
    how = maps.Combine.NONE if other is None else maps.Combine.ADD
    return op_of(name, maps.elementwise(how, target, function), f, given, batch * chunks)


def mean(name: str, batch: int, x: MapAt, y: StridedRef, target: Target) -> NativeOp:
    """The mean of each channel of `batch` images; y is (batch, channels)."""
    f = maps.Field
    layout = x.layout
    chunk, chunks = chunked(layout.channels, layout.positions)
    given: dict[maps.Field, Given] = {
        f.X_SLOT: x.buffer.slot, f.X_OFFSET: x.offset, f.X_IMAGE: layout.image, f.X_CHANNEL: layout.channel(1),
        f.Y_SLOT: y.slot, f.Y_OFFSET: y.offset_bytes, f.Y_IMAGE: y.strides[0], f.Y_CHANNEL: y.strides[1],
        f.POSITIONS: layout.positions, f.CHANNELS: layout.channels, f.CHUNK: chunk, f.CHUNKS: chunks,
        f.MASK: layout.mask(), f.SCALE: 1 / (layout.height * layout.width),
    }  # fmt: skip
    return op_of(name, maps.channel_mean(target), f, given, batch * chunks)


def group_norm(
    name: str, batch: int, x: MapAt, y: MapAt, groups: int, weight: NDArray[np.float32], bias: NDArray[np.float32],
    epsilon: float, target: Target,
) -> NativeOp:  # fmt: skip
    """Each group of channels of `batch` images normalised; the maps have one pitch, weight and bias are (channels,)."""
    f = norms.Field
    layout, out = x.layout, y.layout
    channels = layout.channels // groups
    given: dict[norms.Field, Given] = {
        f.X_SLOT: x.buffer.slot, f.X_OFFSET: x.offset, f.X_IMAGE: layout.image, f.X_CHANNEL: layout.channel(1),
        f.Y_SLOT: y.buffer.slot, f.Y_OFFSET: y.offset, f.Y_IMAGE: out.image, f.Y_CHANNEL: out.channel(1),
        f.GROUPS: groups, f.CHANNELS: channels, f.POSITIONS: out.positions, f.MASK: out.mask(), f.WEIGHT: weight,
        f.BIAS: bias, f.EPSILON: epsilon, f.SHARE: 1 / (channels * layout.height * layout.width),
        f.BORDER: out.behind, f.BORDER_FIRST: out.before,
    }  # fmt: skip
    return op_of(name, norms.group_norm(target), f, given, batch * groups)


class Taps(NamedTuple):
    """What becomes one along an axis: both are ``(outputs, taps)``."""

    inputs: NDArray[np.int32]
    weight: NDArray[np.float32]


def resampled(
    name: str, batch: int, x: MapAt, y: MapAt, rows: Taps, columns: Taps, scratch: Buffer, room: int, target: Target,
    largest: bool = False,
) -> NativeOp:  # fmt: skip
    """A map whose rows and columns are sums of some of x's, or the `largest` of them.

    Args:
        name: of what is computed.
        batch: images.
        x: the map that is read.
        y: of x's channels.
        rows: which rows of x become a row of y.
        columns: likewise.
        scratch: where each thread works.
        room: floats of it for each thread, a row of x and more.
        target: what to compile for.
        largest: whether weights do not count.
    """
    f = resample.Field
    layout, out = x.layout, y.layout
    wide = aligned(out.pitch)
    index, weight = np.zeros((columns.inputs.shape[1], wide), np.int32), np.zeros(
        (columns.inputs.shape[1], wide), np.float32
    )  # fmt: skip
    index[:, : out.width], weight[:, : out.width] = columns.inputs.T, columns.weight.T
    mask = -(np.arange(wide) < out.width).astype(np.int32)
    given: dict[resample.Field, Given] = {
        f.X_SLOT: x.buffer.slot, f.X_OFFSET: x.offset, f.X_IMAGE: layout.image, f.X_CHANNEL: layout.channel(1),
        f.X_ROW: layout.pitch, f.X_WIDTH: layout.width, f.Y_SLOT: y.buffer.slot, f.Y_OFFSET: y.offset,
        f.Y_IMAGE: out.image, f.Y_CHANNEL: out.channel(1), f.Y_ROW: out.pitch, f.CHANNELS: out.channels,
        f.ROWS: out.height, f.COLUMNS: wide, f.ROW_TAPS: rows.inputs.shape[1], f.ROW_INDEX: rows.inputs,
        f.ROW_WEIGHT: rows.weight, f.COLUMN_TAPS: len(index), f.COLUMN_INDEX: index, f.COLUMN_WEIGHT: weight,
        f.MASK: mask, f.SCRATCH_SLOT: scratch.slot, f.SCRATCH_OFFSET: scratch.offset, f.SCRATCH: room,
        f.POSITIONS: out.positions, f.BORDER: out.behind, f.BORDER_FIRST: out.before,
    }  # fmt: skip
    return op_of(name, resample.resample(target, largest), f, given, batch * out.channels)


def chunked(channels: int, positions: int) -> tuple[int, int]:
    """Channels an item of an element-wise op, and how many such chunks an image has."""
    chunk = max(1, min(channels, CHUNK_FLOATS // max(1, positions)))
    return chunk, -(-channels // chunk)


def copied(
    name: str, shape: tuple[int, int, int, int], x: StridedRef, y: StridedRef, layout: MapLayout | None,
    target: Target, rounds: bool = False,
) -> NativeOp:  # fmt: skip
    """A value in another layout.

    Args:
        name: of the value.
        shape: ``(N, C, H, W)``.
        x: strided as `shape`; the floats of a row are neighbours.
        y: likewise; of phase planes, the first one's.
        layout: of y; None where it is no map.
        target: what to compile for.
        rounds: whether to bfloat16 numbers; y is a map with a border of zeros then.
    """
    f = copy.Field
    batch, channels, height, width = shape
    given = _between(x, y) | {f.CHANNELS: channels, f.HEIGHT: height, f.WIDTH: width}
    if layout is None or layout.border != 0:
        return op_of(name, copy.copy_map(target), f, given, batch * channels)
    given |= {f.STRIDE_H: layout.stride_h, f.Y_PLANE: layout.plane}
    if layout.phases > 1:  # the rows and columns of the border are part of the planes
        given |= {
            f.PAD_H: layout.pad_h, f.PAD_W: layout.pad_w, f.ROWS: layout.rows, f.POSITIONS: 0, f.BORDER: 0,
            f.BORDER_FIRST: 0,
        }  # fmt: skip
    else:
        given |= {
            f.PAD_H: 0, f.PAD_W: 0, f.ROWS: layout.height, f.POSITIONS: layout.positions, f.BORDER: layout.behind,
            f.BORDER_FIRST: layout.before,
        }  # fmt: skip
    return op_of(name, copy.planes(layout.stride_w, target, rounds), f, given, batch * channels)


def _between(x: StridedRef, y: StridedRef) -> dict[copy.Field, Given]:
    """Where a copy reads and writes."""
    f = copy.Field
    (x_image, x_channel, x_row), (y_image, y_channel, y_row) = x.strides[:3], y.strides[:3]
    return {
        f.X_SLOT: x.slot, f.X_OFFSET: x.offset_bytes, f.Y_SLOT: y.slot, f.Y_OFFSET: y.offset_bytes,
        f.X_IMAGE: x_image, f.X_CHANNEL: x_channel, f.X_ROW: x_row, f.Y_IMAGE: y_image, f.Y_CHANNEL: y_channel,
        f.Y_ROW: y_row,
    }  # fmt: skip


def padded(name: str, batch: int, x: MapAt, y: MapAt, corner: tuple[int, int], target: Target) -> NativeOp:
    """Maps of `batch` images between zeros: x's position (0, 0) lies at `corner` of y, where there is one."""
    f = copy.Field
    layout, out = x.layout, y.layout
    given = _between(x.ref(), y.ref()) | {
        f.CHANNELS: out.channels, f.HEIGHT: layout.height, f.WIDTH: layout.width, f.STRIDE_H: 1, f.PAD_H: corner[0],
        f.PAD_W: corner[1], f.ROWS: out.height, f.Y_PLANE: 0, f.POSITIONS: out.positions, f.BORDER: out.behind,
        f.BORDER_FIRST: out.before,
    }  # fmt: skip
    return op_of(name, copy.planes(1, target), f, given, batch * out.channels)
