"""Lowers what makes less of a value along axes, or goes along one: sums, largest entries, softmax, sums so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autoprune.repack.graph import aten
from autoprune.repack.graph.ops import TorchOp
from autoprune.repack.graph.reference import evaluate_op
from autoprune.repack.kernels.entries import OPERATIONS
from autoprune.repack.kernels.reduce import Join
from autoprune.repack.lowering import matrix_nodes
from autoprune.repack.lowering.buffers import Buffer
from autoprune.repack.lowering.context import Operand, fitting, operand, write
from autoprune.repack.lowering.matrix_nodes import Axis, Lines
from autoprune.repack.lowering.steps import (
    Map,
    NativeStep,
    View,
    contiguous_strides,
    is_float,
    storage_of,
)
from autoprune.repack.lowering.strided_nodes import ENTRIES
from autoprune.repack.native.op import NativeOp

if TYPE_CHECKING:
    from autoprune.repack.lowering.context import Lowering

_JOINS: Mapping[str, Join] = {
    "sum": Join.SUM,
    "mean": Join.SUM,
    "linalg_vector_norm": Join.ROOT,
    **dict.fromkeys(("amax", "max", "any"), Join.LARGEST),
    **dict.fromkeys(("amin", "min", "all"), Join.LEAST),
}
_OF_NO_AXES = ("aten.any.dims", "aten.all.dims")  # an empty list of axes reduces nothing there, elsewhere all


def _softmax(lowering: Lowering, op: TorchOp) -> bool:
    """Along any axis: one that is not the last becomes the last in memory."""
    args = op.named_args()
    name = args["self"]["ref"]
    x = lowering.values[name]
    other = args.get("dtype") not in (None, {"dtype": "float32"}) or args.get("half_to_float")
    if other or not is_float(x) or not x.numel() or not x.dim():
        return False
    order = [axis for axis in range(x.dim()) if axis != args["dim"] % x.dim()] + [args["dim"] % x.dim()]
    turned = order != sorted(order)
    source = _turned(lowering, name, order) if turned else lowering.rows(name)
    if source is None:
        return False
    features = x.shape[order[-1]]
    meta = lowering.define(op.output, tuple(x.shape), order=tuple(order) if turned else None)
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())
    logarithm = "log_softmax" in op.op

    def build(*_: Any) -> NativeOp:
        rows = meta.numel() // features
        return matrix_nodes.shares(op.output, rows, features, source.ref(), buffer.ref(), logarithm, lowering.target)

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
    write(lowering, name, shape, [given], made)
    return made


def _reduced(lowering: Lowering, op: TorchOp) -> bool:
    """Sums, means, norms, the largest or least entries over any axes."""
    args, made = op.named_args(), evaluate_op(op, lowering.values, lowering.constants)
    given, axes, join = operand(lowering, args["self"]["ref"]), args.get("dim"), _JOINS[op.op.split(".")[1]]
    if given is None or not given.shape or made.dtype not in ENTRIES or op.item or not made.numel():
        return False
    if axes == [] and op.op in _OF_NO_AXES:
        return False
    if 0 in given.shape or (join is Join.ROOT and _order(args) != 2) or not _plain(args, given, made, join):
        return False
    axes = [axes] if isinstance(axes, int) else axes or range(len(given.shape))
    dims = {axis % len(given.shape) for axis in axes}
    if isinstance(given.source, Map):  # its strides are not known yet: as if all axes lay apart
        strides: tuple[int, ...] = tuple(2 ** (8 - 2 * axis) + 1 for axis in range(4))
    else:
        assert isinstance(given.source, View)
        strides = given.source.stride
    if not matrix_nodes.fits(*_parted(given.shape, strides, dims)):
        return False
    scale = 1 / math.prod(given.shape[axis] for axis in dims) if "mean" in op.op else 1.0
    y = lowering.made(op.output, tuple(made.shape), made.dtype)

    def build(*_: Any) -> NativeOp:
        x = given.ref(given.shape)
        kept, summed = _parted(given.shape, x.strides, dims)
        return matrix_nodes.joined(op.output, kept, summed, join, scale, x, y.ref(), lowering.target)

    lowering.steps.append(NativeStep(op.output, given.buffers, y.buffer, build))
    return True


def _order(args: Mapping[str, Any]) -> Any:
    return aten.decode(args.get("ord", 2), {})


def _plain(args: Mapping[str, Any], given: Operand, made: Tensor, join: Join) -> bool:
    """Whether the result is computed in its own type, of entries that are converted to it."""
    if args.get("dtype") is not None or made.dtype == torch.uint8:  # which no kernel adds or compares
        return False
    return join is not Join.ROOT or given.dtype == torch.float32


def _parted(shape: tuple[int, ...], strides: tuple[int, ...], dims: set[int]) -> tuple[list[Axis], list[Axis]]:
    """The axes that are kept, and those of `dims`: (extent, stride) each."""
    axes = [*zip(shape, strides, strict=True)]
    kept = [each for axis, each in enumerate(axes) if axis not in dims]
    return kept, [axes[axis] for axis in sorted(dims)]


def _so_far(lowering: Lowering, op: TorchOp) -> bool:
    """The sum of each entry and those before it."""
    args, made = op.named_args(), evaluate_op(op, lowering.values, lowering.constants)
    x = lowering.values[args["self"]["ref"]]
    if made.dtype not in ENTRIES or x.dtype not in ENTRIES or not made.numel() or not made.dim():
        return False
    if "add" not in OPERATIONS[ENTRIES[made.dtype]]:
        return False
    if args.get("dtype") is not None and x.dtype == torch.float32 and made.dtype != torch.float32:
        return False
    return _along(lowering, op, args["dim"] % x.dim(), made, matrix_nodes.sums_so_far)


def _place(lowering: Lowering, op: TorchOp) -> bool:
    """Where the largest or the least entry is."""
    args, made = op.named_args(), evaluate_op(op, lowering.values, lowering.constants)
    x, largest = lowering.values[args["self"]["ref"]], "max" in op.op
    if x.dtype not in ENTRIES or not x.numel() or not x.dim() or not made.numel():
        return False
    if args.get("dim") is None:
        return x.dim() == 1 and _along(lowering, op, 0, made, matrix_nodes.place_of(largest))
    return _along(lowering, op, args["dim"] % x.dim(), made, matrix_nodes.place_of(largest))


def _along(lowering: Lowering, op: TorchOp, dim: int, made: Tensor, make: Callable[..., NativeOp]) -> bool:
    """What goes along an axis; the result has that axis too, or lacks it."""
    given = lowering.plain(op.named_args()["self"]["ref"])
    steps = contiguous_strides(tuple(made.shape))
    if made.dim() < len(given.shape):
        steps = (*steps[:dim], 0, *steps[dim:])
    beside = [axis for axis in range(len(given.shape)) if axis != dim]
    shape = tuple(given.shape[axis] for axis in beside)
    x, y = (tuple(strides[axis] for axis in beside) for strides in (given.stride, steps))
    if not matrix_nodes.goes(shape, x, y):
        return False
    lines = Lines(shape, x, y, given.shape[dim], given.stride[dim], steps[dim])
    into = lowering.made(op.output, tuple(made.shape), made.dtype)

    def build(*_: Any) -> NativeOp:
        return make(op.output, lines, given.ref(), into.ref(), lowering.target)

    lowering.steps.append(NativeStep(op.output, [given.buffer], into.buffer, build))
    return True


def _of_pair(lowering: Lowering, op: TorchOp) -> bool:
    """``max`` and ``min`` along an axis: the entries, or where they are."""
    return _place(lowering, op) if op.item == 1 else _reduced(lowering, op)


RULES: Mapping[str, Callable[[Lowering, TorchOp], bool]] = {
    **dict.fromkeys(
        (f"aten.{name}.int" for name in ("softmax", "log_softmax")), _softmax
    ),
    **dict.fromkeys((f"aten.{name}.default" for name in ("_softmax", "_log_softmax")), _softmax),
    **dict.fromkeys(
        (
            "aten.mean.dim", "aten.mean.default", "aten.sum.dim_IntList", "aten.sum.default", "aten.amax.default",
            "aten.amin.default", "aten.max.default", "aten.min.default", "aten.linalg_vector_norm.default",
            "aten.any.dim", "aten.any.dims", "aten.any.default", "aten.all.dim", "aten.all.dims", "aten.all.default",
        ),
        _reduced,
    ),
    **dict.fromkeys(("aten.max.dim", "aten.min.dim"), _of_pair),
    **dict.fromkeys(("aten.argmax.default", "aten.argmin.default"), _place),
    "aten.cumsum.default": _so_far,
}  # fmt: skip
