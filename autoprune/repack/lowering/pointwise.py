"""Lowers what works on one position at a time, wherever it lies: sums, products, copies, concatenations.

Values are read where they are, a feature map through its strides, and the result is written in rows; maps that are
concatenated by channel become a map again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from autoprune.repack.graph.ops import Activation, Add, Op, Reshape, TorchOp
from autoprune.repack.graph.reference import evaluate_op
from autoprune.repack.kernels.entries import COMPARISONS, OPERATIONS
from autoprune.repack.lowering import (
    byte_map_rules,
    lookups,
    map_nodes,
    map_rules,
    matrices,
    moves,
    reductions,
)
from autoprune.repack.lowering.context import fitting, operands, picked, value_of, write
from autoprune.repack.lowering.steps import NativeStep, is_float
from autoprune.repack.lowering.strided_nodes import ENTRIES, Function
from autoprune.repack.native.op import NativeOp

if TYPE_CHECKING:
    from autoprune.repack.lowering.context import Lowering

_NAMES: Mapping[str, Sequence[str]] = {
    **{name: (name,) for name in ("add", "sub", "mul", "div", "maximum", "minimum", "floor_divide", "remainder")},
    **{name: (name, f"__{name}__", f"bitwise_{name}", f"logical_{name}") for name in ("and", "or", "xor")},
    **{name: (name,) for name in COMPARISONS},
}
_OPERATIONS: Mapping[str, str] = {
    "aten.max.other": "maximum", "aten.min.other": "minimum",
    **{
        f"aten.{called}.{overload}": name
        for name, names in _NAMES.items() for called in names for overload in ("Tensor", "Scalar", "default")
    },
}  # fmt: skip
"""Operator -> what becomes of two values: a row of `entries.OPERATIONS` or `entries.COMPARISONS`."""

_FUNCTIONS: Mapping[str, str] = {
    f"aten.{name}.default": name
    for name in (
        "exp", "sqrt", "rsqrt", "neg", "abs", "square", "reciprocal", "sign", "round", "floor", "ceil", "trunc", "erf",
        "log", "sin", "cos",
    )
}  # fmt: skip
_POWER = "aten.pow.Tensor_Scalar"
_POWERS: Mapping[Any, str] = {1: "", 2: "square", 3: "cube", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
_COPIES = ("aten.reshape.default", "aten.clone.default", "aten.contiguous.default")


def in_rows(lowering: Lowering, op: Activation | Add) -> bool:
    """An activation, or the sum of two values; False when torch has to run it."""
    find = Function("add" if isinstance(op, Add) else "", op.last_activation, torch.float32)
    return _computed(lowering, op, op.inputs, find, torch.float32)


def torch_operator(lowering: Lowering, op: TorchOp) -> bool:
    """One of torch's operators; False when torch has to run it itself."""
    if op.op in _RULES:
        return _RULES[op.op](lowering, op)
    return _of_two(lowering, op) if op.op in _OPERATIONS else False


def _given(op: TorchOp, *roles: str) -> list[Any]:
    """Arguments: names of values, and numbers."""
    args = op.named_args()
    return [value_of(args.get(role)) for role in roles]


def _of_two(lowering: Lowering, op: TorchOp) -> bool:
    """Of two values, or a value and a number."""
    operation, made = _OPERATIONS[op.op], evaluate_op(op, lowering.values, lowering.constants)
    if len(op.args) != 2 or op.named_args().get("alpha", 1) != 1 or set(op.kwargs) - {"alpha"}:
        return False
    given = [value_of(each) for each in op.args]
    computed = made.dtype
    if "logical" in op.op:
        computed = torch.bool
    elif operation in COMPARISONS:
        values = [lowering.values[each] if isinstance(each, str) else each for each in given]
        computed = torch.result_type(*values)
    divides = operation in ("floor_divide", "remainder")
    if divides and not (type(given[1]) is int and given[1] > 0):  # the CPU stops where 0 divides
        return False
    return _computed(lowering, op, given, Function(operation, None, computed), made.dtype)


def _of_one(lowering: Lowering, op: TorchOp) -> bool:
    """A function of one value."""
    function, given = _FUNCTIONS.get(op.op), value_of(op.args[0])
    if op.op == _POWER:
        if type(op.args[1]) not in (int, float):
            return False  # known at a call alone, or infinite
        function = _POWERS.get(op.args[1])
    dtype = lowering.values[given].dtype
    if function == "neg" and dtype in (torch.int64, torch.int32):
        return _computed(lowering, op, [0, given], Function("sub", None, dtype), dtype)
    if function is None or op.kwargs or dtype != torch.float32:
        return False
    return _computed(lowering, op, [given], Function("", function, dtype), dtype)


def _clamped(lowering: Lowering, op: TorchOp) -> bool:
    """Between two numbers, or above or below one."""
    args = op.named_args()
    if op.op == "aten.clamp_min.default":
        args["max"] = None
    elif op.op == "aten.clamp_max.default":
        args["min"] = None
    elif op.op == "aten.hardtanh.default":
        args = {"min": args.get("min_val", -1), "max": args.get("max_val", 1), "self": args["self"]}
    low, high = value_of(args.get("min")), value_of(args.get("max"))
    if not is_float(lowering.values[value_of(args["self"])]) or any(isinstance(each, str) for each in (low, high)):
        return False
    bounds = float(-math.inf if low is None else low), float(math.inf if high is None else high)
    if any(math.isnan(each) for each in bounds):
        return False
    find = Function("", None, torch.float32, bounds)
    return _computed(lowering, op, [value_of(args["self"])], find, torch.float32)


def _picked(lowering: Lowering, op: TorchOp) -> bool:
    """One of two values, or numbers, by booleans: ``where`` and ``masked_fill``."""
    roles = ("mask", "value", "self") if "masked_fill" in op.op else ("condition", "self", "other")
    condition, *given = _given(op, *roles)
    made = evaluate_op(op, lowering.values, lowering.constants)
    return isinstance(condition, str) and picked(lowering, op.output, condition, given, made.dtype)


def _not(lowering: Lowering, op: TorchOp) -> bool:
    """The other boolean; of integers all bits, or whether they are 0."""
    given = value_of(op.args[0])
    dtype = lowering.values[given].dtype
    if op.op == "aten.logical_not.default":
        return _computed(lowering, op, [given, 0], Function("eq", None, dtype), torch.bool)
    return _computed(lowering, op, [given, 1 if dtype == torch.bool else -1], Function("xor", None, dtype), dtype)


def _turned_round(lowering: Lowering, op: TorchOp) -> bool:
    """A number minus a value."""
    (one, other), made = _given(op, "other", "self"), evaluate_op(op, lowering.values, lowering.constants)
    if op.named_args().get("alpha", 1) != 1:
        return False
    return _computed(lowering, op, [one, other], Function("sub", None, made.dtype), made.dtype)


def _cast(lowering: Lowering, op: TorchOp) -> bool:
    """The same numbers in another type."""
    given, made = value_of(op.named_args()["self"]), evaluate_op(op, lowering.values, lowering.constants)
    if lowering.values[given].dtype == made.dtype and "_to_copy" not in op.op:
        return False  # it is the value itself
    return _computed(lowering, op, [given], Function("", None, made.dtype), made.dtype)


def is_copy(op: Op) -> bool:
    """Whether it gives its input's entries in their order."""
    return isinstance(op, Reshape) or (isinstance(op, TorchOp) and op.op in _COPIES)


def _computed(lowering: Lowering, op: Op, given: Sequence[Any], find: Function, dtype: torch.dtype) -> bool:
    """The value of `dtype` that a function makes of one or two; False where no kernel does."""
    if dtype not in ENTRIES or find.computed not in ENTRIES:
        return False
    known = find.operation in COMPARISONS or find.operation in ("", *OPERATIONS[ENTRIES[find.computed]])
    found = operands(lowering, given, find.computed) if known else None
    if found is None:
        return False
    shape = tuple(torch.broadcast_shapes(*(each.shape for each in found)))
    if not fitting(shape, found):
        return False
    write(lowering, op.output, shape, found, lowering.made(op.output, shape, dtype), find)
    return True


_RULES: Mapping[str, Callable[[Lowering, TorchOp], bool]] = {
    **dict.fromkeys((*_FUNCTIONS, _POWER), _of_one),
    **dict.fromkeys((f"aten.{name}.default" for name in ("clamp", "clamp_min", "clamp_max", "hardtanh")), _clamped),
    **dict.fromkeys(("aten.logical_not.default", "aten.bitwise_not.default"), _not),
    "aten.rsub.Scalar": _turned_round,
    **dict.fromkeys(("aten.to.dtype", "aten._to_copy.default"), _cast),
    **dict.fromkeys((f"aten.where.{name}" for name in ("self", "Scalar", "ScalarSelf", "ScalarOther")), _picked),
    **dict.fromkeys(("aten.masked_fill.Scalar", "aten.masked_fill.Tensor"), _picked),
    **moves.RULES,
    **lookups.RULES,
    **reductions.RULES,
    **dict.fromkeys(("aten.matmul.default", "aten.bmm.default", "aten.mm.default"), matrices.product),
    "aten.group_norm.default": map_rules.group_norm,
    **dict.fromkeys(("aten.upsample_nearest2d.vec", "aten.upsample_bilinear2d.vec"), map_rules.resized),
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
    made.over = tuple(given)

    def build(*_: Any) -> NativeOp:
        other = given[1].at if len(given) > 1 else None
        return map_nodes.combine(op.output, shape[0], given[0].at, other, made.at, op.last_activation, lowering.target)

    lowering.steps.append(NativeStep(op.output, [each.buffer for each in given], made.buffer, build))
    return True
