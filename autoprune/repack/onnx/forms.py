"""What an ONNX file is made of: a captured graph as a torch module, with a form of its own for each layer.

A layer is ``dense``, ``compacted`` (dense, of fewer channels or filters) or ``gathered`` (what each group keeps).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.repack.graph.ir import Graph, Op
from autoprune.repack.graph.reference import activate, evaluate_op
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


def layer_form(op: Op, constants: Mapping[str, Tensor]) -> LayerForm | None:
    """A layer of a graph as a module of its own, without residual and activation; None where it has only one form."""
    if op.kind not in ("conv2d", "linear") or op.attributes.get("groups", 1) != 1:
        return None
    weight, bias = constants[op.tensors["weight"]], constants.get(op.tensors.get("bias", ""))
    if weight.dtype != torch.float32:
        return None
    layer: nn.Conv2d | nn.Linear
    with torch.device("meta"):
        if op.kind == "linear":
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        else:
            (out, into, high, wide), a = weight.shape, op.attributes
            layer = nn.Conv2d(into, out, (high, wide), a["stride"], a["padding"], a["dilation"], bias=bias is not None)
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
            y = self.layers[self.layer_of[op.output]](values[op.inputs[0]])
            for residual in op.inputs[1:]:
                y = y + values[residual]
            values[op.output] = activate(y, op.activation)
        returned = [{**constants, **values}[name] for name in self.graph.output_names()]
        return tuple(each for each in returned if isinstance(each, Tensor))  # an extent is no output of a file
