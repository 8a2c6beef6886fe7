"""Lowers what works on matrices that are computed: attention and products.

Operands are read where they lie; one whose rows do not lie together is copied first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from autoprune.repack.graph.ops import Attention, Rotary, TorchOp
from autoprune.repack.graph.reference import evaluate_op
from autoprune.repack.kernels.few_rows import few
from autoprune.repack.kernels.matmul import scratch as product_scratch
from autoprune.repack.lowering import matrix_nodes, strided_nodes, token_nodes
from autoprune.repack.lowering.buffers import Buffer, StridedRef
from autoprune.repack.lowering.context import picked
from autoprune.repack.lowering.matrix_nodes import Matrices
from autoprune.repack.lowering.steps import NativeStep, View, contiguous_strides, is_float, storage_of
from autoprune.repack.native.op import NativeOp

if TYPE_CHECKING:
    from autoprune.repack.lowering.context import Lowering

CAUSAL = 2**24  # entries of a causal mask, which is written out
Strides = tuple[int, ...]


def attention(lowering: Lowering, op: Attention) -> bool:
    """Queries, keys and values are read where they lie; False where they do not fit each other."""
    q, k, v = (_lines(lowering, name) for name in op.inputs[:3])
    (*lead, queries, width), (keys, value_width) = q.shape, v.shape[-2:]
    fit = k.shape == (*lead, keys, width) and v.shape == (*lead, keys, value_width)
    if not lead or not fit or min(q.shape) < 1 or keys < 1 or value_width < 1:
        return False
    bias = _bias(lowering, op, (*lead, queries, keys))
    if bias is None and (op.causal or len(op.inputs) > 3):
        return False
    order = (*range(len(lead) - 1), len(lead), len(lead) - 1, len(lead) + 1)  # as who joins the heads reads it
    shape = (*lead, queries, value_width)
    given = [q.stride, k.stride, v.stride, _ordered(shape, order), *([] if bias is None else [bias[0].strides])]
    paired = _paired(lead, [each[:-2] for each in given])
    if paired is None:
        return False
    (batch, heads), outer = paired
    meta = lowering.define(op.output, shape, order=order)
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())
    size = token_nodes.Heads(batch, heads, queries, keys, width, value_width)
    scratch = lowering.scratch(token_nodes.attention_scratch(size, lowering.target))
    strides = [(*apart, each[-2]) for apart, each in zip(outer, given, strict=True)]

    def build(*_: Any) -> NativeOp:
        places = [each.ref() for each in (q, k, v)]
        at_q, at_k, at_v, at_y = (
            _at(place, apart) for place, apart in zip([*places, buffer.ref()], strides, strict=False)
        )
        added = None if bias is None else _at(bias[0] if bias[1] is None else bias[1].ref(), strides[4])
        return token_nodes.attend(op.output, size, at_q, at_k, at_v, at_y, added, scratch, op.scale, lowering.target)

    reads = [q.buffer, k.buffer, v.buffer, scratch]
    if bias is not None and bias[1] is not None:
        reads.append(bias[1].buffer)
    lowering.steps.append(NativeStep(op.output, reads, buffer, build))
    return True


def _bias(lowering: Lowering, op: Attention, shape: tuple[int, ...]) -> tuple[StridedRef, View | None] | None:
    """What is added to the scores of `shape`: its strides, and where it lies if it is no array; None without one."""
    if op.causal:
        queries, keys = shape[-2:]
        if queries * keys > CAUSAL:
            return None
        masked = np.triu(np.full((queries, keys), -np.inf, np.float32), 1)
        return StridedRef(0, masked, (*[0] * (len(shape) - 2), keys, 1)), None
    if len(op.inputs) < 4:
        return None
    name = op.inputs[3]
    mask = lowering.values[name]
    if mask.shape[-1:] != shape[-1:] or torch.broadcast_shapes(mask.shape, shape) != shape:
        return None
    if mask.dtype == torch.bool:
        name = _added(lowering, name)
    elif not is_float(mask):
        return None
    view = _lines(lowering, name)
    return StridedRef(0, 0, _broadcast(view, len(shape))), view


def _added(lowering: Lowering, mask: str) -> str:
    """What a mask of booleans adds: 0 where it is True, else minus infinity; computed once a call, or once for all."""
    name = lowering.own_name(f"{mask} added")
    once = lowering.fixed_value(mask) is not None
    if name not in lowering.values and (once or not picked(lowering, name, mask, (0.0, -math.inf), torch.float32)):
        op = TorchOp.of(name, "aten.where.Scalar", ({"ref": mask}, 0.0, {"float": "-inf"}))
        meta = lowering.values[name] = evaluate_op(op, lowering.values, lowering.constants)
        lowering.torch_step(op, meta)
    return name


def rotary(lowering: Lowering, op: Rotary) -> bool:
    """All operands are read where they lie; False where features lie apart, or too many axes do."""
    x, *angles = (_lines(lowering, name) for name in op.inputs)
    if not x.shape:
        return False
    shape, (*lead, features) = x.shape, x.shape
    whole = all(each.shape[-1:] == (features,) for each in angles)
    if features % 2 or math.prod(shape) == 0 or not whole:
        return False
    if torch.broadcast_shapes(shape, *(each.shape for each in angles)) != shape:
        return False
    strides = [x.stride[:-1], *(_broadcast(each, len(shape))[:-1] for each in angles)]
    if len(strided_nodes.coalesced(lead, strides)[0]) > 3:
        return False
    sizes, steps = strided_nodes.merged_axes(lead, strides, 3)
    meta = lowering.define(op.output, shape)
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())

    def build(*_: Any) -> NativeOp:
        given, cos, sin = (_at(each.ref(), apart) for each, apart in zip((x, *angles), steps, strict=True))
        return strided_nodes.turned(op.output, (*sizes, features), given, cos, sin, buffer.ref(), lowering.target)

    lowering.steps.append(NativeStep(op.output, [each.buffer for each in (x, *angles)], buffer, build))
    return True


def product(lowering: Lowering, op: TorchOp) -> bool:
    """A product of matrices, or of many pairs of them."""
    if op.kwargs or len(op.args) != 2:
        return False
    names = [each["ref"] for each in op.args]
    if not all(is_float(lowering.values[name]) and lowering.values[name].dim() > 1 for name in names):
        return False
    shape = tuple(evaluate_op(op, lowering.values, lowering.constants).shape)
    x, other = _lines(lowering, names[0]), lowering.plain(names[1])
    turned = other.stride[-1] != 1 and other.stride[-2] == 1
    other = other if turned or other.stride[-1] == 1 else lowering.rows(names[1])
    (*_, rows, inner), columns = x.shape, other.shape[-1]
    if math.prod(shape) * inner == 0:
        return False
    outer: Sequence[Strides]
    if math.prod(other.shape[:-2]) == 1 and x.stride == contiguous_strides(x.shape):  # one right matrix for all rows
        (images, heads), outer, rows = (1, 1), [(0, 0)] * 3, math.prod(shape[:-1])
    else:
        strides = [_broadcast(x, len(shape)), _broadcast(other, len(shape)), contiguous_strides(shape)]
        paired = _paired(shape[:-2], [each[:-2] for each in strides])
        if paired is None:
            return False
        (images, heads), outer = paired
    meta = lowering.define(op.output, shape)
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())
    alone = few(rows)
    scratch = None if alone else lowering.scratch(product_scratch(inner, columns, lowering.target))
    line = [x.stride[-2], other.stride[-1] if turned else other.stride[-2], columns]

    def build(*_: Any) -> NativeOp:
        places = [x.ref(), other.ref(), buffer.ref()]
        at = [_at(place, (*apart, step)) for place, apart, step in zip(places, outer, line, strict=True)]
        size = Matrices(images, heads, rows, inner, columns)
        return matrix_nodes.product(op.output, size, at[0], at[1], turned, at[2], scratch, lowering.target)

    reads = [x.buffer, other.buffer, *([] if scratch is None else [scratch])]
    lowering.steps.append(NativeStep(op.output, reads, buffer, build))
    return True


def _lines(lowering: Lowering, name: str) -> View:
    """The value where it lies; copied where its last axis does not lie together."""
    view = lowering.plain(name)
    return view if view.stride[-1:] == (1,) or view.shape[-1:] == (1,) else lowering.rows(name)


def _broadcast(view: View, axes: int) -> Strides:
    """The strides of a value repeated along the axes that it lacks, or has one entry of."""
    own = tuple(0 if size == 1 else step for size, step in zip(view.shape, view.stride, strict=True))
    return (0,) * (axes - len(own)) + own


def _ordered(shape: tuple[int, ...], order: Sequence[int]) -> Strides:
    """The strides of a value whose axes lie in memory in this order."""
    inner = contiguous_strides(tuple(shape[axis] for axis in order))
    return tuple(inner[order.index(axis)] for axis in range(len(shape)))


def _at(place: StridedRef, strides: Strides) -> StridedRef:
    return StridedRef(place.slot, place.offset_bytes, strides)


def _paired(lead: Sequence[int], strides: Sequence[Strides]) -> tuple[tuple[int, int], list[Strides]] | None:
    """Leading axes as two, with the strides of every operand; None where more lie apart."""
    sizes, steps = strided_nodes.coalesced(lead, strides)
    if len(sizes) > 2:
        return None
    missing = 2 - len(sizes)
    whole = [*[1] * missing, *sizes]
    return (whole[0], whole[1]), [(*[0] * missing, *each) for each in steps]
