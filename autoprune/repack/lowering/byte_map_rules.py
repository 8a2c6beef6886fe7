"""Rules of what makes maps on a grid of such maps, beside packed layers: depthwise layers, sums, averages, joins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from autoprune.repack.graph.ops import Add, AvgPool2d, ConvolutionOp, Op, TorchOp
from autoprune.repack.kernels.math import clamped
from autoprune.repack.lowering import byte_nodes, byte_sums, dot_nodes
from autoprune.repack.lowering.byte_nodes import On
from autoprune.repack.lowering.byte_rules import result
from autoprune.repack.lowering.context import Lowering
from autoprune.repack.lowering.geometry import Window
from autoprune.repack.lowering.interleaved import Shape, interleaved, made_on, only_reader
from autoprune.repack.lowering.map_nodes import Counted
from autoprune.repack.lowering.steps import NativeStep
from autoprune.repack.native.op import NativeOp


def depthwise(lowering: Lowering, op: ConvolutionOp, window: Window, shape: Shape) -> None:
    """A depthwise convolution with int8 weights, of a value on a grid."""
    x, constants = op.inputs[0], lowering.graph.constants
    scale = np.ascontiguousarray(constants[op.tensors["scale"]].numpy(), np.float32)
    weight = np.rint(constants[op.tensors["weight"]].flatten(1).numpy() / scale[:, None]).astype(np.int8)
    bias = constants[op.tensors["bias"]].numpy() if "bias" in op.tensors else np.zeros(len(scale), np.float32)
    given, grid = interleaved(lowering, x, window.padding), lowering.grids[x]
    made, on = result(lowering, op, shape)
    if window.stride == (1, 1):
        made.pitch.join(given.pitch)
    sums = weight.sum(axis=1, dtype=np.int64)
    ending = dot_nodes.steps_of(scale, bias, sums, grid, on, None, op.activation)

    def build(*_: Any) -> NativeOp:
        return byte_nodes.depthwise(op.output, window, shape[0], given.at, made.at, weight, ending, on, lowering.target)

    lowering.steps.append(NativeStep(op.output, [given.buffer], made.buffer, build))


def average(lowering: Lowering, op: AvgPool2d, window: Window, shape: Shape) -> bool:
    """Means of windows of a value on a grid; False where they are wanted as floats."""
    x, rounding = op.inputs[0], only_reader(lowering, op)
    if x not in lowering.grids or rounding is None:
        return False
    margin = window.margin(tuple(lowering.values[x].shape[2:]), shape[2:])
    given, grids = interleaved(lowering, x, margin), (lowering.grids[x], rounding.grid)
    made = made_on(lowering, op.output, rounding, shape)
    if window.stride == (1, 1):
        made.pitch.join(given.pitch)
    counted = Counted(op.count_include_pad, op.divisor)

    def build(*_: Any) -> NativeOp:
        return byte_nodes.averaged_windows(
            op.output, window, shape[0], given.at, made.at, grids, counted, lowering.target
        )

    lowering.steps.append(NativeStep(op.output, [given.buffer], made.buffer, build))
    return True


def added(lowering: Lowering, op: Add) -> bool:
    """The sum of two maps on grids; False where one is none, or the sum is wanted as floats."""
    rounding = only_reader(lowering, op)
    if rounding is None or not _all_bytes(lowering, op, op.inputs) or clamped(op.activation)[2]:
        return False
    shape, low, high = tuple(lowering.values[op.inputs[0]].shape), *clamped(op.activation)[:2]
    if tuple(lowering.values[op.inputs[1]].shape) != shape:
        return False
    given = [(interleaved(lowering, name), lowering.grids[name]) for name in op.inputs]
    made = made_on(lowering, op.output, rounding, shape)
    for each, _ in given:
        made.pitch.join(each.pitch)

    def build(*_: Any) -> NativeOp:
        a, b = (On(each.at, grid) for each, grid in given)
        return byte_sums.added(op.output, shape, a, b, made.at, rounding.grid, lowering.target, (low, high))

    lowering.steps.append(NativeStep(op.output, [each.buffer for each, _ in given], made.buffer, build))
    return True


def joined(lowering: Lowering, op: TorchOp, names: Sequence[str], shape: tuple[int, ...], axis: int) -> bool:
    """Maps on grids beside each other along their channels; False where one is none, or floats are wanted."""
    rounding = only_reader(lowering, op)
    if rounding is None or axis != 1 or len(shape) != 4 or not _all_bytes(lowering, op, names):
        return False
    given = [(name, interleaved(lowering, name), lowering.grids[name]) for name in names]
    made = made_on(lowering, op.output, rounding, shape)
    for _, each, _ in given:
        made.pitch.join(each.pitch)
    first = 0
    for name, each, grid in given:
        _join(lowering, op.output, tuple(lowering.values[name].shape), (each, grid), (made, rounding.grid), first)
        first += lowering.values[name].shape[1]
    return True


def _join(lowering: Lowering, name: str, shape: Shape, x: Any, y: Any, first: int) -> None:
    def build(*_: Any) -> NativeOp:
        return byte_sums.joined(name, shape, On(x[0].at, x[1]), y[0].at, y[1], first, lowering.target)

    lowering.steps.append(NativeStep(name, [x[0].buffer], y[0].buffer, build))


def _all_bytes(lowering: Lowering, op: Op, names: Sequence[str]) -> bool:
    return all(name in lowering.grids and lowering.values[name].dim() == 4 for name in names)
