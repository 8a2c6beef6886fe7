"""Rules of convolutions: packed, depthwise and gated, and the gate itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoprune.errors import AutopruneError
from autoprune.repack.graph.activations import KEEPS_ZERO
from autoprune.repack.graph.ops import ConvolutionOp, Gate, GatedConv2d, LayerOp
from autoprune.repack.kernels.gate import scratch as gate_scratch
from autoprune.repack.kernels.gated_gemm import Dead
from autoprune.repack.kernels.gated_gemm import scratch as gated_scratch
from autoprune.repack.kernels.window import Mode
from autoprune.repack.lowering import bf16_rules, byte_map_rules, byte_rules, convolutions, map_nodes
from autoprune.repack.lowering.buffers import Buffer
from autoprune.repack.lowering.context import Lowering
from autoprune.repack.lowering.geometry import WIDEST_STRIDE, Tiling, Window
from autoprune.repack.lowering.layout import ALIGN, FLOAT_BYTES, aligned
from autoprune.repack.lowering.pool_rules import slide
from autoprune.repack.lowering.steps import (
    Map,
    NativeStep,
    storage_of,
)
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.native.op import NativeOp

WIDEST_REACH = 4 * ALIGN  # columns beyond a row's ends: what lies there must be memory of the map's own buffer
CROWDED = 0.95  # share of a convolution's vectors that must be left for a map to have no border columns


def is_depthwise(op: LayerOp, weight: Tensor) -> bool:
    """Whether each channel is convolved alone, in a way that has a kernel of its own."""
    if not isinstance(op, ConvolutionOp) or op.groups == 1:
        return False
    return tuple(weight.shape[:2]) == (op.groups, 1) and len(op.inputs) == 1 and op.stride[1] <= WIDEST_STRIDE


def conv2d(lowering: Lowering, op: ConvolutionOp) -> bool:
    weight, x = lowering.constants[op.tensors["weight"]], op.inputs[0]
    batch, channels, height, width = lowering.values[x].shape
    window = Window((weight.shape[2], weight.shape[3]), op.stride, op.padding, op.dilation)
    shape = (batch, weight.shape[0], *window.outputs(height, width))
    if channels != weight.shape[1] * op.groups or min(shape[1:]) < 1:
        raise AutopruneError(
            f"a convolution of {weight.shape[1] * op.groups} channels by a {window.kernel} kernel takes no input "
            f"of shape {tuple(lowering.values[x].shape)}: its channels differ or it is smaller than the kernel."
        )
    lowering.same_shape(op, op.residual, shape)
    if op.output not in lowering.weights and "scale" in op.tensors and is_depthwise(op, weight):
        byte_map_rules.depthwise(lowering, op, window, shape)
        return True
    if op.output not in lowering.weights:
        depthwise(lowering, op, window, shape)
        return True
    if byte_rules.in_bytes(lowering, op):
        byte_rules.conv2d(lowering, op, window, shape)
        return True
    if bf16_rules.in_bf16(lowering, op):
        points = skips(lowering, bf16_rules.name_of(lowering, x), window)
        x = bf16_rules.rounded_map(lowering, x, (1, 1) if points else window.stride)
    if skips(lowering, x, window):
        given, window = subsampled(lowering, x, window.stride), replace(window, stride=(1, 1))
    elif not isinstance(op, GatedConv2d) and crowded(lowering, window, shape):
        given = lowering.map(x, (window.padding[0], 0), window.stride, reach=_reach(window))
    else:
        given = lowering.map(x, window.padding, window.stride)
    residual = None if op.residual is None else lowering.map(op.residual)
    gated = gating(lowering, op, shape[1], channels) if isinstance(op, GatedConv2d) else None
    made = lowering.new_map(op, shape)
    panels = convolutions.room_for_panels(op.output, lowering.weights, lowering.tilings)
    scratch = lowering.scratch(panels if gated is None else gated.room)
    made.pitch.join(given.pitch)
    if residual is not None:
        made.pitch.join(residual.pitch)
        # A convolution looks around what it reads; and a row that stands in for a missing filter is computed twice.
        if residual is not given and lowering.weights[op.output].fills_groups:
            made.over = (residual,)

    def build(weights: Weights | None, tiling: Tiling) -> NativeOp:
        assert weights is not None
        other = None if residual is None else residual.at
        return convolutions.convolution(
            op.output, weights, window, op.activation, tiling, batch, given.at, made.at, other, scratch,
            lowering.target, gated,
        )  # fmt: skip

    also = (residual, *(() if gated is None else (gated.gate, gated.live)))
    reads = [given.buffer, scratch, *(each.buffer for each in also if each is not None)]
    positions = (shape[2] - 1) * (shape[3] + window.padding[1]) + shape[3]  # about: the pitch is not known yet
    lowering.steps.append(NativeStep(op.output, reads, made.buffer, build, op, (positions, batch)))
    return True


def crowded(lowering: Lowering, window: Window, shape: tuple[int, ...]) -> bool:
    """Whether a map is so small that its border's columns are too much to compute."""
    height, width = shape[2:]
    vectors = -(-((height - 1) * (width + window.padding[1]) + width) // ALIGN)
    return height * width / ALIGN <= CROWDED * vectors and _reach(window) <= WIDEST_REACH


def gating(lowering: Lowering, op: GatedConv2d, filters: int, channels: int) -> convolutions.Gated:
    """What a gated convolution knows of its channels."""
    gate = factors(lowering, op, op.filter_factors, filters)
    live = factors(lowering, op, op.channel_factors, channels)
    return convolutions.Gated(gate, live, silenced(lowering, op), gated_room(lowering, op))


def factors(lowering: Lowering, op: GatedConv2d, name: str | None, channels: int) -> convolutions.Factors | None:
    """Where the factors `name` of a gated convolution's output or input channels lie; None where there are none."""
    if name is None:
        return None
    view = lowering.rows(name)
    batch = lowering.values[op.inputs[0]].shape[0]
    if len(view.shape) != 2 or view.shape[0] != batch or view.shape[1] < 1 or channels % view.shape[1]:
        raise AutopruneError(f"{op.output!r} has factors of shape {view.shape} for {channels} channels of {batch}.")
    return convolutions.Factors(view.buffer, view.offset * FLOAT_BYTES, view.shape[1], channels // view.shape[1])


def gated_room(lowering: Lowering, op: GatedConv2d) -> int:
    """Floats of scratch a thread needs for a gated convolution, however its weight is packed."""
    columns = lowering.constants[op.tensors["weight"]][0].numel()
    longest = np.diff(lowering.weights[op.output].packed.group_pointer).max(initial=0)
    return aligned(gated_scratch(max(columns, int(longest))))


def silenced(lowering: Lowering, op: GatedConv2d) -> Dead:
    """What becomes of the channels that a gated convolution silences."""
    finished = op.residual is not None or op.activation not in (None, *KEEPS_ZERO)
    if finished or not op.gate:
        return Dead.FINISHED
    looking = [each for each in lowering.graph.ops if op.output in each.reads]
    skipping = [
        each for each in looking
        if isinstance(each, GatedConv2d) and each.inputs.count(op.output) == 1 and each.inputs[0] == op.output
        and each.channel_factors == op.filter_factors
    ]  # fmt: skip
    unread = len(skipping) == len(looking) and op.output not in lowering.graph.output_names()
    return Dead.UNREAD if unread else Dead.ZEROS


def gate(lowering: Lowering, op: Gate) -> bool:
    weight, bias, threshold = (
        lowering.graph.constants[op.tensors[role]] for role in ("weight", "bias", "threshold")
    )  # fmt: skip
    x = lowering.values[op.inputs[0]]
    if x.dim() != 4 or weight.dtype != torch.float32 or weight.is_meta or not x.shape[2] * x.shape[3]:
        return False
    if x.shape[1] != weight.shape[1]:
        raise AutopruneError(f"a gate takes {weight.shape[1]} channels, not an input of shape {tuple(x.shape)}.")
    given = lowering.map(op.inputs[0])
    meta = lowering.define(op.output, (x.shape[0], len(weight)))
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())
    scratch = lowering.scratch(gate_scratch(weight.shape[1], len(weight)))
    arrays = [each.numpy() for each in (weight, bias, threshold)]

    def build(*_: Any) -> NativeOp:
        y = buffer.ref(len(weight), 1)
        return convolutions.gate(op.output, x.shape[0], given.at, y, scratch, arrays, op.keep, lowering.target)

    lowering.steps.append(NativeStep(op.output, [given.buffer, scratch], buffer, build))
    return True


def skips(lowering: Lowering, x: str, window: Window) -> bool:
    """Whether a convolution reads some positions alone, which no other needs in phase planes."""
    points = window.kernel == (1, 1) and window.padding == (0, 0) and window.stride != (1, 1)
    return points and window.stride[1] <= WIDEST_STRIDE and (x, window.stride, 0.0) not in lowering.maps


def subsampled(lowering: Lowering, x: str, stride: tuple[int, int]) -> Map:
    """Every `stride`-th position of the value, as a map of its own."""
    name = lowering.own_name(f"{x} by {stride[0]} {stride[1]}")
    if name not in lowering.values:
        given, window = lowering.map(x), Window((1, 1), stride, (0, 0), (1, 1))
        batch, channels, height, width = given.shape
        shape = (batch, channels, *window.outputs(height, width))
        lowering.define(name, shape)
        made = lowering.maps[name, (1, 1), 0.0] = Map(shape, (1, 1), 0.0)

        def build(*_: Any) -> NativeOp:
            return map_nodes.sliding(name, Mode.MAX, window, batch, given.at, made.at, lowering.target)

        lowering.steps.append(NativeStep(name, [given.buffer], made.buffer, build))
    return lowering.map(name)


def depthwise(lowering: Lowering, op: ConvolutionOp, window: Window, shape: tuple[int, ...]) -> None:
    weight = lowering.graph.constants[op.tensors["weight"]]
    if not is_depthwise(op, weight) or weight.is_meta or weight.dtype != torch.float32:
        raise AutopruneError(f"the convolution {op.output!r} is neither packed nor depthwise in float32.")
    bias = lowering.graph.constants[op.tensors["bias"]] if "bias" in op.tensors else weight.new_zeros(weight.shape[0])
    slide(lowering, op, window, shape, Mode.DEPTHWISE, weights=weight.flatten(1).contiguous().numpy(),
               bias=bias.contiguous().numpy(), activation=op.activation)  # fmt: skip


def _reach(window: Window) -> int:
    """How many columns beside a position a window looks at, at most."""
    return max(abs(dx) for _, dx in window.taps())
