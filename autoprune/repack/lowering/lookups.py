"""Lowers what takes entries by their numbers: embeddings, gathering, indexing by tensors of integers.

Numbers that are known now are checked now; those that a call gives are checked at the call, others by the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autoprune.repack.graph.ops import TorchOp
from autoprune.repack.graph.reference import evaluate_op
from autoprune.repack.kernels import gather
from autoprune.repack.lowering import strided_nodes
from autoprune.repack.lowering.layout import LONG_FLOATS
from autoprune.repack.lowering.steps import NativeStep, contiguous_strides, storage_of
from autoprune.repack.native.op import NativeOp

if TYPE_CHECKING:
    from autoprune.repack.lowering.context import Lowering

Strides = tuple[int, ...]


def _embedded(lowering: Lowering, op: TorchOp) -> bool:
    """Rows of a table."""
    table, index = (each["ref"] for each in op.args[:2])
    axes = lowering.values[index].dim()
    return _taken(lowering, op, table, {0: index}, (*[None] * axes, 1), tuple(range(axes)))


def _gathered(lowering: Lowering, op: TorchOp) -> bool:
    """Along one axis by numbers of the result's shape."""
    args = op.named_args()
    name, index = args["self"]["ref"], args["index"]["ref"]
    axes = lowering.values[name].dim()
    if not axes or lowering.values[index].dim() != axes:
        return False
    dim = args["dim"] % axes
    return _taken(lowering, op, name, {dim: index}, tuple(axis if axis != dim else None for axis in range(axes)),
                  tuple(range(axes)))  # fmt: skip


def _selected(lowering: Lowering, op: TorchOp) -> bool:
    """Along one axis by a row of numbers."""
    args = op.named_args()
    name, index = args["self"]["ref"], args["index"]["ref"]
    axes = lowering.values[name].dim()
    if not axes or lowering.values[index].dim() != 1:
        return False
    dim = args["dim"] % axes
    whole = tuple(axis if axis != dim else None for axis in range(axes))
    return _taken(lowering, op, name, {dim: index}, whole, (dim,))


def _indexed(lowering: Lowering, op: TorchOp) -> bool:
    """By numbers along several axes; what they tell lies where the first of these is, or at the begin."""
    name, given = op.args[0]["ref"], op.args[1]
    axes = lowering.values[name].dim()
    indices = {axis: each["ref"] for axis, each in enumerate(given) if each is not None}
    if not indices or len(indices) > gather.INDICES:
        return False
    told = len(torch.broadcast_shapes(*(lowering.values[each].shape for each in indices.values())))
    left = [axis for axis in range(axes) if axis not in indices]
    together = max(indices) - min(indices) + 1 == len(indices)
    first = min(indices) if together else 0
    whole = (*left[:first], *[None] * told, *left[first:])
    return _taken(lowering, op, name, indices, whole, tuple(range(first, first + told)), below=True)


def _taken(
    lowering: Lowering, op: TorchOp, name: str, indices: Mapping[int, str], whole: Sequence[int | None],
    told: Sequence[int], below: bool = False,
) -> bool:  # fmt: skip
    """The step; False where no kernel does it.

    Args:
        lowering: what is known so far.
        op: the operator.
        name: of the value that is taken from.
        indices: its axes whose entries are told by numbers -> the value that holds these.
        whole: of each axis of the result, which axis of the value it is; None: it is told.
        told: the axes of the result that the numbers' own axes are, in order.
        below: whether numbers below 0 count from the end.
    """
    x, made = lowering.values[name], evaluate_op(op, lowering.values, lowering.constants)
    held = [lowering.values[each] for each in indices.values()]
    if x.dtype not in strided_nodes.ENTRIES or any(each.dtype not in (torch.int64, torch.int32) for each in held):
        return False
    shape = tuple(made.shape)
    given, steps = lowering.plain(name), [x.stride(axis) for axis in indices]
    if not x.numel() or not made.numel():
        return False
    across = [0 if axis is None else x.stride(axis) for axis in whole]
    over = [_over(each, shape, told) for each in held]
    lie = [contiguous_strides(shape), tuple(across), *over]
    if len(strided_nodes.coalesced(shape, lie)[0]) > gather.AXES:
        return False
    limits = [x.shape[axis] for axis in indices]
    checks = [_checked(lowering, each, limit, below) for each, limit in zip(indices.values(), limits, strict=True)]
    if None in checks:
        return False
    numbers, wrong = [lowering.plain(each) for each in indices.values()], None
    if not all(checks):
        lowering.wrong = wrong = lowering.wrong or lowering.scratch(LONG_FLOATS)
    y = lowering.made(op.output, shape, made.dtype)

    def build(*_: Any) -> NativeOp:
        at = [
            strided_nodes.Index(replace(each.ref(), strides=strides), step, limit)
            for each, strides, step, limit in zip(numbers, over, steps, limits, strict=True)
        ]
        flag = None if wrong is None else wrong.ref()
        source = replace(given.ref(), strides=tuple(across))
        return strided_nodes.taken(op.output, shape, source, at, y.ref(), flag, below, lowering.target)

    reads = [given.buffer, *(each.buffer for each in numbers), *([] if wrong is None else [wrong])]
    lowering.steps.append(NativeStep(op.output, reads, y.buffer, build))
    return True


def _over(index: Tensor, shape: tuple[int, ...], told: Sequence[int]) -> Strides:
    """The strides of numbers along the result's axes."""
    strides = [0] * len(shape)
    for axis, extent, step in zip(reversed(told), reversed(index.shape), reversed(index.stride()), strict=False):
        strides[axis] = 0 if extent == 1 else step
    return tuple(strides)


def _checked(lowering: Lowering, index: str, limit: int, below: bool) -> bool | None:
    """Whether numbers are known to be right before they are used; None where they are known to be wrong."""
    known = lowering.fixed_value(index)
    if known is not None:
        least, most = (int(each) for each in torch.aminmax(known))
        return True if least >= (-limit if below else 0) and most < limit else None
    meta = lowering.values[index]
    whole = [name for name in lowering.input_slots if storage_of(lowering.values[name]) == storage_of(meta)]
    if below or not whole or lowering.values[whole[0]].numel() != meta.numel() or not meta.is_contiguous():
        return False
    slot = lowering.input_slots[whole[0]]
    lowering.limits[slot] = min(limit, lowering.limits.get(slot, limit))
    return True


RULES: Mapping[str, Callable[[Lowering, TorchOp], bool]] = {
    "aten.embedding.default": _embedded,
    "aten.gather.default": _gathered,
    "aten.index_select.default": _selected,
    "aten.index.Tensor": _indexed,
}
