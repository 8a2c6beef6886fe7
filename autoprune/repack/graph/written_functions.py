"""Passes that recognise functions which a model writes out by itself: RMS norm, GELU by tanh, rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from autoprune.repack.graph.editor import Editor
from autoprune.repack.graph.ops import Activation, Add, Op, RmsNorm, Rotary, TorchOp

_MUL, _ADD, _POWER = "aten.mul.Tensor", "aten.add.Tensor", "aten.pow.Tensor_Scalar"


def fuse_rms_norm(edited: Editor, op: Op) -> bool:
    """``x * rsqrt(mean(x ** 2) + eps)`` along the last axis; and an RMS norm times a weight of every feature."""
    for given, factor in _pairs(op, _MUL):
        eps = _of_mean_square(edited, edited.ops.get(factor), given)
        if eps is not None:
            edited.replace(op, RmsNorm(op.output, (given,), eps=eps))
            return True
        norm, weight = edited.ops.get(given), edited.constants.get(factor)
        if not isinstance(norm, RmsNorm) or norm.tensors or weight is None or not edited.only_reader(norm, op):
            continue
        if weight.dim() == 1 and weight.shape[0] == edited.shapes[given][-1] and weight.is_floating_point():
            edited.merge(norm, op, replace(norm, output=op.output, tensors={"weight": factor}))
            return True
    return False


def _of_mean_square(edited: Editor, root: Op | None, x: str) -> float | None:
    """Eps, where `root` is ``rsqrt(mean(x ** 2) + eps)``; None where it is not."""
    if not isinstance(root, TorchOp) or root.op != "aten.rsqrt.default":
        return None
    mean, eps = _numbered(edited.ops.get(root.inputs[0]), _ADD)
    average = edited.ops.get(mean)
    if not isinstance(average, TorchOp) or average.op != "aten.mean.dim" or eps is None or x not in edited.shapes:
        return None  # a constant has no shape there: this factor is the weight
    args, last = average.named_args(), len(edited.shapes[x]) - 1
    if [axis % (last + 1) for axis in args["dim"] or ()] != [last] or not args.get("keepdim") or args.get("dtype"):
        return None
    return eps if _is_power(edited, average.inputs[0], x, 2) else None


def fuse_gelu(edited: Editor, op: Op) -> bool:
    """``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))``."""
    for half, risen in _pairs(op, _MUL):
        (x, factor), (curve, one) = (
            _numbered(edited.ops.get(half), _MUL), _numbered(edited.ops.get(risen), _ADD)
        )  # fmt: skip
        tanh = edited.ops.get(curve)
        if factor != 0.5 or one != 1 or not isinstance(tanh, Activation) or tanh.name != "tanh":
            continue
        inner, slope = _numbered(edited.ops.get(tanh.inputs[0]), _MUL)
        if slope is not None and math.isclose(slope, math.sqrt(2 / math.pi), rel_tol=1e-6):
            for same, bent in _pairs(edited.ops.get(inner), _ADD):
                cube, share = _numbered(edited.ops.get(bent), _MUL)
                if same == x and share == 0.044715 and _is_power(edited, cube, x, 3):
                    edited.replace(op, Activation(op.output, (x,), name="gelu_tanh"))
                    return True
    return False


def fuse_rotary(edited: Editor, op: Op) -> bool:
    """``x * cos + cat((-b, a)) * sin``, a and b being the halves of x's features."""
    for straight, across in _pairs(op, _ADD):
        for x, cos in _pairs(edited.ops.get(straight), _MUL):
            for turned, sin in _pairs(edited.ops.get(across), _MUL):
                if edited.shapes.get(x) == edited.shapes[op.output] and _is_turned(edited, turned, x):
                    edited.replace(op, Rotary(op.output, (x, cos, sin)))
                    return True
    return False


def _is_turned(edited: Editor, name: str, x: str) -> bool:
    """Whether a value is the second half of x's features, negated, before the first half."""
    op, axes, features = edited.ops.get(name), len(edited.shapes[x]), edited.shapes[x][-1]
    if not isinstance(op, TorchOp) or op.op != "aten.cat.default" or op.kwargs or len(op.args[0]) != 2:
        return False
    minus, first = (each["ref"] for each in op.args[0])
    negated = edited.ops.get(minus)
    if not isinstance(negated, TorchOp) or negated.op != "aten.neg.default" or op.args[1:] not in ((-1,), (axes - 1,)):
        return False

    def is_part(part: str, start: int, end: int) -> bool:
        made = edited.ops.get(part)
        if not isinstance(made, TorchOp) or made.op != "aten.slice.Tensor" or made.inputs != (x,):
            return False
        args = made.named_args()
        given, last = args.get("start") or 0, args.get("end")
        whole = last is None or (type(last) is int and last >= features)
        along = args.get("dim", 0) % axes == axes - 1 and args.get("step", 1) == 1
        return along and given == start and (last == end or (end == features and whole))

    half = features // 2
    return features % 2 == 0 and is_part(negated.inputs[0], half, features) and is_part(first, 0, half)


def _is_power(edited: Editor, name: str, x: str, exponent: int) -> bool:
    """Whether a value is `x` to the power of `exponent`, 2 or 3, however it is written."""
    op = edited.ops.get(name)
    if isinstance(op, TorchOp) and op.op == _POWER:
        return op.inputs == (x,) and op.args[1] == exponent
    if isinstance(op, TorchOp) and op.op == "aten.square.default":
        return exponent == 2 and op.inputs == (x,)
    if exponent == 2:
        return any(pair == (x, x) for pair in _pairs(op, _MUL))
    return any(one == x and _is_power(edited, other, x, exponent - 1) for one, other in _pairs(op, _MUL))


def _pairs(op: Op | None, kind: str) -> Iterator[tuple[str, str]]:
    """The names of the two values that an operator joins, in either order; nothing where it is another one."""
    if isinstance(op, Add) and kind == _ADD and op.activation is None:
        yield from ((op.inputs[0], op.inputs[1]), (op.inputs[1], op.inputs[0]))
    if isinstance(op, TorchOp) and op.op == kind and not op.kwargs and len(op.args) == 2:
        names = [each["ref"] for each in op.args if isinstance(each, dict) and "ref" in each]
        if len(names) == 2:
            yield from ((names[0], names[1]), (names[1], names[0]))


def _numbered(op: Op | None, kind: str) -> tuple[str, float | None]:
    """The name of the value that an operator joins with a number, and the number; None where it is another one."""
    if not isinstance(op, TorchOp) or op.op != kind or op.kwargs or len(op.args) != 2:
        return "", None
    given: Any
    given, number = op.args
    if not isinstance(given, dict) or "ref" not in given or type(number) not in (int, float):
        return "", None
    return given["ref"], float(number)
