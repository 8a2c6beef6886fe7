"""Builds the native ops of a program: graph operation + places in memory -> kernel and fields."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoprune.errors import AutopruneError
from autoprune.model.recurrent.names import GATES
from autoprune.repack.kernels import (
    attention,
    copy,
    gather,
    maps,
    recurrent,
    rows,
    rows_gemm,
    strided,
    turn,
    window,
)
from autoprune.repack.kernels.compiler import Target
from autoprune.repack.kernels.math import clamp_bounds
from autoprune.repack.lowering.buffers import Buffer, float_bits
from autoprune.repack.lowering.layout import FLOAT_BYTES, MapLayout
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.native.op import NativeOp

CHUNK_FLOATS = 16384  # of a map that an item of an element-wise op works on


@dataclass(frozen=True)
class Window:
    """How a convolution or pooling slides: pairs (vertical, horizontal)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def taps(self) -> list[tuple[int, int]]:
        """What an output position (y, x) reads: (dy, dx) from input position (y * stride, x * stride)."""
        (kh, kw), (ph, pw), (dh, dw) = self.kernel, self.padding, self.dilation
        return [(y * dh - ph, x * dw - pw) for y in range(kh) for x in range(kw)]

    def outputs(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = self.kernel, self.stride, self.padding, self.dilation
        return (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1


@dataclass(frozen=True)
class Tiling:
    """How a convolution's or Linear's work is cut into items.

    Attributes:
        group_size: filters in a packed group; 0: as the weight is packed.
        block: positions (or tokens) an item.
        chunk: groups an item; 0: all.
        inputs_first: whether the items of one block follow each other, so that the input stays in the cache; else
            those of one chunk, so that the weights do.
        panel: inputs that a group is done with, at all positions of an item, before the next ones; 0: all at once.
        serpentine: whether every other group walks its kept positions backwards, so that it begins with what the one
            before it has just read.
        columns: whether a recurrent weight is walked by column, those of zero states left out; by group else.
    """

    group_size: int = 0
    block: int = 192
    chunk: int = 0
    inputs_first: bool = True
    panel: int = 0
    serpentine: bool = False
    columns: bool = False


@dataclass(frozen=True)
class MapAt:
    """A feature map in its buffer."""

    buffer: Buffer
    layout: MapLayout

    @property
    def offset(self) -> int:
        """Bytes from the slot's base to position (0, 0) of the first channel."""
        return self.buffer.offset + self.layout.origin * FLOAT_BYTES


Place = tuple[int, int, tuple[int, ...]]
"""Slot, bytes, and floats from an entry to the next along each axis."""


def _fields(kinds: type[IntEnum], given: Mapping[IntEnum, Any]) -> NDArray[np.int64]:
    """The array a kernel reads; arrays become their addresses."""
    values = np.zeros(max(kinds) + 1, np.int64)
    for field, value in given.items():
        values[field] = value.ctypes.data if isinstance(value, np.ndarray) else value
    return values


def op_of(name: str, kernel: int, kinds: type[IntEnum], given: Mapping[IntEnum, Any], items: int) -> NativeOp:
    arrays = tuple(value for value in given.values() if isinstance(value, np.ndarray))
    return NativeOp(name, kernel, _fields(kinds, given), items, arrays)


def clamped(activation: str | None) -> tuple[int, int, str]:
    """Bounds as float bits, and the activation that is no clamp."""
    bounds = clamp_bounds(activation or "")
    low, high = bounds if bounds is not None else (-np.inf, np.inf)
    return float_bits(low), float_bits(high), "" if bounds is not None else activation or ""


def linear(
    name: str, weights: Weights, activation: str | None, tiling: Tiling, tokens: int,
    x: tuple[int, int, int], y: tuple[int, int, int], residual: tuple[int, int, int] | None, target: Target,
) -> NativeOp:  # fmt: skip
    """A packed Linear; x, y and residual are (slot, bytes, floats from a token to the next)."""
    f = rows_gemm.Field
    packed = weights.packed
    low, high, other = clamped(activation)
    together = rows_gemm.tokens_together(packed.group_size, target)
    block = min(-(-tiling.block // together) * together, max(1, tokens))
    chunk = min(tiling.chunk or packed.groups, packed.groups)
    chunks = -(-packed.groups // chunk)
    given: dict[IntEnum, Any] = {
        f.X_SLOT: x[0], f.X_OFFSET: x[1], f.X_TOKEN: x[2], f.Y_SLOT: y[0], f.Y_OFFSET: y[1], f.Y_TOKEN: y[2],
        f.TOKENS: tokens, f.GROUP_POINTER: packed.group_pointer, f.INDEX: packed.index, f.VALUES: packed.values,
        f.BIAS: weights.bias_rows, f.OUT_INDEX: np.ascontiguousarray(packed.out_index), f.FIRST: weights.first,
        f.LOW: low, f.HIGH: high, f.GROUPS: packed.groups, f.CHUNK: chunk, f.CHUNKS: chunks, f.BLOCK: block,
    }  # fmt: skip
    if twins := _joins_twins(weights, target):
        given[f.TWIN] = weights.twin
    if residual is not None:
        given |= {
            f.RESIDUAL: 1, f.RESIDUAL_SLOT: residual[0], f.RESIDUAL_OFFSET: residual[1], f.RESIDUAL_TOKEN: residual[2],
        }  # fmt: skip
    kernel = rows_gemm.rows_gemm(packed.group_size, target, other, twins)
    return op_of(name, kernel, f, given, -(-tokens // block) * chunks)


def _joins_twins(weights: Weights, target: Target) -> bool:
    """Whether there are twins, in groups of a size that is computed two at a time."""
    return rows_gemm.joins_twins(weights.packed.group_size, target) and bool(weights.twin.any())


@dataclass(frozen=True)
class Sequences:
    """A recurrent op's geometry.

    Attributes:
        cell: ``lstm`` or ``gru``.
        steps: of a sequence.
        batch: sequences.
        hidden: entries of a state.
        units: those that are computed; all when None.
        time_first: whether steps are the first axis of projections and states.
        reverse: from the last step to the first.
        threshold: states smaller than it become 0.
        keep: the largest states of a step stay; 0: all.
    """

    cell: str
    steps: int
    batch: int
    hidden: int
    units: tuple[int, ...] | None
    time_first: bool
    reverse: bool
    threshold: float
    keep: int

    @property
    def computed(self) -> int:
        return self.hidden if self.units is None else len(self.units)

    @property
    def scratch(self) -> int:
        """Floats an entry of the batch needs."""
        return recurrent.scratch(self.cell, self.computed, self.hidden)

    @property
    def prune(self) -> str:
        """What the kernel is told about zero states."""
        return "threshold" if self.threshold > 0.0 else "top" if 0 < self.keep < self.computed else ""


def sequence(
    name: str, weights: Weights, tiling: Tiling, size: Sequences, x: tuple[int, int], y: tuple[int, int],
    before: tuple[tuple[int, int], ...], scratch: Buffer, target: Target,
) -> NativeOp:  # fmt: skip
    """One direction of a recurrent layer; x, y and the states before it, where there are any, are (slot, bytes)."""
    f, packed = recurrent.Field, weights.packed
    rows = GATES[size.cell] * size.computed
    of_entry = (1, size.batch) if size.time_first else (size.steps, 1)  # from an entry, and a step, to the next
    begin: list[tuple[int, Any, int]] = [(slot, offset, size.hidden) for slot, offset in before]
    nothing = np.zeros(size.hidden, np.float32)
    begin += [(0, nothing, 0)] * (2 - len(begin))
    units = np.arange(size.hidden) if size.units is None else np.array(size.units)
    block = max(1, -(-size.batch // max(1, min(size.batch, tiling.chunk))))
    given: dict[IntEnum, Any] = {
        f.X_SLOT: x[0], f.X_OFFSET: x[1], f.X_ENTRY: of_entry[0] * rows, f.X_STEP: of_entry[1] * rows,
        f.Y_SLOT: y[0], f.Y_OFFSET: y[1], f.Y_ENTRY: of_entry[0] * size.hidden, f.Y_STEP: of_entry[1] * size.hidden,
        f.Y_CELL: size.steps * size.batch * size.hidden, f.H_SLOT: begin[0][0], f.H_OFFSET: begin[0][1],
        f.H_ENTRY: begin[0][2], f.C_SLOT: begin[1][0], f.C_OFFSET: begin[1][1], f.C_ENTRY: begin[1][2],
        f.SCRATCH_SLOT: scratch.slot, f.SCRATCH_OFFSET: scratch.offset, f.SCRATCH: size.scratch, f.STEPS: size.steps,
        f.BATCH: size.batch, f.BLOCK: block, f.REVERSE: int(size.reverse), f.HIDDEN: size.hidden,
        f.UNITS: size.computed, f.UNIT_INDEX: units.astype(np.int32),
        f.OUT_INDEX: np.ascontiguousarray(packed.out_index), f.FIRST: weights.first, f.GROUPS: packed.groups,
        f.THRESHOLD: float_bits(size.threshold), f.KEEP: size.keep,
    }  # fmt: skip
    columns = weights.by_column if tiling.columns else None
    pointer, index, values = columns or (packed.group_pointer, packed.index, packed.values)
    given |= {f.GROUP_POINTER: pointer, f.INDEX: index, f.VALUES: values}
    given[f.BIAS] = weights.bias_rows if columns is None else weights.bias
    if twins := columns is None and _joins_twins(weights, target):
        given[f.TWIN] = weights.twin
    form = recurrent.Form(size.cell, packed.group_size, twins, columns is not None, size.prune)
    return op_of(name, recurrent.recurrent(form, target), f, given, -(-size.batch // block))


def sliding(
    name: str, mode: window.Mode, window_: Window, batch: int, x: MapAt, y: MapAt, target: Target, *,
    activation: str | None = None, weights: NDArray[np.float32] | None = None, bias: NDArray[np.float32] | None = None,
    count_padding: bool = True,
) -> NativeOp:  # fmt: skip
    """Depthwise convolution (weights (channels, taps), bias (channels,)) or pooling; x is padded."""
    f = window.Field
    (sh, sw), layout, out = window_.stride, x.layout, y.layout
    flat = (sh, sw) == (1, 1)  # then input and output have one pitch
    low, high, other = clamped(activation)
    chunk = max(1, min(out.channels, CHUNK_FLOATS // max(1, out.positions)))
    chunks = -(-out.channels // chunk)
    taps, columns = window_.taps(), tuple[int, ...]()
    if mode is not window.Mode.DEPTHWISE:
        columns = tuple(number * window_.dilation[1] for number in range(window_.kernel[1]))
        taps = taps[:: window_.kernel[1]]  # the first of each row
    offsets = np.array([layout.tap(dy, dx) for dy, dx in taps], np.int32)
    scale = _shares(window_, layout, out, count_padding) if mode is window.Mode.AVERAGE else np.zeros(1, np.float32)
    given: dict[IntEnum, Any] = {
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


def _shares(window_: Window, layout: MapLayout, out: MapLayout, count_padding: bool) -> NDArray[np.float32]:
    """One over the number of floats averaged, for every flat position of the output."""
    inside = np.zeros((out.height, out.width), np.float32)
    (sh, sw), (kh, kw) = window_.stride, window_.kernel
    y, x = np.arange(out.height)[:, None] * sh, np.arange(out.width)[None] * sw
    for dy, dx in window_.taps():
        inside += (y + dy >= 0) & (y + dy < layout.height) & (x + dx >= 0) & (x + dx < layout.width)
    shares = np.full_like(inside, 1 / (kh * kw)) if count_padding else 1 / inside
    padded = np.zeros((out.height, out.pitch), np.float32)
    padded[:, : out.width] = shares
    flat = np.zeros(len(out.mask()), np.float32)
    flat[: padded.size] = padded.ravel()[: len(flat)]
    return flat


def combine(
    name: str, batch: int, x: MapAt, other: MapAt | None, y: MapAt, activation: str | None, target: Target
) -> NativeOp:
    """The sum of two maps of one pitch, or one alone, through an activation."""
    f = maps.Field
    low, high, function = clamped(activation)
    given = _channelwise(x, y.layout.positions) | {
        f.Y_SLOT: y.buffer.slot, f.Y_OFFSET: y.offset, f.Y_IMAGE: y.layout.image, f.Y_CHANNEL: y.layout.channel(1),
        f.MASK: y.layout.mask(), f.LOW: low, f.HIGH: high, f.BORDER: y.layout.behind, f.BORDER_FIRST: y.layout.before,
    }  # fmt: skip
    if other is not None:
        given |= {
            f.OTHER_SLOT: other.buffer.slot, f.OTHER_OFFSET: other.offset, f.OTHER_IMAGE: other.layout.image,
            f.OTHER_CHANNEL: other.layout.channel(1),
        }  # fmt: skip
    how = maps.Combine.NONE if other is None else maps.Combine.ADD
    return op_of(name, maps.elementwise(how, target, function), f, given, batch * given[f.CHUNKS])


def _channelwise(x: MapAt, positions: int) -> dict[IntEnum, Any]:
    f = maps.Field
    channels = x.layout.channels
    chunk = max(1, min(channels, CHUNK_FLOATS // max(1, positions)))
    return {
        f.X_SLOT: x.buffer.slot, f.X_OFFSET: x.offset, f.X_IMAGE: x.layout.image, f.X_CHANNEL: x.layout.channel(1),
        f.POSITIONS: positions, f.CHANNELS: channels, f.CHUNK: chunk, f.CHUNKS: -(-channels // chunk),
    }  # fmt: skip


def mean(name: str, batch: int, x: MapAt, y: Buffer, target: Target) -> NativeOp:
    """The mean of each channel, to (N, C)."""
    f = maps.Field
    layout = x.layout
    given = _channelwise(x, layout.positions) | {
        f.Y_SLOT: y.slot, f.Y_OFFSET: y.offset, f.Y_IMAGE: layout.channels, f.Y_CHANNEL: 1, f.MASK: layout.mask(),
        f.SCALE: float_bits(1 / (layout.height * layout.width)),
    }  # fmt: skip
    return op_of(name, maps.channel_mean(target), f, given, batch * given[f.CHUNKS])


def copied(
    name: str, batch: int, x: Place, y: Place, size: tuple[int, int, int], layout: MapLayout | None,
    target: Target,
) -> NativeOp:  # fmt: skip
    """Another layout of a map of `size` (channels, height, width); `layout` is y's where y is a map."""
    f = copy.Field
    given: dict[IntEnum, Any] = dict(zip(f, (x[0], x[1], y[0], y[1], *size, *x[2][:3], *y[2][:3]), strict=False))
    if layout is None or layout.border != 0:
        return op_of(name, copy.copy_map(target), f, given, batch * size[0])
    given |= {f.STRIDE_H: layout.stride_h, f.Y_PLANE: layout.plane}
    if layout.phases > 1:
        given |= {f.PAD_H: layout.pad_h, f.PAD_W: layout.pad_w, f.ROWS: layout.rows}
    else:
        given |= {
            f.ROWS: layout.height, f.POSITIONS: layout.positions, f.BORDER: layout.behind,
            f.BORDER_FIRST: layout.before,
        }  # fmt: skip
    return op_of(name, copy.planes(layout.stride_w, target), f, given, batch * size[0])


def into_planes(name: str, tokens: int, x: tuple[int, int, int], y: MapAt, target: Target) -> NativeOp:
    """Rows of tokens as a map with a channel a feature; x is (slot, bytes, floats from a token to the next)."""
    f, features = turn.Field, y.layout.channels
    given: dict[IntEnum, Any] = {
        f.ROWS_SLOT: x[0], f.ROWS_OFFSET: x[1], f.ROWS_TOKEN: x[2], f.PLANES_SLOT: y.buffer.slot,
        f.PLANES_OFFSET: y.offset, f.PLANES_FEATURE: y.layout.channel(1), f.TOKENS: tokens, f.FEATURES: features,
    }  # fmt: skip
    return op_of(name, turn.into_planes(target), f, given, -(-tokens // target.lanes))


def out_of_planes(
    name: str, tokens: int, x: MapAt, y: tuple[int, int, int], residual: tuple[int, int, int] | None,
    activation: str | None, target: Target,
) -> NativeOp:  # fmt: skip
    """A map with a channel a feature as rows of tokens; y and residual are (slot, bytes, floats to the next token)."""
    f = turn.Field
    low, high, other = clamped(activation)
    given: dict[IntEnum, Any] = {
        f.ROWS_SLOT: y[0], f.ROWS_OFFSET: y[1], f.ROWS_TOKEN: y[2], f.PLANES_SLOT: x.buffer.slot,
        f.PLANES_OFFSET: x.offset, f.PLANES_FEATURE: x.layout.channel(1), f.TOKENS: tokens,
        f.FEATURES: x.layout.channels, f.LOW: low, f.HIGH: high,
    }  # fmt: skip
    if residual is not None:
        given |= {
            f.RESIDUAL: 1, f.RESIDUAL_SLOT: residual[0], f.RESIDUAL_OFFSET: residual[1], f.RESIDUAL_TOKEN: residual[2],
        }  # fmt: skip
    return op_of(name, turn.out_of_planes(target, other), f, given, -(-tokens // target.lanes))


def layer_norm(
    name: str, x: tuple[int, int], y: tuple[int, int], tokens: int, weight: NDArray[np.float32],
    bias: NDArray[np.float32], epsilon: float, target: Target,
) -> NativeOp:  # fmt: skip
    """Each row of (tokens, features) normalised; x and y are (slot, bytes)."""
    f = rows.Field
    features = len(weight)
    block = max(1, min(tokens, CHUNK_FLOATS // (4 * features)))
    given: dict[IntEnum, Any] = {
        f.X_SLOT: x[0], f.X_OFFSET: x[1], f.Y_SLOT: y[0], f.Y_OFFSET: y[1], f.ROWS: tokens, f.FEATURES: features,
        f.BLOCK: block, f.WEIGHT: weight, f.BIAS: bias, f.EPSILON: float_bits(epsilon),
        f.SHARE: float_bits(1 / features),
    }  # fmt: skip
    return op_of(name, rows.layer_norm(target), f, given, -(-tokens // block))


def attend(
    name: str, q: Place, k: Place, v: Place, y: Place, scratch: Buffer, size: tuple[int, int, int, int, int],
    scale: float, target: Target,
) -> NativeOp:  # fmt: skip
    """Attention; `size` is batch, heads, queries, keys and the width of a head."""
    f = attention.Field
    batch, heads, queries, keys, width = size
    places = [number for slot, offset, strides in (q, k, v, y) for number in (slot, offset, *strides[:3])]
    given: dict[IntEnum, Any] = dict(zip(f, places, strict=False))
    given |= {
        f.SCRATCH_SLOT: scratch.slot, f.SCRATCH_OFFSET: scratch.offset,
        f.SCRATCH: attention.scratch(keys, width, target), f.HEADS: heads, f.QUERIES: queries, f.KEYS: keys,
        f.WIDTH: width, f.SCALE: float_bits(scale),
    }  # fmt: skip
    return op_of(name, attention.attention(target), f, given, batch * heads)


def pointwise(
    name: str, shape: tuple[int, ...], x: Place, other: Place | None, y: Place, operation: str, activation: str | None,
    target: Target,
) -> NativeOp:  # fmt: skip
    """One value, or two combined, written in rows; strides of 0 repeat a value."""
    f = strided.Field
    places = [place for place in (x, other, y) if place is not None]
    sizes, strides = merged_axes(shape, [place[2] for place in places])
    if len(sizes) > strided.AXES:
        raise AutopruneError(f"{name!r} of shape {shape} has more than {strided.AXES} axes that lie apart.")
    slots = (f.X_SLOT, f.OTHER_SLOT, f.Y_SLOT) if other else (f.X_SLOT, f.Y_SLOT)
    given: dict[IntEnum, Any] = {f(f.SIZE + axis): size for axis, size in enumerate(sizes)}
    for slot, place, steps in zip(slots, places, strides, strict=True):
        given |= {f(slot + index): number for index, number in enumerate((*place[:2], *steps))}
    rows = math.prod(sizes[:-1])
    block = max(1, min(rows, CHUNK_FLOATS // (4 * max(1, sizes[-1]))))
    low, high, function = clamped(activation)
    given |= {f.BLOCK: block, f.LOW: low, f.HIGH: high}
    lie = [strided.Along.RUN if steps[-1] == 1 else strided.Along.APART if steps[-1] else strided.Along.SAME
           for steps in strides[:-1]]  # fmt: skip
    kernel = strided.strided(lie[0], lie[1] if other else None, operation, function, target)
    return op_of(name, kernel, f, given, -(-rows // block) if sizes[-1] else 0)


def taken(
    name: str, x: Place, index: Place, y: Place, size: tuple[int, int, int], checked: tuple[int, int, int] | None,
    target: Target,
) -> NativeOp:  # fmt: skip
    """Rows by their int64 numbers, batch entry by batch entry.

    Args:
        name: of what is computed.
        x: strides are from a batch entry to the next and from a row to the next.
        index: likewise.
        y: contiguous.
        size: batch entries, rows taken of each, features.
        checked: slot and bytes of the int64 that tells of a number which is no row's, and how many rows x has for each
            batch entry; None where the numbers are known to be right.
        target: what to compile for.
    """
    f = gather.Field
    batch, rows, features = size
    block = max(1, min(batch * rows, CHUNK_FLOATS // (4 * max(1, features))))
    given: dict[IntEnum, Any] = {
        f.X_SLOT: x[0], f.X_OFFSET: x[1], f.X_BATCH: x[2][0], f.X_ROW: x[2][1], f.INDEX_SLOT: index[0],
        f.INDEX_OFFSET: index[1], f.INDEX_BATCH: index[2][0], f.INDEX_ROW: index[2][1], f.Y_SLOT: y[0],
        f.Y_OFFSET: y[1], f.BATCH: batch, f.ROWS: rows, f.FEATURES: features, f.BLOCK: block,
    }  # fmt: skip
    if checked is not None:
        given |= dict(zip((f.WRONG_SLOT, f.WRONG_OFFSET, f.LIMIT), checked, strict=True))
    return op_of(name, gather.gather(checked is not None, target), f, given, -(-batch * rows // block))


def merged_axes(
    shape: tuple[int, ...], strides: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The same entries in as few axes as can be, at least `strided.AXES`, the last of stride 1 in the last operand."""
    sizes, steps = list[int](), [list[int]() for _ in strides]
    for size, *apart in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if sizes and all(each[-1] == step * size for each, step in zip(steps, apart, strict=True)):
            sizes[-1] *= size
            for each, step in zip(steps, apart, strict=True):
                each[-1] = step
        else:
            sizes.append(size)
            for each, step in zip(steps, apart, strict=True):
                each.append(step)
    if not sizes or steps[-1][-1] != 1:
        sizes.append(1)
        for each in steps:
            each.append(1)
    missing = strided.AXES - len(sizes)
    return (1,) * missing + tuple(sizes), [(0,) * missing + tuple(each) for each in steps]
