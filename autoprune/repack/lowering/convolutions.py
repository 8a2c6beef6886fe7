"""Builds the native ops of convolutions: packed ones, gated ones, and the gates themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autoprune.errors import AutopruneError
from autoprune.repack.kernels import gate as gates
from autoprune.repack.kernels import gated_gemm, offset_gemm
from autoprune.repack.kernels.compiler import Target
from autoprune.repack.kernels.fields import Given
from autoprune.repack.kernels.math import clamped
from autoprune.repack.lowering.buffers import Buffer, MapAt, StridedRef
from autoprune.repack.lowering.geometry import Tiling, Window
from autoprune.repack.lowering.layout import ALIGN, MapLayout, aligned
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.native.op import NativeOp, op_of
from autoprune.repack.weights.grouping import GROUP_SIZES
from autoprune.repack.weights.packed import PackedWeight
from autoprune.repack.weights.pairs import paired

PANEL_BLOCK = 384  # the most positions an item has with panels: their sums must stay in the nearest cache
RUN = 32  # kept positions of one column that are walked before the next column's, about


@dataclass(frozen=True)
class Factors:
    """A gate's output, ``(batch, groups)``: one factor a group of neighbouring channels.

    Attributes:
        offset: bytes from the slot's base.
        channels: of a group.
    """

    buffer: Buffer
    offset: int
    groups: int
    channels: int


@dataclass(frozen=True)
class Gated:
    """What a gated convolution knows of its channels.

    Attributes:
        gate: of its output.
        live: of its input.
        dead: what becomes of output channels that do not live.
        room: floats of scratch a thread has.
    """

    gate: Factors | None
    live: Factors | None
    dead: gated_gemm.Dead
    room: int


def convolution(
    name: str, weights: Weights, window_: Window, activation: str | None, tiling: Tiling, batch: int,
    x: MapAt, y: MapAt, residual: MapAt | None, scratch: Buffer, target: Target, gated: Gated | None = None,
) -> NativeOp:  # fmt: skip
    """A packed convolution.

    Args:
        name: of what is computed.
        weights: of the layer.
        window_: how it slides.
        activation: a name, see `kernels.math`.
        tiling: how the work is cut.
        batch: images.
        x: with a border of the window's padding, or in phase planes for its stride.
        y: of x's pitch.
        residual: added before the activation, of y's shape and pitch; None for none.
        scratch: `panel_scratch` floats for each thread, or `gated.room` where it is gated.
        target: what to compile for.
        gated: where channels are gated.
    """
    f = offset_gemm.Field
    if gated is not None:
        tiling = replace(tiling, panel=0)  # a list of live positions is walked at once
    packed = serpentine(weights.packed) if tiling.serpentine else weights.packed
    taps = np.array([x.layout.tap(dy, dx) for dy, dx in window_.taps()], np.int64)
    channel, tap = np.divmod(packed.index, packed.taps)
    offsets = (channel.astype(np.int64) * x.layout.channel(1) + taps[tap]).astype(np.int32)
    low, high, other = clamped(activation)
    most = PANEL_BLOCK if tiling.panel else None
    work, items = tiling.cut(y.layout.positions, packed.groups, batch, target.lanes, most)
    mask, y_channel = y.layout.mask(), _channels(weights, y.layout)
    given: dict[offset_gemm.Field, Given] = {
        f.X_SLOT: x.buffer.slot, f.X_OFFSET: x.offset, f.Y_SLOT: y.buffer.slot, f.Y_OFFSET: y.offset,
        f.X_IMAGE: x.layout.image, f.Y_IMAGE: y.layout.image, f.MASK: mask, f.BIAS: weights.bias_rows,
        f.Y_CHANNEL: y_channel, f.RESIDUAL_CHANNEL: y_channel, f.LOW: low, f.HIGH: high,
        f.BORDER: y.layout.behind, f.BORDER_FIRST: y.layout.before,
        **{f[key]: number for key, number in work.items()},
    }  # fmt: skip
    masks = _columns(window_, x.layout, y.layout.width, len(mask))
    given |= _lists(weights, packed, offsets, tiling, masks, scratch)
    if residual is not None:
        given |= {
            f.RESIDUAL_SLOT: residual.buffer.slot, f.RESIDUAL_OFFSET: residual.offset,
            f.RESIDUAL_IMAGE: residual.layout.image, f.RESIDUAL_CHANNEL: _channels(weights, residual.layout),
        }  # fmt: skip
    if gated is not None:
        fields = gated_gemm.Field.shared(given) | _gated(weights, packed, offsets, gated, scratch)
        kernel = gated_gemm.gated_gemm(packed.group_size, target, other)
        return op_of(name, kernel, gated_gemm.Field, fields, items)
    kernel = offset_gemm.offset_gemm(packed.group_size, target, other, masks is not None, packed.in_bf16)
    return op_of(name, kernel, f, given, items)


@dataclass(frozen=True)
class _Columns:
    """Columns of a kernel that are read through masks.

    Attributes:
        of_tap: the mask of each tap.
        inside: ``(masks, positions)``.
    """

    of_tap: NDArray[np.int64]
    inside: NDArray[np.int32]


def _columns(window_: Window, layout: MapLayout, width: int, count: int) -> _Columns | None:
    """What is inside the map by column of the kernel, for `count` positions; None where the map has a border."""
    if layout.pad_w >= window_.padding[1]:
        return None
    number_of: dict[int, int] = {}
    of_tap = [number_of.setdefault(dx, len(number_of)) for _, dx in window_.taps()]
    inside = np.array([layout.inside(width, dx, count) for dx in number_of])
    return _Columns(np.array(of_tap, np.int64), inside)


def _lists(
    weights: Weights, packed: PackedWeight, offsets: NDArray[np.int32], tiling: Tiling, masks: _Columns | None,
    scratch: Buffer,
) -> dict[offset_gemm.Field, Given]:  # fmt: skip
    """The kept positions: a list for each group, or group and panel; in runs of one mask where there are masks."""
    f = offset_gemm.Field
    if not tiling.panel and masks is None and not packed.in_bf16:
        return {f.GROUP_POINTER: packed.group_pointer, f.OFFSETS: offsets, f.VALUES: packed.values, f.PANELS: 1}
    key = (tiling.panel, tiling.serpentine, None if masks is None else tuple(masks.of_tap.tolist()))
    order, alike = weights.ordered(key, lambda: _ordered(packed, tiling, masks))
    given: dict[offset_gemm.Field, Given] = {**alike, f.OFFSETS: np.ascontiguousarray(offsets[order])}
    if masks is not None:
        given |= {f.INSIDE: np.ascontiguousarray(masks.inside), f.INSIDE_LENGTH: masks.inside.shape[1]}
    if alike[f.PANELS] != 1:
        given |= {
            f.SCRATCH_SLOT: scratch.slot, f.SCRATCH_OFFSET: scratch.offset, f.SCRATCH: panel_scratch(packed.group_size),
        }  # fmt: skip
    return given


def _ordered(
    packed: PackedWeight, tiling: Tiling, masks: _Columns | None
) -> tuple[NDArray[np.int64], dict[offset_gemm.Field, Given]]:
    """The order of the kept positions in such lists, and the fields that are alike for inputs of every shape.

    Of bfloat16 numbers the lists are of pairs, each two positions of the order.
    """
    f = offset_gemm.Field
    group = np.repeat(np.arange(packed.groups), np.diff(packed.group_pointer))
    _, number = np.unique(packed.index, return_inverse=True)
    inputs = int(number.max(initial=-1)) + 1
    panels = (-(-inputs // tiling.panel) or 1) if tiling.panel else 1
    panel = number // tiling.panel if tiling.panel else np.zeros_like(number)
    backwards = (group % 2 == 1) & tiling.serpentine
    lists = group * panels + np.where(backwards, panels - 1 - panel, panel)
    runs, run = 1, np.zeros_like(number)
    given: dict[offset_gemm.Field, Given] = {f.PANELS: panels}
    if masks is not None:
        columns = len(masks.inside)
        parts = max(1, round(len(packed.index) / (packed.groups * panels * columns * RUN)))
        part = number * parts // max(1, inputs) if not tiling.panel else number % tiling.panel * parts // tiling.panel
        runs = parts * columns
        run = np.where(backwards, parts - 1 - part, part) * columns + masks.of_tap[packed.index % packed.taps]
        given |= {f.RUNS: runs, f.COLUMNS: columns}
    order = np.argsort(lists * runs + run, kind="stable")
    counts = np.bincount(lists * runs + run, minlength=packed.groups * panels * runs).reshape(-1, runs)
    if packed.in_bf16:
        pairs = paired(counts)
        values = pairs.values(packed.halves[order]).view(np.float32)
        order, counts = order[pairs.places].ravel(), pairs.counts
    else:
        values = np.ascontiguousarray(packed.values[order])
    ends = counts.cumsum(axis=1)
    if masks is not None:
        given[f.ENDS] = np.ascontiguousarray(ends, np.int32)
    given |= {
        f.GROUP_POINTER: np.concatenate([[0], ends[:, -1].cumsum()]).astype(np.int32),
        f.VALUES: values,
    }
    return order, given


def _gated(
    weights: Weights, packed: PackedWeight, offsets: NDArray[np.int32], gated: Gated, scratch: Buffer
) -> dict[gated_gemm.Field, Given]:
    """Which factor belongs to each row and to each kept position, and where the factors lie."""
    f = gated_gemm.Field
    kept = np.diff(packed.group_pointer)
    longest = int(kept.max(initial=0))
    if gated_gemm.scratch(longest) > gated.room:
        raise AutopruneError(f"a packed group keeps {longest} positions, more than there is room for.")
    alike = packed.index.reshape(packed.groups, -1) if len(set(kept.tolist())) == 1 else None
    within = np.arange(len(packed.index)) - np.repeat(packed.group_pointer[:-1].astype(np.int64), kept)
    entries = (within * packed.group_size << 32) + (offsets.astype(np.int64) & 0xFFFFFFFF)
    given: dict[gated_gemm.Field, Given] = {
        f.SCRATCH_SLOT: scratch.slot, f.SCRATCH_OFFSET: scratch.offset, f.SCRATCH: gated.room,
        f.DEAD: gated.dead,
        f.SHARED: int(alike is not None and bool((alike == alike[:1]).all())),
    }  # fmt: skip
    if (gate := gated.gate) is not None:
        of = (weights.rows // gate.channels).astype(np.int32)
        given |= {
            f.GATE_SLOT: gate.buffer.slot, f.GATE_OFFSET: gate.buffer.offset + gate.offset, f.GATE_IMAGE: gate.groups,
            f.GATE_OF: of,
        }  # fmt: skip
    else:
        given |= {
            f.GATE_SLOT: 0, f.GATE_OFFSET: np.ones(1, np.float32), f.GATE_IMAGE: 0,
            f.GATE_OF: np.zeros(len(weights.rows), np.int32),
        }  # fmt: skip
    if (live := gated.live) is not None:
        runs = np.repeat(np.arange(packed.groups) * live.groups, kept) + packed.index // packed.taps // live.channels
        order = np.argsort(runs, kind="stable")
        ends = np.cumsum(np.bincount(runs, minlength=packed.groups * live.groups))
        given |= {
            f.LIVE_SLOT: live.buffer.slot, f.LIVE_OFFSET: live.buffer.offset + live.offset,
            f.LIVE_IMAGE: live.groups, f.LIVE_RUNS: np.concatenate([[0], ends]).astype(np.int32),
        }  # fmt: skip
        entries = entries[order]
    given[f.ENTRIES] = np.concatenate([entries, np.zeros(gated_gemm.SLACK, np.int64)])
    return given


def gate(
    name: str, batch: int, x: MapAt, y: StridedRef, scratch: Buffer, arrays: Sequence[NDArray[np.float32]], keep: int,
    target: Target,
) -> NativeOp:  # fmt: skip
    """The gate of a convolution.

    Args:
        name: of what is computed.
        batch: images.
        x: the convolution's input.
        y: ``(batch, groups)``, contiguous: one factor a group of neighbouring channels of the output.
        scratch: `gates.scratch` floats for each thread.
        arrays: weight ``(groups, channels)``, bias ``(groups,)``, threshold ``(1,)``.
        keep: how many of the largest factors stay; 0: all.
        target: what to compile for.
    """
    f, (weight, bias, threshold) = gates.Field, arrays
    groups, channels = weight.shape
    padded = np.zeros((groups, gates.columns(channels)), np.float32)
    padded[:, :channels] = weight
    layout = x.layout
    given: dict[gates.Field, Given] = {
        f.X_SLOT: x.buffer.slot, f.X_OFFSET: x.offset, f.X_IMAGE: layout.image, f.X_CHANNEL: layout.channel(1),
        f.Y_SLOT: y.slot, f.Y_OFFSET: y.offset_bytes, f.SCRATCH_SLOT: scratch.slot, f.SCRATCH_OFFSET: scratch.offset,
        f.SCRATCH: gates.scratch(channels, groups), f.POSITIONS: layout.positions, f.CHANNELS: channels,
        f.MASK: layout.mask(), f.WEIGHT: padded, f.COLUMNS: padded.shape[1], f.BIAS: np.ascontiguousarray(bias),
        f.SCALE: 1 / (layout.height * layout.width), f.GROUPS: groups,
        f.THRESHOLD: float(threshold[0]), f.KEEP: keep or groups,
    }  # fmt: skip
    return op_of(name, gates.gate(target), f, given, batch)


def serpentine(packed: PackedWeight) -> PackedWeight:
    """The same weight, every other group's kept positions in the opposite order."""
    index, values = packed.index.copy(), packed.values.copy()
    for begin, end in zip(packed.group_pointer[1::2], packed.group_pointer[2::2], strict=False):
        index[begin:end], values[begin:end] = packed.index[begin:end][::-1], packed.values[begin:end][::-1]
    return replace(packed, index=index, values=values)


def panel_scratch(rows: int) -> int:
    """Floats of scratch a thread needs for a tiling with panels of groups of `rows` filters."""
    return rows * (aligned(PANEL_BLOCK) + ALIGN)


def room_for_panels(name: str, weights: Mapping[str, Weights], tilings: Mapping[str, Tiling] | None) -> int:
    """Floats of scratch a thread needs for the layer `name`; without tilings for all that are tried."""
    if tilings is None:
        return panel_scratch(max(GROUP_SIZES))
    packed, panel = weights[name].packed, tilings.get(name, Tiling()).panel
    return panel_scratch(packed.group_size) if panel and len(np.unique(packed.index)) > panel else 0


def _channels(weights: Weights, layout: MapLayout) -> NDArray[np.int32]:
    """Where each row's channel lies."""
    return (weights.rows.astype(np.int64) * layout.channel(1)).astype(np.int32)
