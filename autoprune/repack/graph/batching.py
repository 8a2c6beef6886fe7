"""Whether a graph computes each sample of a batch alone, so that it may run sample by sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from autoprune.repack.graph import aten
from autoprune.repack.graph.editor import infer_shapes, unusual
from autoprune.repack.graph.ir import Graph, Op

Shapes = Mapping[str, tuple[int, ...]]


def apart(graph: Graph) -> bool:
    """Whether every sample of the outputs depends on the same sample of the inputs alone.

    Decided from what each operation is known to do: False wherever that is not known.
    """
    if not graph.inputs or not all(each.batched and each.free.count(0) == 1 for each in graph.inputs):
        return False
    shapes, batch = infer_shapes(graph), unusual(graph)[0]
    axes: dict[str, int | None] = {each.name: 0 for each in graph.inputs}  # None: the same for every sample
    axes |= dict.fromkeys(graph.constants)
    integers: set[str] = set()  # that depend on the batch's extent
    for op in graph.ops:
        if op.kind == "scalar":
            if op.attributes["fn"] != "size":
                integers |= {op.output} if integers & {*op.reads} else set()
            elif axes[op.inputs[0]] in (None, op.attributes["args"][1] % len(shapes[op.inputs[0]])):
                integers.add(op.output)
            continue
        rule = _TORCH.get(op.attributes["op"]) if op.kind == "torch" else _RULES.get(op.kind)
        if rule is None and op.kind == "torch" and _is_pointwise(op):
            rule = _aligned
        told = bool(integers & {*op.reads})  # they may tell the batch's extent
        if told and rule not in (_refolded, _repeated):
            return False
        axis = shapes[op.output].index(batch) if shapes[op.output].count(batch) == 1 else None
        if any(axes.get(name) is not None for name in op.reads):
            if axis is None or rule is None or not rule(op, axes, shapes, axis):
                return False
        elif told and (axis is None or rule is not _repeated):  # of constants alone: the same for every sample, or else
            return False
        axes[op.output] = axis
    return all(axes.get(name) == 0 for name in graph.output_names())


Rule = Callable[[Op, Mapping[str, int | None], Shapes, int], bool]
"""(operation, the batch's axis in every value, shapes, its axis in the output) -> whether samples stay apart."""


def _first(op: Op, axes: Mapping[str, int | None], shapes: Shapes, axis: int) -> bool:
    """All inputs have the batch first, and so has the output."""
    return axis == 0 and all(axes[name] == 0 for name in op.inputs)


def _not_last(op: Op, axes: Mapping[str, int | None], shapes: Shapes, axis: int) -> bool:
    """It works along the last axis, which is not the batch's."""
    alike = all(axes[name] == axis and len(shapes[name]) == len(shapes[op.output]) for name in op.inputs)
    return alike and axis < len(shapes[op.output]) - 1


def _outer(op: Op, axes: Mapping[str, int | None], shapes: Shapes, axis: int) -> bool:
    """Attention: the batch is one of the first two axes."""
    return axis < 2 and all(axes[name] == axis for name in op.inputs)


def _aligned(op: Op, axes: Mapping[str, int | None], shapes: Shapes, axis: int) -> bool:
    """An operation a position at a time, its operands repeated along the first axes where they are missing."""
    behind = len(shapes[op.output]) - axis
    places = [(name, axes[name]) for name in op.reads if name in axes]
    return all(at is None or len(shapes[name]) - at == behind for name, at in places)


def _repeated(op: Op, axes: Mapping[str, int | None], shapes: Shapes, axis: int) -> bool:
    """Repeated along some axes."""
    return _aligned(op, axes, shapes, axis)


def _refolded(op: Op, axes: Mapping[str, int | None], shapes: Shapes, axis: int) -> bool:
    """A reshape: what lies before the batch's axis stays before it."""
    source = next(name for name in op.reads if axes.get(name) is not None)
    before = shapes[source][: axes[source]]
    return math.prod(before) == math.prod(shapes[op.output][:axis])


def _moved(op: Op, axes: Mapping[str, int | None], shapes: Shapes, axis: int) -> bool:
    """Axes change places, come or go."""
    return True


def _beside(op: Op, axes: Mapping[str, int | None], shapes: Shapes, axis: int) -> bool:
    """It works along some axes, which its argument `dim` tells: not the batch's."""
    operator = aten.resolve(op.attributes["op"])
    named = dict(zip((argument.name for argument in operator._schema.arguments), op.attributes["args"], strict=False))
    named |= op.attributes["kwargs"]
    default = next((each.default_value for each in operator._schema.arguments if each.name == "dim"), None)
    dims = named.get("dim", default)
    if dims is None or dims == []:
        return False
    dims = dims if isinstance(dims, list) else [dims]
    given = [name for name in op.reads if name in axes]
    return all(
        axes[name] is not None and type(dim) is int and dim % len(shapes[name]) != axes[name]
        for name in given for dim in dims
    )  # fmt: skip


def _is_pointwise(op: Op) -> bool:
    return torch.Tag.pointwise in aten.resolve(op.attributes["op"]).tags


_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("conv2d", "gated_conv2d", "gate", "scale", "max_pool2d", "avg_pool2d", "global_avg_pool"), _first),
    "adaptive_avg_pool2d": _first,
    **dict.fromkeys(("linear", "layer_norm"), _not_last),
    **dict.fromkeys(("activation", "add"), _aligned),
    "attention": _outer,
    "reshape": _refolded,
}

_TORCH: Mapping[str, Rule] = {
    **dict.fromkeys(
        (
            "aten.transpose.int", "aten.permute.default", "aten.unsqueeze.default", "aten.movedim.int",
            "aten.t.default",
        ),
        _moved,
    ),
    **dict.fromkeys(
        (
            "aten.select.int", "aten.slice.Tensor", "aten.unbind.int", "aten.split.Tensor", "aten.cat.default",
            "aten.split_with_sizes.default", "aten.chunk.default", "aten.mean.dim", "aten.sum.dim_IntList",
            "aten.amax.default", "aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int",
            "aten.squeeze.dim", "aten.squeeze.dims",
        ),
        _beside,
    ),
    **dict.fromkeys(
        (
            "aten.reshape.default", "aten.view.default", "aten.flatten.using_ints", "aten.unflatten.int",
            "aten._unsafe_view.default",
        ),
        _refolded,
    ),
    "aten.embedding.default": lambda op, axes, shapes, axis: axes[op.attributes["args"][1]["ref"]] == axis,
    "aten.expand.default": _repeated,
    "aten.clone.default": _aligned,
    "aten.contiguous.default": _aligned,
    "aten.dropout.default": _aligned,
}  # fmt: skip
