"""Passes that recognise what a model writes out by itself: attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autoprune.repack.graph import aten
from autoprune.repack.graph.editor import Editor, meta_values
from autoprune.repack.graph.ops import Add, Attention, Op, TorchOp

_PRODUCTS = ("aten.matmul.default", "aten.bmm.default")
_SOFTMAX = ("aten.softmax.int", "aten._softmax.default")
_SCALES = ("aten.mul.Tensor", "aten.div.Tensor")
_LOW = -1e30  # what stands for minus infinity: a score that is added to it vanishes in float32


def fuse_attention(edited: Editor, op: Op) -> bool:
    """``softmax(q k * scale + bias) v``: products, scale, mask and softmax become one operation."""
    shares, values = _operands(edited, op)
    if not isinstance(shares, TorchOp) or shares.op not in _SOFTMAX or not edited.only_reader(shares, op):
        return False
    args, scores = shares.named_args(), edited.ops.get(shares.inputs[0])
    axes = len(edited.shapes[shares.output])
    if args["dim"] % axes != axes - 1 or args.get("dtype") is not None or args.get("half_to_float"):
        return False
    made: list[Op] = []
    scores, bias = _without_bias(edited, scores, shares, made, op.output)
    scores, scale = _without_scale(edited, scores)
    _, keys = _operands(edited, scores)
    if not isinstance(scores, TorchOp) or keys is None or values is None:
        return False
    queries = scores.args[0]["ref"]
    q, k, v = (edited.shapes[name] for name in (queries, keys, values))
    if len(q) < 3 or q[:-2] != k[:-2] or k[:-2] != v[:-2]:
        return False
    turned = edited.free_name(f"{op.output} keys")
    made.append(TorchOp.of(turned, "aten.transpose.int", ({"ref": keys}, -2, -1)))
    inputs = (queries, turned, values, *([] if bias is None else [bias]))
    edited.expand(op, [*made, Attention(op.output, inputs, scale=scale)])
    return True


def _operands(edited: Editor, op: Op | None) -> tuple[Op | None, str | None]:
    """What defines the left operand of a product of two values, and the right operand's name."""
    if not isinstance(op, TorchOp) or op.op not in _PRODUCTS or op.kwargs:
        return None, None
    left, right = (each["ref"] for each in op.args)
    if left in edited.constants or right in edited.constants:
        return None, None
    return edited.ops.get(left), right


def _without_bias(
    edited: Editor, scores: Op | None, reader: Op, made: list[Op], name: str
) -> tuple[Op | None, str | None]:
    """What scores are without what is added to them, and that; `made` gets the operations that it takes."""
    if scores is None or not edited.only_reader(scores, reader):
        return scores, None
    if isinstance(scores, TorchOp) and scores.op == "aten.masked_fill.Scalar":
        low = aten.decode(scores.args[2], {})
        same = edited.shapes.get(scores.args[0]["ref"]) == edited.shapes[scores.output]
        if isinstance(low, (int, float)) and low <= _LOW and same:
            bias = edited.free_name(f"{name} bias")
            made.append(TorchOp.of(bias, "aten.where.Scalar", (scores.args[1], scores.args[2], 0.0)))
            return edited.ops.get(scores.args[0]["ref"]), bias
    plain = isinstance(scores, TorchOp) and scores.op == "aten.add.Tensor" and not scores.kwargs
    if not (plain or (isinstance(scores, Add) and scores.activation is None)) or len(scores.inputs) != 2:
        return scores, None
    for given, bias in (scores.inputs, scores.inputs[::-1]):
        before, _ = _without_scale(edited, edited.ops.get(given))
        alone = given in edited.ops and edited.only_reader(edited.ops[given], scores)
        whole = given in edited.shapes and edited.shapes[given] == edited.shapes[scores.output]
        if alone and whole and _operands(edited, before)[1] is not None and _is_float(edited, bias):
            return edited.ops[given], bias
    return scores, None


def _is_float(edited: Editor, name: str) -> bool:
    value = edited.constants.get(name)
    value = meta_values(edited.graph())[name] if value is None else value
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _without_scale(edited: Editor, scores: Op | None) -> tuple[Op | None, float]:
    """What scores are before they are multiplied by a number, and the number."""
    if not isinstance(scores, TorchOp) or scores.op not in _SCALES or scores.kwargs or len(scores.args) != 2:
        return scores, 1.0
    factor: Any = scores.args[1]
    before = edited.ops.get(scores.args[0]["ref"]) if isinstance(scores.args[0], dict) else None
    if type(factor) not in (int, float) or not factor or before is None or not edited.only_reader(before, scores):
        return scores, 1.0
    return before, float(factor) if scores.op == "aten.mul.Tensor" else 1.0 / factor
