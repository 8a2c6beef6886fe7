"""Rules of convolutions: packed, depthwise and gated, and the gate itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoprune.errors import AutopruneError
from autoprune.repack.graph.ir import Op
from autoprune.repack.graph.reference import KEEPS_ZERO, residual_of
from autoprune.repack.kernels.gate import scratch as gate_scratch
from autoprune.repack.kernels.gated_gemm import Dead
from autoprune.repack.kernels.gated_gemm import scratch as gated_scratch
from autoprune.repack.kernels.window import Mode
from autoprune.repack.lowering import convolutions, map_nodes
from autoprune.repack.lowering.buffers import Buffer
from autoprune.repack.lowering.context import Lowering
from autoprune.repack.lowering.geometry import Tiling, Window
from autoprune.repack.lowering.layout import ALIGN, FLOAT_BYTES, aligned
from autoprune.repack.lowering.pool_rules import WIDEST_STRIDE, slide
from autoprune.repack.lowering.steps import (
    Map,
    NativeStep,
    storage_of,
)
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.native.op import NativeOp
from autoprune.repack.weights.grouping import GROUP_SIZES

WIDEST_REACH = 4 * ALIGN  # columns beyond a row's ends: what lies there must be memory of the map's own buffer
CROWDED = 0.95  # share of a convolution's vectors that must be left for a map to have no border columns


def is_depthwise(op: Op, weight: Tensor) -> bool:
    """Whether each channel is convolved alone, in a way that has a kernel of its own."""
    groups = op.attributes.get("groups", 1)
    narrow = op.attributes.get("stride", [1, 1])[1] <= WIDEST_STRIDE
    return groups > 1 and tuple(weight.shape[:2]) == (groups, 1) and len(op.inputs) == 1 and narrow


def conv2d(lowering: Lowering, op: Op) -> bool:
    a = op.attributes
    weight, x = lowering.constants[op.tensors["weight"]], op.inputs[0]
    batch, channels, height, width = lowering.values[x].shape
    stride, padding, dilation = ((a[key][0], a[key][1]) for key in ("stride", "padding", "dilation"))
    window = Window((weight.shape[2], weight.shape[3]), stride, padding, dilation)
    shape = (batch, weight.shape[0], *window.outputs(height, width))
    if channels != weight.shape[1] * a["groups"] or min(shape[1:]) < 1:
        raise AutopruneError(
            f"a convolution of {weight.shape[1] * a['groups']} channels by a {window.kernel} kernel takes no input "
            f"of shape {tuple(lowering.values[x].shape)}: its channels differ or it is smaller than the kernel."
        )
    lowering.same_shape(op, shape)
    if op.output not in lowering.weights:
        depthwise(lowering, op, window, shape)
        return True
    if skips(lowering, x, window):
        given, window = subsampled(lowering, x, window.stride), replace(window, stride=(1, 1))
    elif op.kind == "conv2d" and crowded(lowering, window, shape):
        given = lowering.map(x, (window.padding[0], 0), window.stride, reach=_reach(window))
    else:
        given = lowering.map(x, window.padding, window.stride)
    added = residual_of(op)
    residual = None if added is None else lowering.map(added)
    gate = factors(lowering, op, "gate", shape[1])
    live = factors(lowering, op, "live", channels)
    made = lowering.new_map(op, shape)
    gated = op.kind == "gated_conv2d"
    room, dead = (gated_room(lowering, op), silenced(lowering, op)) if gated else (0, Dead.FINISHED)
    # as much as anything that tuning tries needs
    scratch = lowering.scratch(room if gated else convolutions.panel_scratch(max(GROUP_SIZES)))
    made.pitch.join(given.pitch)
    if residual is not None:
        made.pitch.join(residual.pitch)
        # A convolution looks around what it reads; and a row that stands in for a missing filter is computed twice.
        if residual is not given and lowering.weights[op.output].fills_groups:
            made.over = residual

    def build(weights: Weights | None, tiling: Tiling) -> NativeOp:
        assert weights is not None
        other = None if residual is None else residual.at
        return convolutions.convolution(
            op.output, weights, window, op.activation, tiling, batch, given.at, made.at, other, scratch,
            lowering.target, convolutions.Gated(gate, live, dead, room) if gated else None,
        )  # fmt: skip

    reads = [given.buffer, scratch, *(each.buffer for each in (residual, gate, live) if each is not None)]
    positions = (shape[2] - 1) * (shape[3] + window.padding[1]) + shape[3]  # about: the pitch is not known yet
    lowering.steps.append(NativeStep(op.output, reads, made.buffer, build, op, (positions, batch)))
    return True


def crowded(lowering: Lowering, window: Window, shape: tuple[int, ...]) -> bool:
    """Whether a map is so small that its border's columns are too much to compute."""
    (height, width), lanes = shape[2:], lowering.target.lanes
    vectors = -(-((height - 1) * (width + window.padding[1]) + width) // lanes)
    whole, rest = divmod(height * width, lanes)
    return whole + min(1.0, rest / lanes) <= CROWDED * vectors and _reach(window) <= WIDEST_REACH


def factors(lowering: Lowering, op: Op, role: str, channels: int) -> convolutions.Factors | None:
    """Where the factors of a gated convolution's output or input channels lie."""
    if not op.attributes.get(role):
        return None
    view = lowering.rows(op.inputs[1] if role == "gate" else op.inputs[1 + op.attributes["gate"]])
    batch = lowering.values[op.inputs[0]].shape[0]
    if len(view.shape) != 2 or view.shape[0] != batch or view.shape[1] < 1 or channels % view.shape[1]:
        raise AutopruneError(f"{op.output!r} has factors of shape {view.shape} for {channels} channels of {batch}.")
    return convolutions.Factors(view.buffer, view.offset * FLOAT_BYTES, view.shape[1], channels // view.shape[1])


def gated_room(lowering: Lowering, op: Op) -> int:
    """Floats of scratch a thread needs for a gated convolution, however its weight is packed."""
    columns = lowering.constants[op.tensors["weight"]][0].numel()
    longest = np.diff(lowering.weights[op.output].packed.group_pointer).max(initial=0)
    return aligned(gated_scratch(max(columns, int(longest))))


def silenced(lowering: Lowering, op: Op) -> Dead:
    """What becomes of the channels that a gated convolution silences."""
    finished = residual_of(op) is not None or op.activation not in (None, *KEEPS_ZERO)
    if finished or not op.attributes["gate"]:
        return Dead.FINISHED
    looking = [each for each in lowering.graph.ops if op.output in each.reads]
    skipping = [
        each for each in looking
        if each.attributes.get("live") and each.inputs.count(op.output) == 1 and each.inputs[0] == op.output
        and each.inputs[1 + each.attributes["gate"]] == op.inputs[1]
    ]  # fmt: skip
    unread = len(skipping) == len(looking) and op.output not in lowering.graph.output_names()
    return Dead.UNREAD if unread else Dead.ZEROS


def gate(lowering: Lowering, op: Op) -> bool:
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
    scratch = lowering.scratch(gate_scratch(weight.shape[1], len(weight), lowering.target))
    arrays = [each.numpy() for each in (weight, bias, threshold)]

    def build(*_: Any) -> NativeOp:
        y, keep = buffer.ref(len(weight), 1), op.attributes["keep"]
        return convolutions.gate(op.output, x.shape[0], given.at, y, scratch, arrays, keep, lowering.target)

    lowering.steps.append(NativeStep(op.output, [given.buffer, scratch], buffer, build))
    return True


def skips(lowering: Lowering, x: str, window: Window) -> bool:
    """Whether a convolution reads some positions alone, which no other needs in phase planes."""
    points = window.kernel == (1, 1) and window.padding == (0, 0) and window.stride != (1, 1)
    return points and window.stride[1] <= WIDEST_STRIDE and (x, window.stride, 0.0) not in lowering.maps


def subsampled(lowering: Lowering, x: str, stride: tuple[int, int]) -> Map:
    """Every `stride`-th position of the value, as a map of its own."""
    name = f"{x} by {stride[0]} {stride[1]}"
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


def depthwise(lowering: Lowering, op: Op, window: Window, shape: tuple[int, ...]) -> None:
    weight = lowering.graph.constants[op.tensors["weight"]]
    if not is_depthwise(op, weight) or weight.is_meta or weight.dtype != torch.float32:
        raise AutopruneError(f"the convolution {op.output!r} is neither packed nor depthwise in float32.")
    bias = lowering.graph.constants[op.tensors["bias"]] if "bias" in op.tensors else weight.new_zeros(weight.shape[0])
    slide(lowering, op, window, shape, Mode.DEPTHWISE, weights=weight.flatten(1).contiguous().numpy(),
               bias=bias.contiguous().numpy(), activation=op.activation)  # fmt: skip


def _reach(window: Window) -> int:
    """How many columns beside a position a window looks at, at most."""
    return max(abs(dx) for _, dx in window.taps())
