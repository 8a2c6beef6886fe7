"""Lowers what works on matrices and rows that are computed: attention, products, softmax, sums over axes, stacks.

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
from autoprune.repack.lowering.context import Operand, fitting, operand, picked, write
from autoprune.repack.lowering.matrix_nodes import Axis, Matrices
from autoprune.repack.lowering.steps import Map, NativeStep, View, contiguous_strides, is_float, storage_of
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
    """What a mask of booleans adds: 0 where it is True, else minus infinity; computed once a call."""
    name = lowering.own_name(f"{mask} added")
    if name not in lowering.values and not picked(lowering, name, mask, (0.0, -math.inf)):
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
    sizes, steps = strided_nodes.merged_axes(lead, strides)
    if sizes[0] != 1:
        return False
    meta = lowering.define(op.output, shape)
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())

    def build(*_: Any) -> NativeOp:
        given, cos, sin = (_at(each.ref(), apart[1:]) for each, apart in zip((x, *angles), steps, strict=True))
        return strided_nodes.turned(op.output, (*sizes[1:], features), given, cos, sin, buffer.ref(), lowering.target)

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
    alone = few(rows, lowering.target)
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


def softmax(lowering: Lowering, op: TorchOp) -> bool:
    """Along any axis: one that is not the last becomes the last in memory."""
    args = op.named_args()
    name = args["self"]["ref"]
    x = lowering.values[name]
    if args.get("dtype") is not None or args.get("half_to_float") or not is_float(x) or not x.numel() or not x.dim():
        return False
    order = [axis for axis in range(x.dim()) if axis != args["dim"] % x.dim()] + [args["dim"] % x.dim()]
    if x.shape[order[-1]] < lowering.target.lanes < x.numel():  # it would be computed a number at a time
        return False
    turned = order != sorted(order)
    source = _turned(lowering, name, order) if turned else lowering.rows(name)
    if source is None:
        return False
    features = x.shape[order[-1]]
    meta = lowering.define(op.output, tuple(x.shape), order=tuple(order) if turned else None)
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())

    def build(*_: Any) -> NativeOp:
        rows = meta.numel() // features
        return matrix_nodes.shares(op.output, rows, features, source.ref(), buffer.ref(), lowering.target)

    lowering.steps.append(NativeStep(op.output, [source.buffer], buffer, build))
    return True


def _turned(lowering: Lowering, name: str, order: Sequence[int]) -> View | None:
    """The value copied into rows with its axes in another order; None where that takes more axes than there are."""
    view = lowering.plain(name)
    shape = tuple(view.shape[axis] for axis in order)
    given = Operand(View(view.buffer, view.offset, shape, tuple(view.stride[axis] for axis in order)), shape)
    if not fitting(shape, [given]):
        return None
    made = View(Buffer(math.prod(shape)), 0, shape, contiguous_strides(shape))
    lowering.scratches.append(made.buffer)  # nobody else reads it
    write(lowering, name, shape, [given], made, "", None)
    return made


def total(lowering: Lowering, op: TorchOp) -> bool:
    """Sums and means over any axes."""
    args = op.named_args()
    given, axes = operand(lowering, args["self"]["ref"]), args.get("dim")
    if given is None or args.get("dtype") is not None or not given.shape:
        return False
    axes = [axes] if isinstance(axes, int) else axes or range(len(given.shape))
    dims = {axis % len(given.shape) for axis in axes}
    meta = evaluate_op(op, lowering.values, lowering.constants)
    if not meta.numel() or 0 in given.shape:
        return False
    if isinstance(given.source, Map):  # its strides are not known yet: as if all axes lay apart
        strides: Strides = tuple(2 ** (8 - 2 * axis) + 1 for axis in range(4))
    else:
        assert isinstance(given.source, View)
        strides = given.source.stride
    if not matrix_nodes.fits(*_parted(given.shape, strides, dims)):
        return False
    scale = 1 / math.prod(given.shape[axis] for axis in dims) if "mean" in op.op else 1.0
    made = lowering.define(op.output, tuple(meta.shape))
    buffer = lowering.buffers[storage_of(made)] = Buffer(made.numel())

    def build(*_: Any) -> NativeOp:
        x = given.ref(given.shape)
        kept, summed = _parted(given.shape, x.strides, dims)
        return matrix_nodes.sums(op.output, kept, summed, scale, x, buffer.ref(), lowering.target)

    lowering.steps.append(NativeStep(op.output, [given.source.buffer], buffer, build))
    return True


def _parted(shape: tuple[int, ...], strides: Strides, dims: set[int]) -> tuple[list[Axis], list[Axis]]:
    """The axes that are kept, and those of `dims`: (extent, stride) each."""
    axes = [*zip(shape, strides, strict=True)]
    kept = [each for axis, each in enumerate(axes) if axis not in dims]
    return kept, [axes[axis] for axis in sorted(dims)]


def stack(lowering: Lowering, op: TorchOp) -> bool:
    """Values beside each other along an axis of their own."""
    if op.kwargs or not op.inputs:
        return False
    operands = [operand(lowering, each["ref"]) for each in op.args[0]]
    meta = evaluate_op(op, lowering.values, lowering.constants)
    axis = (op.args[1] if len(op.args) > 1 else 0) % meta.dim()
    known = [each for each in operands if each is not None]
    shape = known[0].shape if known else ()
    whole = contiguous_strides(tuple(meta.shape))
    strides = whole[:axis] + whole[axis + 1 :]
    axes = sum(size != 1 for size in shape) + (strides[-1:] != (1,))
    if len(known) < len(operands) or axes > 4 or not all(fitting(shape, [each]) for each in known):
        return False
    buffer = Buffer(meta.numel())
    lowering.buffers[storage_of(lowering.define(op.output, tuple(meta.shape)))] = buffer
    for number, each in enumerate(known):
        write(lowering, op.output, shape, [each], View(buffer, number * whole[axis], shape, strides), "", None)
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
