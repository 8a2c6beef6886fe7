"""Making a graph smaller without changing what it computes, up to the last bits of float32.

Batch norms go into the convolutions before them, activations and residual sums behind them, reshapes into each other,
and channels that nobody needs away (see `channels`). What the graph returns is never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autoprune.model.recurrent.names import GATES, by_unit
from autoprune.repack.debug import dump, dumping, verifying
from autoprune.repack.graph.channels import drop_dead_channels
from autoprune.repack.graph.editor import Editor, infer_shapes
from autoprune.repack.graph.ir import Graph, Op
from autoprune.repack.graph.reference import KEEPS_ZERO, residual_of
from autoprune.repack.graph.schema import validate

LAYERS = ("conv2d", "linear")
FUSING = (*LAYERS, "gated_conv2d")
_NORM = "aten.batch_norm.default"


def simplify(graph: Graph) -> Graph:
    """Applies every pass until none finds anything more to do."""
    dump("captured", graph)
    edited = Editor(graph)
    for step in (*_PASSES, _standalone_norms):
        _exhaust(edited, step)
    while True:
        for step in _PASSES:
            _exhaust(edited, step)
        if not drop_dead_channels(edited):
            simplified = validate(edited.graph())
            dump("simplified", simplified)
            return simplified


def _exhaust(edited: Editor, step: Callable[[Editor, Op], bool]) -> None:
    """Runs a pass over every operation, again as long as it changes one."""
    changed, ever = True, False
    while changed:
        changed = False
        for name in list(edited.ops):
            op = edited.ops.get(name)
            changed |= op is not None and step(edited, op)
        ever |= changed
    if ever and dumping():
        dump(step.__name__.strip("_"), edited.graph())
    if ever and verifying():
        validate(edited.graph())


def _fold_norm(edited: Editor, op: Op) -> bool:
    """A batch norm scales the filters of the layer before it; zeros stay zeros."""
    if op.attributes.get("op") != _NORM:
        return False
    layer = edited.ops.get(op.inputs[0])
    if layer is None or layer.kind not in LAYERS or not edited.only_reader(layer, op) or _is_fused(layer):
        return False
    if layer.kind == "linear" and len(edited.shapes[layer.output]) != 2:
        return False  # it normalises the second axis, which is not the Linear's
    scale, shift = _affine(edited, op)
    weight = edited.weight(layer, "weight")
    bias = edited.weights(layer).get("bias", torch.zeros(len(weight))).double() * scale + shift
    scaled = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    merged = replace(layer, output=op.output)
    edited.merge(layer, op, edited.with_weights(merged, weight=scaled.to(weight.dtype), bias=bias.to(weight.dtype)))
    return True


def _affine(edited: Editor, op: Op) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies each channel by and adds, in float64."""
    args = op.attributes["args"]
    weight, bias, mean, var = (None if x is None else edited.constants[x["ref"]].double() for x in args[1:5])
    assert mean is not None
    assert var is not None
    scale = torch.rsqrt(var + args[7])
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def _is_fused(op: Op) -> bool:
    return op.activation is not None or residual_of(op) is not None


def _standalone_norms(edited: Editor, op: Op) -> bool:
    """A batch norm with no layer to go into is a depthwise convolution with one tap."""
    if op.attributes.get("op") != _NORM or len(edited.shapes[op.output]) != 4:
        return False
    if edited.constants[op.attributes["args"][3]["ref"]].dtype != torch.float32:
        return False
    scale, shift = (x.float() for x in _affine(edited, op))
    attributes: dict[str, Any] = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": len(scale)}
    made = Op("conv2d", op.output, op.inputs[:1], {**attributes, "activation": None})
    edited.replace(op, edited.with_weights(made, weight=scale[:, None, None, None], bias=shift))
    return True


def _fuse_activation(edited: Editor, op: Op) -> bool:
    """An activation becomes part of the layer or sum whose only reader it is."""
    if op.kind != "activation":
        return False
    before = edited.ops.get(op.inputs[0])
    if before is None or before.kind not in (*FUSING, "add") or before.activation is not None:
        return False
    if not edited.only_reader(before, op):
        return False
    edited.merge(before, op, replace(before.with_attributes(activation=op.attributes["name"]), output=op.output))
    return True


def _fuse_add(edited: Editor, op: Op) -> bool:
    """A sum becomes the residual of the layer it alone reads; the layer then runs in the sum's place."""
    if op.kind != "add":
        return False
    for name, residual in (op.inputs, op.inputs[::-1]):
        layer = edited.ops.get(name)
        if layer is None or layer.kind not in FUSING or _is_fused(layer) or name == residual:
            continue
        if edited.only_reader(layer, op):
            merged = replace(layer, output=op.output, inputs=(*layer.inputs, residual))
            edited.merge(layer, op, merged.with_attributes(activation=op.activation))
            return True
    return False


def _fuse_gate(edited: Editor, op: Op) -> bool:
    """The factors of a gate become part of the convolution whose channels they scale."""
    if op.kind != "scale":
        return False
    conv, factors = edited.ops.get(op.inputs[0]), op.inputs[1]
    if conv is None or conv.kind != "conv2d" or conv.attributes["groups"] > 1 or _is_fused(conv):
        return False
    if not edited.only_reader(conv, op) or not _divides(edited, factors, op.output):
        return False
    merged = replace(conv, kind="gated_conv2d", output=op.output, inputs=(conv.inputs[0], factors))
    edited.merge(conv, op, merged.with_attributes(gate=True, live=False))
    return True


def _skip_silent(edited: Editor, op: Op) -> bool:
    """A convolution of what a gate has silenced reads the channels that live."""
    if op.kind not in ("conv2d", "gated_conv2d") or op.attributes["groups"] > 1 or op.attributes.get("live"):
        return False
    factors = _silencing(edited, op.inputs[0])
    if factors is None or not _divides(edited, factors, op.inputs[0]):
        return False
    gated = op.attributes.get("gate", False)
    inputs = (*op.inputs[: 1 + gated], factors, *op.inputs[1 + gated :])
    edited.replace(op, replace(op, kind="gated_conv2d", inputs=inputs).with_attributes(gate=gated, live=True))
    return True


def _silencing(edited: Editor, name: str) -> str | None:
    """The factors where zero means that a channel of the value is zero everywhere."""
    source = edited.ops.get(name)
    while source is not None and source.kind in ("activation", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"):
        if source.kind == "activation" and source.attributes["name"] not in KEEPS_ZERO:
            return None
        source = edited.ops.get(source.inputs[0])
    if source is None or source.kind != "gated_conv2d" or not source.attributes["gate"]:
        return None
    kept = residual_of(source) is None and source.activation in (None, *KEEPS_ZERO)
    return source.inputs[1] if kept else None


def _divides(edited: Editor, factors: str, channels: str) -> bool:
    """Whether there is one factor for so many channels each."""
    given, shape = edited.shapes[factors], edited.shapes[channels]
    return given[0] == shape[0] and given[1] > 0 and shape[1] % given[1] == 0


def _merge_reshapes(edited: Editor, op: Op) -> bool:
    """Of two reshapes in a row the first does not matter; one to the same shape does nothing."""
    if op.kind != "reshape":
        return False
    source = op.inputs[0]
    before = edited.ops.get(source)
    if before is not None and before.kind == "reshape":
        edited.replace(op, replace(op, inputs=before.inputs))
        return True
    given, shape = edited.shapes[source], edited.shapes[op.output]
    if shape == given:
        return edited.bypass(op, source)
    if before is None or before.kind != "global_avg_pool" or shape != given[:2] or not edited.only_reader(before, op):
        return False
    edited.merge(before, op, replace(before.with_attributes(keepdim=False), output=op.output))
    return True


def _interleave_gates(edited: Editor, op: Op) -> bool:
    """A unit's gates become neighbours in the recurrent weight and in the Linear that projects the input."""
    if op.kind != "recurrent" or op.attributes["interleaved"]:
        return False
    linear = edited.ops.get(op.inputs[0])
    if linear is None or linear.kind != "linear" or _is_fused(linear) or not edited.only_reader(linear, op):
        return False
    gates = GATES[op.attributes["cell"]]
    for each in (linear, op):
        turned = {role: by_unit(value, gates) for role, value in edited.weights(each).items()}
        each = edited.with_weights(each, **turned)
        edited.ops[each.output] = each if each.output != op.output else each.with_attributes(interleaved=True)
    edited.prune()
    return True


def _drop_silent_units(edited: Editor, op: Op) -> bool:
    """Units whose state is always 0 are not computed, and what reads them has zeros for them."""
    if op.kind != "recurrent" or not op.attributes["interleaved"] or len(op.inputs) > 1 or op.attributes["units"]:
        return False
    linear = edited.ops.get(op.inputs[0])
    if linear is None or linear.kind != "linear" or not edited.only_reader(linear, op):
        return False
    gates = GATES[op.attributes["cell"]]
    new = 2  # the gate that writes: without it nothing ever differs from the zeros at the beginning
    written = [
        value.unflatten(0, (-1, gates))[:, new].reshape(len(value) // gates, -1).any(dim=1)
        for each in (linear, op)
        for value in edited.weights(each).values()
    ]
    live = torch.stack(written).any(dim=0)
    if live.all():
        return False
    if not live.any():
        live[0] = True  # no layer is without units
    rows = live.repeat_interleave(gates)
    for each in (linear, op):
        kept = {role: value[rows] for role, value in edited.weights(each).items()}
        if each is op:
            kept["weight"] = kept["weight"].masked_fill(~live, 0.0)
        edited.ops[each.output] = edited.with_weights(each, **kept)
    units = live.nonzero().flatten().tolist()
    edited.ops[op.output] = edited.ops[op.output].with_attributes(units=units)
    edited.prune()
    edited.shapes = infer_shapes(edited.graph())
    return True


def _read_live_units(edited: Editor, op: Op) -> bool:
    """A Linear that reads states needs no weights for the units that are always 0."""
    if op.kind != "linear":
        return False
    source = edited.ops.get(op.inputs[0])
    while source is not None and source.kind == "torch" and _keeps_features(source, edited):
        source = edited.ops.get(source.attributes["args"][0]["ref"])
    if source is None or source.kind != "recurrent" or source.attributes["units"] is None:
        return False
    weight = edited.weight(op, "weight")
    dead = torch.ones(weight.shape[1], dtype=torch.bool)
    dead[source.attributes["units"]] = False
    if not weight[:, dead].any():
        return False
    edited.replace(op, edited.with_weights(op, weight=weight.masked_fill(dead, 0.0)))
    return True


def _keeps_features(op: Op, edited: Editor) -> bool:
    """Whether an operator only picks positions, each with all its features on the last axis."""
    a = op.attributes
    if a["op"] not in _PICKING or not isinstance(a["args"][0], dict):
        return False
    axes = len(edited.shapes[a["args"][0]["ref"]])
    return len(a["args"]) > 1 and type(a["args"][1]) is int and a["args"][1] % axes != axes - 1


_PICKING = ("aten.select.int", "aten.slice.Tensor", "aten.gather.default", "aten.index_select.default")


def bypass_branch(edited: Editor, op: Op) -> bool:
    """Leaves the residual alone of a layer and the residual added to it; False where there is none to take over."""
    if op.kind not in LAYERS or len(op.inputs) != 2 or edited.shapes[op.inputs[1]] != edited.shapes[op.output]:
        return False
    residual = op.inputs[1]
    if op.activation is None:
        return edited.bypass(op, residual)
    edited.replace(op, Op("activation", op.output, (residual,), {"name": op.activation}))
    return True


def _drop_zero_branch(edited: Editor, op: Op) -> bool:
    """A layer that adds zeros to a residual goes, and what only it reads with it."""
    if op.kind not in LAYERS or any(bool(value.any()) for value in edited.weights(op).values()):
        return False
    return bypass_branch(edited, op)


_PASSES: tuple[Callable[[Editor, Op], bool], ...] = (
    _fold_norm,
    _interleave_gates,
    _drop_silent_units,
    _read_live_units,
    _fuse_gate,
    _fuse_activation,
    _fuse_add,
    _skip_silent,
    _merge_reshapes,
    _drop_zero_branch,
)
