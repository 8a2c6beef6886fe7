"""Lowers what works on one position at a time, wherever it lies: sums, products, copies, concatenations.

Values are read where they are, a feature map through its strides, and the result is written in rows; maps that are
concatenated by channel become a map again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autoprune.repack.graph import aten
from autoprune.repack.graph.ops import Activation, Add, Op, Reshape, TorchOp
from autoprune.repack.graph.reference import evaluate_op
from autoprune.repack.lowering import byte_map_rules, map_nodes, map_rules, matrices, strided_nodes
from autoprune.repack.lowering.buffers import Buffer
from autoprune.repack.lowering.context import fitting, operand, picked, write
from autoprune.repack.lowering.layout import LONG_FLOATS
from autoprune.repack.lowering.steps import NativeStep, View, contiguous_strides, is_float, storage_of
from autoprune.repack.native.op import NativeOp

if TYPE_CHECKING:
    from autoprune.repack.lowering.context import Lowering

_OPERATIONS: Mapping[str, str] = {f"aten.{name}.Tensor": name for name in ("add", "sub", "mul", "div")}

_FUNCTIONS: Mapping[str, str] = {
    f"aten.{name}.default": name for name in ("exp", "sqrt", "rsqrt", "neg", "abs", "square", "reciprocal")
}
_POWER = "aten.pow.Tensor_Scalar"
_POWERS: Mapping[Any, str] = {2: "square", 3: "cube", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
_COPIES = ("aten.reshape.default", "aten.clone.default", "aten.contiguous.default")


def in_rows(lowering: Lowering, op: Activation | Add) -> bool:
    """An activation, or the sum of two values; False when torch has to run it."""
    return _computed(lowering, op, op.inputs, "add" if isinstance(op, Add) else "", op.last_activation)


def torch_operator(lowering: Lowering, op: TorchOp) -> bool:
    """One of torch's operators; False when torch has to run it itself."""
    if op.op in _RULES:
        return _RULES[op.op](lowering, op)
    if op.op in _FUNCTIONS or op.op == _POWER:
        return _of_one(lowering, op)
    operation = _OPERATIONS.get(op.op)
    if operation is None or op.kwargs or len(op.args) != 2:
        return False
    given = [each["ref"] if isinstance(each, dict) and "ref" in each else each for each in op.args]
    return _computed(lowering, op, given, operation, None)


def _of_one(lowering: Lowering, op: TorchOp) -> bool:
    """A function of one value."""
    if op.op == _POWER and type(op.args[1]) not in (int, float):
        return False  # known at a call alone, or infinite
    function = _FUNCTIONS.get(op.op) if op.op != _POWER else _POWERS.get(op.args[1])
    given = op.args[0]["ref"]
    if function is None or op.kwargs or not is_float(lowering.values[given]):
        return False
    return _computed(lowering, op, [given], "", function)


def _picked(lowering: Lowering, op: TorchOp) -> bool:
    """One of two values, or numbers, by booleans: ``where`` and ``masked_fill``."""
    args = op.named_args()
    roles = ("mask", "value", "self") if op.op == "aten.masked_fill.Scalar" else ("condition", "self", "other")
    given = [args[role] for role in roles]
    given = [aten.decode(each, {}) if isinstance(each, dict) and "ref" not in each else each for each in given]
    names = [each["ref"] if isinstance(each, dict) else each for each in given]
    meta = evaluate_op(op, lowering.values, lowering.constants)
    return is_float(meta) and picked(lowering, op.output, names[0], names[1:])


def is_copy(op: Op) -> bool:
    """Whether it gives its input's entries in their order."""
    return isinstance(op, Reshape) or (isinstance(op, TorchOp) and op.op in _COPIES)


def _computed(lowering: Lowering, op: Op, given: Sequence[Any], operation: str, activation: str | None) -> bool:
    operands = [each for each in (operand(lowering, each) for each in given) if each is not None]
    if len(operands) < len(given):
        return False
    shape = tuple(torch.broadcast_shapes(*(each.shape for each in operands)))
    if not fitting(shape, operands):
        return False
    meta = lowering.define(op.output, shape)
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())
    write(
        lowering, op.output, shape, operands, View(buffer, 0, shape, contiguous_strides(shape)), operation, activation
    )
    return True


def _concatenated(lowering: Lowering, op: TorchOp) -> bool:
    """Each part is copied to its place."""
    if op.kwargs or not op.inputs:
        return False
    names = [each["ref"] for each in op.args[0]]
    meta = evaluate_op(op, lowering.values, lowering.constants)
    axis = (op.args[1] if len(op.args) > 1 else 0) % max(1, meta.dim())
    if meta.dim() != 1:  # torch leaves out empty ones of one axis, as caches of keys begin
        names = [name for name in names if lowering.values[name].shape != (0,)]
    shapes = [tuple(lowering.values[name].shape) for name in names]
    if not all(is_float(value) for value in (meta, *(lowering.values[name] for name in names))):
        return False
    if byte_map_rules.joined(lowering, op, names, tuple(meta.shape), axis):
        return True
    as_map = [(name, (1, 1), 0.0) in lowering.maps for name in names]
    if meta.dim() == 4 and axis == 1 and any(as_map):
        made, first = lowering.new_map(op, tuple(meta.shape)), 0
        for name, shape in zip(names, shapes, strict=True):
            lowering.copy_into(name, made, first)
            first += shape[1]
        if all(name in lowering.positive for name in names):
            lowering.positive.add(op.output)
        return True
    operands = [each for each in (operand(lowering, name) for name in names) if each is not None]
    if len(operands) < len(names) or not all(fitting(each.shape, [each]) for each in operands):
        return False
    buffer = Buffer(meta.numel())
    lowering.buffers[storage_of(lowering.define(op.output, tuple(meta.shape)))] = buffer
    strides, start = contiguous_strides(meta.shape), 0
    for each in operands:
        view = View(buffer, start * strides[axis], each.shape, strides)
        write(lowering, op.output, each.shape, [each], view, "", None)
        start += each.shape[axis]
    return True


def _looked_up(lowering: Lowering, op: TorchOp) -> bool:
    """Rows of a constant table by an input of int64, which is checked at each call."""
    table, index = (each["ref"] for each in op.args[:2])
    values = lowering.values
    known = table in lowering.constants and is_float(values[table]) and values[table].is_contiguous()
    if not known or values[index].dtype != torch.int64 or index not in lowering.input_slots:
        return False
    rows, features = values[table].shape
    meta = lowering.define(op.output, (*values[index].shape, features))
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())
    given, told, count = lowering.plain(table), lowering.plain(index), values[index].numel()
    slot = lowering.input_slots[index]
    lowering.limits[slot] = min(rows, lowering.limits.get(slot, rows))

    def build(*_: Any) -> NativeOp:
        x_at, index_at = replace(given.ref(), strides=(0, features)), replace(told.ref(), strides=(0, 1))
        return strided_nodes.taken(
            op.output, (1, count, features), x_at, index_at, buffer.ref(), None, lowering.target
        )  # fmt: skip

    lowering.steps.append(NativeStep(op.output, [given.buffer, told.buffer], buffer, build))
    return True


def _taken(lowering: Lowering, op: TorchOp) -> bool:
    """Whole rows of a value, by numbers that are the same for all of a row's features."""
    args = op.args
    if op.kwargs or len(args) != 3:
        return False
    (x, index), axis = ((lowering.values[each["ref"]] for each in (args[0], args[2])), args[1])
    meta = evaluate_op(op, lowering.values, lowering.constants)
    if not is_float(x) or index.dtype != torch.int64 or x.dim() not in (2, 3) or not x.numel() or not meta.numel():
        return False
    features = meta.shape[-1]
    whole = features == 1 or (index.stride(-1) == 0 and x.stride(-1) == 1)
    if axis % x.dim() != x.dim() - 2 or not whole:
        return False
    if lowering.wrong is None:
        lowering.wrong = lowering.scratch(LONG_FLOATS)
    given, told, wrong = lowering.plain(args[0]["ref"]), lowering.plain(args[2]["ref"]), lowering.wrong
    made = lowering.define(op.output, tuple(meta.shape))
    buffer = lowering.buffers[storage_of(made)] = Buffer(made.numel())
    batch, rows = (1, *meta.shape)[-3:-1]

    def strides(value: Tensor) -> tuple[int, ...]:
        return (0, *value.stride())[-3:-1]

    at_x, at_index = strides(x), strides(index)
    limit = x.shape[-2]

    def build(*_: Any) -> NativeOp:
        x_at, index_at = replace(given.ref(), strides=at_x), replace(told.ref(), strides=at_index)
        check = strided_nodes.IndexCheck(wrong.ref(), limit)
        return strided_nodes.taken(
            op.output, (batch, rows, features), x_at, index_at, buffer.ref(), check, lowering.target
        )  # fmt: skip

    lowering.steps.append(NativeStep(op.output, [given.buffer, told.buffer, wrong], buffer, build))
    return True


_RULES: Mapping[str, Callable[[Lowering, TorchOp], bool]] = {
    "aten.cat.default": _concatenated,
    "aten.embedding.default": _looked_up,
    "aten.gather.default": _taken,
    **dict.fromkeys(("aten.matmul.default", "aten.bmm.default", "aten.mm.default"), matrices.product),
    **dict.fromkeys(("aten.softmax.int", "aten._softmax.default"), matrices.softmax),
    **dict.fromkeys(("aten.mean.dim", "aten.sum.dim_IntList"), matrices.total),
    "aten.stack.default": matrices.stack,
    **dict.fromkeys((f"aten.where.{name}" for name in ("self", "Scalar", "ScalarSelf", "ScalarOther")), _picked),
    "aten.masked_fill.Scalar": _picked,
    "aten.group_norm.default": map_rules.group_norm,
    **dict.fromkeys(("aten.upsample_nearest2d.vec", "aten.upsample_bilinear2d.vec"), map_rules.resized),
    **dict.fromkeys(("aten.pad.default", "aten.constant_pad_nd.default"), map_rules.padded),
    "aten.adaptive_max_pool2d.default": map_rules.adaptive_max,
}


def elementwise(lowering: Lowering, op: Activation | Add) -> bool:
    """On maps, or on values that lie in rows."""
    shape = tuple(lowering.values[op.inputs[0]].shape)
    if isinstance(op, Add) and byte_map_rules.added(lowering, op):
        return True
    if not all((name, (1, 1), 0.0) in lowering.maps for name in op.inputs):
        return in_rows(lowering, op)
    lowering.same_shape(op, op.inputs[-1], shape)
    given = [lowering.map(name) for name in op.inputs]
    made = lowering.new_map(op, shape)
    for each in given:
        made.pitch.join(each.pitch)
    made.over = given[-1]

    def build(*_: Any) -> NativeOp:
        other = given[1].at if len(given) > 1 else None
        return map_nodes.combine(op.output, shape[0], given[0].at, other, made.at, op.last_activation, lowering.target)

    lowering.steps.append(NativeStep(op.output, [each.buffer for each in given], made.buffer, build))
    return True
