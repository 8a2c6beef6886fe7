"""Making a graph smaller without changing what it computes, up to the last bits of float32.

Batch norms go into the layers beside them (see `norms`), borders of zeros into convolutions (`borders`), activations
and residual sums into what they follow, reshapes into each other, and channels that nobody needs away (`channels`).
What the graph returns is never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from autoprune.model.recurrent.names import GATES, by_unit
from autoprune.repack.debug import dump, dumping, verifying
from autoprune.repack.graph.activations import KEEPS_ZERO
from autoprune.repack.graph.borders import fold_border
from autoprune.repack.graph.channels import drop_dead_channels
from autoprune.repack.graph.editor import Editor, infer_shapes, meta_values
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.norms import (
    fold_norm,
    fold_norm_forward,
    fold_norm_of_tokens,
    fold_norm_of_videos,
    standalone_norm,
)
from autoprune.repack.graph.ops import (
    Activation,
    AdaptiveAvgPool2d,
    Add,
    Conv2d,
    ConvolutionOp,
    FusedLayerOp,
    GatedConv2d,
    GlobalAvgPool,
    Linear,
    Op,
    Recurrent,
    Reshape,
    Scale,
    TorchOp,
    WindowPoolOp,
)
from autoprune.repack.graph.schema import validate
from autoprune.repack.graph.written_functions import fuse_gelu, fuse_rms_norm, fuse_rotary
from autoprune.repack.graph.written_out import fuse_attention


def simplify(graph: Graph) -> Graph:
    """Applies every pass until none finds anything more to do."""
    dump("captured", graph)
    edited = Editor(graph)
    for step in (*_PASSES, standalone_norm):
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


def _fuse_activation(edited: Editor, op: Op) -> bool:
    """An activation becomes part of the layer or sum whose only reader it is."""
    if not isinstance(op, Activation):
        return False
    before = edited.ops.get(op.inputs[0])
    if not isinstance(before, (FusedLayerOp, Add)) or before.activation is not None:
        return False
    if not edited.only_reader(before, op):
        return False
    edited.merge(before, op, replace(before, activation=op.name, output=op.output))
    return True


def _fuse_add(edited: Editor, op: Op) -> bool:
    """A sum becomes the residual of the layer it alone reads; the layer then runs in the sum's place."""
    if not isinstance(op, Add):
        return False
    for name, residual in (op.inputs, op.inputs[::-1]):
        layer = edited.ops.get(name)
        if not isinstance(layer, FusedLayerOp) or layer.is_fused or name == residual:
            continue
        if edited.only_reader(layer, op):
            inputs = (*layer.inputs, residual)
            edited.merge(layer, op, replace(layer, output=op.output, inputs=inputs, activation=op.activation))
            return True
    return False


def _fuse_gate(edited: Editor, op: Op) -> bool:
    """The factors of a gate become part of the convolution whose channels they scale."""
    if not isinstance(op, Scale):
        return False
    conv, factors = edited.ops.get(op.inputs[0]), op.inputs[1]
    if not isinstance(conv, Conv2d) or conv.groups > 1 or conv.is_fused:
        return False
    if not edited.only_reader(conv, op) or not _divides(edited, factors, op.output):
        return False
    edited.merge(conv, op, GatedConv2d.of(conv, op.output, (conv.inputs[0], factors), gate=True, live=False))
    return True


def _skip_silent(edited: Editor, op: Op) -> bool:
    """A convolution of what a gate has silenced reads the channels that live."""
    if not isinstance(op, ConvolutionOp) or op.groups > 1:
        return False
    gate, live = (op.gate, op.live) if isinstance(op, GatedConv2d) else (False, False)
    if live:
        return False
    factors = _silencing(edited, op.inputs[0])
    if factors is None or not _divides(edited, factors, op.inputs[0]):
        return False
    inputs = (*op.inputs[: 1 + gate], factors, *op.inputs[1 + gate :])
    edited.replace(op, GatedConv2d.of(op, op.output, inputs, gate=gate, live=True))
    return True


def _silencing(edited: Editor, name: str) -> str | None:
    """The factors where zero means that a channel of the value is zero everywhere."""
    source = edited.ops.get(name)
    while isinstance(source, (Activation, WindowPoolOp, AdaptiveAvgPool2d)):
        if isinstance(source, Activation) and source.name not in KEEPS_ZERO:
            return None
        source = edited.ops.get(source.inputs[0])
    if not isinstance(source, GatedConv2d):
        return None
    kept = source.residual is None and source.activation in (None, *KEEPS_ZERO)
    return source.filter_factors if kept else None


def _divides(edited: Editor, factors: str, channels: str) -> bool:
    """Whether there is one factor for so many channels each."""
    given, shape = edited.shapes[factors], edited.shapes[channels]
    return given[0] == shape[0] and given[1] > 0 and shape[1] % given[1] == 0


def _merge_reshapes(edited: Editor, op: Op) -> bool:
    """Of two reshapes in a row the first does not matter; one to the same shape does nothing."""
    if not isinstance(op, Reshape):
        return False
    source = op.inputs[0]
    before = edited.ops.get(source)
    if isinstance(before, Reshape):
        edited.replace(op, replace(op, inputs=before.inputs))
        return True
    given, shape = edited.shapes[source], edited.shapes[op.output]
    if shape == given:
        return edited.bypass(op, source)
    if not isinstance(before, GlobalAvgPool) or shape != given[:2] or not edited.only_reader(before, op):
        return False
    edited.merge(before, op, replace(before, keepdim=False, output=op.output))
    return True


def _reshape_last(edited: Editor, op: Op) -> bool:
    """An activation or a sum of what layers gave in another shape comes before the reshape, where it can be fused."""
    if not isinstance(op, (Activation, Add)):
        return False
    reshapes = [edited.ops.get(name) for name in op.inputs]
    known = [each for each in reshapes if isinstance(each, Reshape) and edited.only_reader(each, op)]
    sources = [edited.ops.get(each.inputs[0]) for each in known]
    alike = len({edited.shapes[each.inputs[0]] for each in known}) == 1
    fusing = any(isinstance(each, (FusedLayerOp, Add)) and each.activation is None for each in sources)
    if len(known) < len(reshapes) or not alike or not fusing:
        return False
    name = edited.free_name(f"{op.output} before")
    moved = replace(op, output=name, inputs=tuple(each.inputs[0] for each in known))
    edited.expand(op, [moved, replace(known[0], output=op.output, inputs=(name,))])
    return True


def _interleave_gates(edited: Editor, op: Op) -> bool:
    """A unit's gates become neighbours in the recurrent weight and in the Linear that projects the input."""
    if not isinstance(op, Recurrent) or op.interleaved:
        return False
    linear = edited.ops.get(op.inputs[0])
    if not isinstance(linear, Linear) or linear.is_fused or not edited.only_reader(linear, op):
        return False
    gates = GATES[op.cell]
    for each in (linear, op):
        turned = {role: by_unit(value, gates) for role, value in edited.weights(each).items()}
        each = edited.with_weights(each, **turned)
        edited.ops[each.output] = replace(each, interleaved=True) if isinstance(each, Recurrent) else each
    edited.prune()
    return True


def _drop_silent_units(edited: Editor, op: Op) -> bool:
    """Units whose state is always 0 are not computed, and what reads them has zeros for them."""
    if not isinstance(op, Recurrent) or not op.interleaved or len(op.inputs) > 1 or op.units:
        return False
    linear = edited.ops.get(op.inputs[0])
    if not isinstance(linear, Linear) or not edited.only_reader(linear, op):
        return False
    gates = GATES[op.cell]
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
        each = edited.with_weights(each, **kept)
        units = tuple(live.nonzero().flatten().tolist())
        edited.ops[each.output] = replace(each, units=units) if isinstance(each, Recurrent) else each
    edited.prune()
    edited.shapes = infer_shapes(edited.graph())
    return True


def _read_live_units(edited: Editor, op: Op) -> bool:
    """A Linear that reads states needs no weights for the units that are always 0."""
    if not isinstance(op, Linear):
        return False
    source = edited.ops.get(op.inputs[0])
    while isinstance(source, TorchOp) and _keeps_features(source, edited):
        source = edited.ops.get(source.args[0]["ref"])
    if not isinstance(source, Recurrent) or source.units is None:
        return False
    weight = edited.weight(op, "weight")
    dead = torch.ones(weight.shape[1], dtype=torch.bool)
    dead[list(source.units)] = False
    if not weight[:, dead].any():
        return False
    edited.replace(op, edited.with_weights(op, weight=weight.masked_fill(dead, 0.0)))
    return True


def _keeps_features(op: TorchOp, edited: Editor) -> bool:
    """Whether an operator only picks positions, each with all its features on the last axis."""
    if op.op not in _PICKING or not isinstance(op.args[0], dict):
        return False
    axes = len(edited.shapes[op.args[0]["ref"]])
    return len(op.args) > 1 and type(op.args[1]) is int and op.args[1] % axes != axes - 1


def _skip_empty(edited: Editor, op: Op) -> bool:
    """A value beside an empty one of one axis, as caches of keys begin, is the value itself."""
    if not isinstance(op, TorchOp) or op.op != "aten.cat.default" or len(edited.shapes[op.output]) == 1:
        return False
    names = [each["ref"] for each in op.args[0]]
    kept = [name for name in names if _shape(edited, name) != (0,)]
    if len(kept) != 1 or len(names) == 1 or kept[0] in edited.constants:
        return False
    values = meta_values(edited.graph())
    return bool(values[kept[0]].dtype == values[op.output].dtype) and edited.bypass(op, kept[0])


def _shape(edited: Editor, name: str) -> tuple[int, ...]:
    constant = edited.constants.get(name)
    return edited.shapes[name] if constant is None else tuple(constant.shape)


_PICKING = ("aten.select.int", "aten.slice.Tensor", "aten.gather.default", "aten.index_select.default")


def bypass_branch(edited: Editor, op: Op) -> bool:
    """Leaves the residual alone of a layer and the residual added to it; False where there is none to take over."""
    if (
        not isinstance(op, (Conv2d, Linear))
        or len(op.inputs) != 2
        or edited.shapes[op.inputs[1]] != edited.shapes[op.output]
    ):
        return False
    residual = op.inputs[1]
    if op.activation is None:
        return edited.bypass(op, residual)
    edited.replace(op, Activation(op.output, (residual,), name=op.activation))
    return True


def _drop_zero_branch(edited: Editor, op: Op) -> bool:
    """A layer that adds zeros to a residual goes, and what only it reads with it."""
    if not isinstance(op, (Conv2d, Linear)) or any(bool(value.any()) for value in edited.weights(op).values()):
        return False
    return bypass_branch(edited, op)


_PASSES: tuple[Callable[[Editor, Op], bool], ...] = (
    fuse_attention,
    fuse_rms_norm,
    fuse_gelu,
    fuse_rotary,
    _skip_empty,
    _merge_reshapes,
    fold_norm,
    fold_norm_of_tokens,
    fold_norm_of_videos,
    fold_norm_forward,
    fold_border,
    _reshape_last,
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
