"""What an ONNX file is made of: a captured graph as a torch module, with a form of its own for each layer.

A layer is ``dense``, ``compacted`` (dense, of fewer channels or filters) or ``gathered`` (what each group keeps).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import (
    Activation,
    AdaptiveAvgPool2d,
    Add,
    Attention,
    AvgPool2d,
    Conv2d,
    Experts,
    FusedLayerOp,
    Gate,
    GatedConv2d,
    GlobalAvgPool,
    LayerNorm,
    Linear,
    MaxPool2d,
    Op,
    Quantize,
    Recurrent,
    Reshape,
    RmsNorm,
    Rotary,
    Scalar,
    Scale,
    TorchOp,
)
from autoprune.repack.graph.reference import evaluate_op
from autoprune.repack.modules.backends import LayerForm
from autoprune.repack.modules.backends.portable import COMPACT, Compacted, GatheredConv2d, GatheredLinear, compact_share

DENSE, COMPACTED, GATHERED = "dense", "compacted", "gathered"
GATHER, GATHER_TAPS = 0.5, 0.2  # the largest share of the weights at which gathering is tried: of one tap, of several
GATHER_GROUP = 4  # the fewest filters a group must have for it


def _dense(form: LayerForm) -> nn.Module:
    return form.module


def _gathered(form: LayerForm) -> nn.Module:
    return GatheredConv2d(form) if form.kind == "conv2d" else GatheredLinear(form)


FORMS: Mapping[str, Callable[[LayerForm], nn.Module]] = {DENSE: _dense, COMPACTED: Compacted, GATHERED: _gathered}


def shares(form: LayerForm) -> dict[str, float]:
    """The forms worth a try besides ``dense`` -> the share of the weights they multiply by, in (0, 1)."""
    found: dict[str, float] = {}
    if bool(form.weight.any()):
        found[COMPACTED] = compact_share(form)
        found = {name: share for name, share in found.items() if share <= COMPACT}
        size, kept = form.packed.group_size, np.diff(form.packed.group_pointer)
        share = form.packed.groups * size * int(kept.max()) / form.weight.numel()
        if size >= GATHER_GROUP and share <= (GATHER if form.packed.taps == 1 else GATHER_TAPS):
            found[GATHERED] = share
    return found


def _conv2d(op: Conv2d, weight: Tensor, bias: bool) -> nn.Conv2d:
    out, into, high, wide = weight.shape
    return nn.Conv2d(into, out, (high, wide), op.stride, op.padding, op.dilation, bias=bias)


def _linear(op: Linear, weight: Tensor, bias: bool) -> nn.Linear:
    return nn.Linear(weight.shape[1], weight.shape[0], bias)


MODULES: Mapping[type[Op], Callable[[Any, Tensor, bool], nn.Conv2d | nn.Linear] | None] = {
    Conv2d: _conv2d,
    Linear: _linear,
    **dict.fromkeys(
        (
            GatedConv2d, Gate, Scale, Recurrent, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, GlobalAvgPool, Activation,
            Add, LayerNorm, RmsNorm, Rotary, Attention, Experts, Reshape, Scalar, Quantize,
            TorchOp,
        )
    ),
}  # fmt: skip
"""Class -> the module of a layer with more than one form: (op, weight, whether it has a bias); None: it has one."""


def layer_form(op: Op, constants: Mapping[str, Tensor]) -> LayerForm | None:
    """A layer of a graph as a module of its own, without residual and activation; None where it has only one form."""
    make = MODULES[type(op)]
    if make is None or not isinstance(op, FusedLayerOp) or op.conv_groups != 1:
        return None
    weight, bias = constants[op.tensors["weight"]], constants.get(op.tensors.get("bias", ""))
    if weight.dtype != torch.float32:
        return None
    with torch.device("meta"):
        layer = make(op, weight, bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return LayerForm(layer.eval())


class GraphModule(nn.Module):
    """Runs a graph by torch's functions, its layers by modules; returns the values the graph returns, in order.

    Attributes:
        seen: layer -> its input in the last call with `watch`.
    """

    def __init__(self, graph: Graph, layers: Mapping[str, nn.Module]) -> None:
        """`layers`: by the value they define; the same module may stand for several."""
        super().__init__()
        self.graph, self.seen = graph, dict[str, Tensor]()
        self.layers = nn.ModuleList(dict.fromkeys(layers.values()))
        places = {module: at for at, module in enumerate(self.layers)}
        self.layer_of = {name: places[module] for name, module in layers.items()}
        held = {name for op in graph.ops if op.output in layers for name in op.tensors.values()}
        held -= {name for op in graph.ops if op.output not in layers for name in (*op.reads, *op.tensors.values())}
        self.constant_of: dict[str, str] = {}
        for at, (name, value) in enumerate(graph.constants.items()):
            if name not in held:
                self.constant_of[name] = f"constant_{at}"
                self.register_buffer(f"constant_{at}", value)

    def forward(self, *inputs: Tensor, watch: bool = False) -> tuple[Tensor, ...]:
        constants = {name: getattr(self, own) for name, own in self.constant_of.items()}
        values: dict[str, Any] = {each.name: x for each, x in zip(self.graph.inputs, inputs, strict=True)}
        for op in self.graph.ops:
            if op.output not in self.layer_of:
                values[op.output] = evaluate_op(op, values, constants)
                continue
            if watch:
                self.seen[op.output] = values[op.inputs[0]].clone()
            assert isinstance(op, FusedLayerOp)
            y = self.layers[self.layer_of[op.output]](values[op.inputs[0]])
            values[op.output] = op.finished(y, None if op.residual is None else values[op.residual])
        returned = [{**constants, **values}[name] for name in self.graph.output_names()]
        return tuple(each for each in returned if isinstance(each, Tensor))  # an extent is no output of a file
