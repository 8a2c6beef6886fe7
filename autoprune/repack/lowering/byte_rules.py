"""Rules of what works on bytes: layers whose weights are int8, and what lies between them."""

from __future__ import annotations

import math
from typing import Any

from autoprune.errors import AutopruneError
from autoprune.quantization.grid import Grid
from autoprune.repack.graph.ops import ConvolutionOp, FusedLayerOp, GlobalAvgPool, Linear, MaxPool2d
from autoprune.repack.lowering import byte_nodes, byte_tokens, dot_nodes
from autoprune.repack.lowering.buffers import Buffer
from autoprune.repack.lowering.byte_nodes import On
from autoprune.repack.lowering.context import Lowering, turn_back
from autoprune.repack.lowering.geometry import WIDEST_STRIDE, Tiling, Window
from autoprune.repack.lowering.interleaved import interleaved, made_map, made_on, only_reader, put_on
from autoprune.repack.lowering.steps import Map, NativeStep, storage_of
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.native.op import NativeOp

POINT = Window((1, 1), (1, 1), (0, 0), (1, 1))


def in_bytes(lowering: Lowering, op: FusedLayerOp) -> bool:
    """Whether a packed layer's weight is int8.

    Raises AutopruneError where it is and its input lies on no grid.
    """
    weights = lowering.weights.get(op.output)
    if weights is None or weights.packed.scale is None:
        return False
    if op.inputs[0] not in lowering.grids:
        raise AutopruneError(f"{op.output!r} has int8 weights, but its input {op.inputs[0]!r} lies on no grid.")
    return True


def conv2d(lowering: Lowering, op: ConvolutionOp, window: Window, shape: tuple[int, int, int, int]) -> None:
    """A packed convolution of bytes."""
    x = op.inputs[0]
    points = window.kernel == (1, 1) and window.padding == (0, 0) and 1 < max(window.stride) <= WIDEST_STRIDE
    if points and (x, window.stride, lowering.grids[x].zero_point, False) not in lowering.interleaved:
        given, grid, window = _subsampled(lowering, x, window.stride), lowering.grids[x], POINT
    else:
        given, grid = interleaved(lowering, x, window.padding, window.stride), lowering.grids[x]
    added, own = _residual(lowering, op.residual)
    made, on = result(lowering, op, shape)
    made.pitch.join(given.pitch)
    if added is not None:
        made.pitch.join(added.pitch)

    def build(weights: Weights | None, tiling: Tiling) -> NativeOp:
        assert weights is not None
        other = None if added is None else On(added.at, own)
        return dot_nodes.convolution(
            op.output, weights, window, op.activation, tiling, shape[0], On(given.at, grid),
            On(made.at, on), other, lowering.target,
        )  # fmt: skip

    reads = [given.buffer, *([] if added is None else [added.buffer])]
    positions = (shape[2] - 1) * (shape[3] + window.padding[1]) + shape[3]  # about: the pitch is not known yet
    lowering.steps.append(NativeStep(op.output, reads, made.buffer, build, op, (positions, shape[0]), by_position=True))


def alias(lowering: Lowering, name: str, source: str) -> None:
    """Another name for a value on a grid, in all its forms."""
    put_on(lowering, name, lowering.grids[source])
    lowering.made_of_bytes[name] = lowering.made_of_bytes[source]
    lowering.interleaved |= {
        (name, *key[1:]): made for key, made in lowering.interleaved.items() if key[0] == source
    }  # fmt: skip
    if source in lowering.unrounded:
        lowering.unrounded[name] = lowering.unrounded[source]
    if source in lowering.byte_rows:
        lowering.byte_rows[name] = lowering.byte_rows[source]


def _residual(lowering: Lowering, name: str | None) -> tuple[Map | None, Grid | None]:
    """The map that is added, as bytes where the value lies on a grid."""
    if name is None:
        return None, None
    if name in lowering.grids:
        return interleaved(lowering, name), lowering.grids[name]
    return lowering.map(name), None


def result(lowering: Lowering, op: FusedLayerOp, shape: tuple[int, int, int, int]) -> tuple[Map, Grid | None]:
    """The map that a layer writes: bytes where its result is wanted as bytes alone."""
    rounding = only_reader(lowering, op)
    if rounding is None:
        return lowering.new_map(op, shape), None
    return made_on(lowering, op.output, rounding, shape), rounding.grid


def _subsampled(lowering: Lowering, x: str, stride: tuple[int, int]) -> Map:
    """Every `stride`-th position of the value."""
    name = lowering.own_name(f"{x} by {stride[0]} {stride[1]}")
    if name not in lowering.grids:
        given, window = interleaved(lowering, x), Window((1, 1), stride, (0, 0), (1, 1))
        batch, channels, height, width = lowering.values[x].shape
        shape = (batch, channels, *window.outputs(height, width))
        lowering.define(name, shape)
        put_on(lowering, name, lowering.grids[x])
        _slide(lowering, name, window, given, made_map(lowering, name, shape))
    return interleaved(lowering, name)


def _slide(lowering: Lowering, name: str, window: Window, given: Map, made: Map) -> None:
    border = lowering.grids[name].zero_point

    def build(*_: Any) -> NativeOp:
        return byte_nodes.pooled(name, window, made.shape[0], given.at, made.at, border, lowering.target)

    lowering.steps.append(NativeStep(name, [given.buffer], made.buffer, build))


def max_pool(lowering: Lowering, op: MaxPool2d, window: Window, shape: tuple[int, int, int, int]) -> None:
    """The largest bytes of each window, on the input's grid."""
    x = op.inputs[0]
    margin = window.margin(tuple(lowering.values[x].shape[2:]), shape[2:])
    given = interleaved(lowering, x, margin, border=0 if any(margin) else None)  # no byte is lower
    lowering.define(op.output, shape)
    put_on(lowering, op.output, lowering.grids[x])
    made = made_map(lowering, op.output, shape)
    if window.stride == (1, 1):
        made.pitch.join(given.pitch)
    _slide(lowering, op.output, window, given, made)


def global_avg_pool(lowering: Lowering, op: GlobalAvgPool) -> None:
    """The mean of each channel's bytes, as floats."""
    x = op.inputs[0]
    given, grid = interleaved(lowering, x), lowering.grids[x]
    batch, channels = lowering.values[x].shape[:2]
    meta = lowering.define(op.output, (batch, channels, 1, 1) if op.keepdim else (batch, channels))
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())

    def build(*_: Any) -> NativeOp:
        return byte_nodes.averaged(op.output, batch, channels, given.at, buffer.ref(channels, 1), grid, lowering.target)

    lowering.steps.append(NativeStep(op.output, [given.buffer], buffer, build))


def linear(lowering: Lowering, op: Linear, shape: tuple[int, ...]) -> None:
    """A packed Linear of bytes over tokens, side by side in a vector where they fill one."""
    tokens = math.prod(shape[:-1])
    if byte_tokens.few(lowering, tokens):
        byte_tokens.linear(lowering, op, shape)
        return
    given, grid = interleaved(lowering, op.inputs[0], tokens=True), lowering.grids[op.inputs[0]]
    rounding = only_reader(lowering, op) if op.residual is None else None
    whole = (1, shape[-1], 1, tokens)
    on = None
    if rounding is None:
        lowering.define(op.output, shape)
        made = Map(whole, (1, 1), 0.0).padded((0, 0))
        lowering.planes[op.output if op.residual is None else lowering.own_name(f"{op.output} before")] = made
    else:
        made, on = made_on(lowering, op.output, rounding, shape, tokens=True), rounding.grid
    made.pitch.join(given.pitch)
    activation = op.activation if op.residual is None else None

    def build(weights: Weights | None, tiling: Tiling) -> NativeOp:
        assert weights is not None
        return dot_nodes.convolution(
            op.output, weights, POINT, activation, tiling, 1, On(given.at, grid),
            On(made.at, on), None, lowering.target,
        )  # fmt: skip

    lowering.steps.append(NativeStep(op.output, [given.buffer], made.buffer, build, op, (tokens, 1), by_position=True))
    if op.residual is not None:
        turn_back(lowering, op.output, made, lowering.rows(op.residual), op.activation)
