"""Rules of sliding windows: poolings, and what depthwise convolutions share with them."""

from __future__ import annotations

from typing import Any

from autoprune.errors import AutopruneError
from autoprune.repack.graph.ops import AdaptiveAvgPool2d, AvgPool2d, GlobalAvgPool, MaxPool2d, Op
from autoprune.repack.kernels.window import Mode
from autoprune.repack.lowering import byte_map_rules, byte_rules, map_nodes
from autoprune.repack.lowering.buffers import Buffer
from autoprune.repack.lowering.context import Lowering
from autoprune.repack.lowering.geometry import WIDEST_STRIDE, Window
from autoprune.repack.lowering.steps import (
    NativeStep,
    storage_of,
)
from autoprune.repack.native.op import NativeOp

WIDEST_POOL = 32  # columns from a pooling's first to its last: code for them grows with their square


def slide(
    lowering: Lowering,
    op: Op,
    window: Window,
    shape: tuple[int, ...],
    mode: Mode,
    border: float = 0.0,
    **rest: Any,
) -> None:
    _, _, height, width = lowering.values[op.inputs[0]].shape
    meets = window.dilation == (1, 1) or window.padding == (0, 0)  # no window lies in the border alone
    if op.inputs[0] in lowering.positive and mode is not Mode.DEPTHWISE and meets:
        lowering.positive.add(op.output)
        border = 0.0  # a maximum over values that are not negative
    given = lowering.map(op.inputs[0], window.margin((height, width), (shape[2], shape[3])), border=border)
    made = lowering.new_map(op, shape)
    if window.stride == (1, 1):
        made.pitch.join(given.pitch)

    def build(*_: Any) -> NativeOp:
        return map_nodes.sliding(op.output, mode, window, shape[0], given.at, made.at, lowering.target, **rest)

    lowering.steps.append(NativeStep(op.output, [given.buffer], made.buffer, build))


def pool(lowering: Lowering, op: MaxPool2d | AvgPool2d) -> bool:
    x = lowering.values[op.inputs[0]]
    dilation = op.dilation if isinstance(op, MaxPool2d) else (1, 1)
    window = Window(op.kernel, op.stride, op.padding, dilation)
    wide = window.stride[1] > WIDEST_STRIDE or dilation[1] * (op.kernel[1] - 1) > WIDEST_POOL
    if x.dim() != 4 or wide:
        return False
    shape = (*x.shape[:2], *window.outputs(x.shape[2], x.shape[3], op.ceil_mode))
    if min(shape[1:]) < 1:
        raise AutopruneError(f"a pooling by a {window.kernel} kernel takes no input of shape {tuple(x.shape)}.")
    if isinstance(op, MaxPool2d) and op.inputs[0] in lowering.grids:
        byte_rules.max_pool(lowering, op, window, shape)
    elif isinstance(op, AvgPool2d) and byte_map_rules.average(lowering, op, window, shape):
        return True
    elif isinstance(op, MaxPool2d):
        slide(lowering, op, window, shape, Mode.MAX, border=float("-inf"))
    else:
        counted = map_nodes.Counted(op.count_include_pad, op.divisor)
        slide(lowering, op, window, shape, Mode.AVERAGE, counted=counted)
    return True


def pooling(lowering: Lowering, op: AdaptiveAvgPool2d) -> AdaptiveAvgPool2d | AvgPool2d | None:
    """An adaptive pooling as what it is for an input of this shape; None where it is nothing at all."""
    x, (source,) = lowering.values[op.inputs[0]], op.inputs
    if x.dim() != 4 or any(extent % parts for extent, parts in zip(x.shape[2:], op.size, strict=True)):
        return op
    kernel = (x.shape[2] // op.size[0], x.shape[3] // op.size[1])
    if kernel[1] > WIDEST_STRIDE:
        return op
    if kernel != (1, 1):
        return AvgPool2d(op.output, op.inputs, kernel=kernel, stride=kernel, padding=(0, 0), count_include_pad=True)
    lowering.values[op.output] = x
    lowering.maps |= {(op.output, *key[1:]): made for key, made in lowering.maps.items() if key[0] == source}
    lowering.positive |= {op.output} & ({op.output} if source in lowering.positive else set())
    if source in lowering.grids:
        byte_rules.alias(lowering, op.output, source)
    return None


def global_avg_pool(lowering: Lowering, op: GlobalAvgPool) -> bool:
    if op.inputs[0] in lowering.grids:
        byte_rules.global_avg_pool(lowering, op)
        return True
    given = lowering.map(op.inputs[0])
    batch, channels, _, _ = given.shape
    meta = lowering.define(op.output, (batch, channels, 1, 1) if op.keepdim else (batch, channels))
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())

    def build(*_: Any) -> NativeOp:
        return map_nodes.mean(op.output, batch, given.at, buffer.ref(channels, 1), lowering.target)

    lowering.steps.append(NativeStep(op.output, [given.buffer], buffer, build))
    return True
