"""Lowers what moves values and computes nothing: joins, rolls, borders, repetitions, what is written in parts.

Each part of the result is a copy of its own, which reads where the part lies and writes to where it belongs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from autoprune.repack.graph.ops import TorchOp
from autoprune.repack.graph.reference import evaluate_op
from autoprune.repack.lowering import byte_map_rules, map_rules
from autoprune.repack.lowering.buffers import Buffer
from autoprune.repack.lowering.context import Operand, fitting, operand, operands, value_of, write
from autoprune.repack.lowering.steps import View, contiguous_strides, is_float
from autoprune.repack.lowering.strided_nodes import ENTRIES

if TYPE_CHECKING:
    from autoprune.repack.lowering.context import Lowering

MOST_PARTS = 16  # of a value that is rolled


def _meta(lowering: Lowering, op: TorchOp) -> Tensor:
    made = evaluate_op(op, lowering.values, lowering.constants)
    assert isinstance(made, Tensor)
    return made


def _known(lowering: Lowering, given: Any) -> list[int] | None:
    """Integers, or names of integers; None where there is anything else."""
    each = given if isinstance(given, (list, tuple)) else [given]
    told = [lowering.values.get(n["ref"]) if isinstance(n, dict) and "ref" in n else n for n in each]
    found = [n for n in told if type(n) is int]
    return found if len(found) == len(told) else None


def _view(lowering: Lowering, name: str) -> View | None:
    """The value as torch holds it; None where it is of a type that no kernel knows."""
    return lowering.plain(name) if lowering.values[name].dtype in ENTRIES else None


def _part(view: View, axis: int, first: int, extent: int) -> View:
    """Some of a value's entries along an axis."""
    shape = (*view.shape[:axis], extent, *view.shape[axis + 1 :])
    return replace(view, offset=view.offset + first * view.stride[axis], shape=shape)


def _whole(made: Tensor) -> View:
    """The result in rows, of which parts can be told before it has a place."""
    shape = tuple(made.shape)
    return View(Buffer(0), 0, shape, contiguous_strides(shape), made.dtype)


def _read(view: View) -> Operand:
    return Operand(view, view.shape)


def _assembled(lowering: Lowering, op: TorchOp, made: Tensor, parts: Sequence[tuple[Operand, View]]) -> bool:
    """Copies to parts of the result, in order; False where no kernel does one of them, or nothing is to be copied."""
    parts = [(source, into) for source, into in parts if 0 not in into.shape]
    if (
        not parts
        or made.dtype not in ENTRIES
        or not all(fitting(into.shape, [source], into.stride) for source, into in parts)
    ):
        return False
    whole = lowering.made(op.output, tuple(made.shape), made.dtype)
    for source, into in parts:
        write(lowering, op.output, into.shape, [source], replace(into, buffer=whole.buffer))
    return True


def _joined(lowering: Lowering, op: TorchOp) -> bool:
    """Values one after the other along an axis."""
    if op.kwargs or not op.inputs:
        return False
    names = [each["ref"] for each in op.args[0]]
    made = _meta(lowering, op)
    axis = (op.args[1] if len(op.args) > 1 else 0) % max(1, made.dim())
    if made.dim() != 1:  # torch leaves out empty ones of one axis, as caches of keys begin
        names = [name for name in names if lowering.values[name].shape != (0,)]
    floats = all(is_float(value) for value in (made, *(lowering.values[name] for name in names)))
    if floats and byte_map_rules.joined(lowering, op, names, tuple(made.shape), axis):
        return True
    as_map = [(name, (1, 1), 0.0) in lowering.maps for name in names]
    if floats and made.dim() == 4 and axis == 1 and any(as_map):
        joined, first = lowering.new_map(op, tuple(made.shape)), 0
        for name in names:
            lowering.copy_into(name, joined, first)
            first += lowering.values[name].shape[1]
        if all(name in lowering.positive for name in names):
            lowering.positive.add(op.output)
        return True
    found = operands(lowering, names, made.dtype)
    if found is None:
        return False
    whole, first, parts = _whole(made), 0, []
    for each in found:
        parts.append((each, _part(whole, axis, first, each.shape[axis])))
        first += each.shape[axis]
    return _assembled(lowering, op, made, parts)


def _stacked(lowering: Lowering, op: TorchOp) -> bool:
    """Values beside each other along an axis of their own."""
    if op.kwargs or not op.inputs:
        return False
    made = _meta(lowering, op)
    found = operands(lowering, [each["ref"] for each in op.args[0]], made.dtype)
    axis = (op.args[1] if len(op.args) > 1 else 0) % made.dim()
    if found is None:
        return False
    beside = [_without(_part(_whole(made), axis, number, 1), axis) for number in range(len(found))]
    return _assembled(lowering, op, made, [*zip(found, beside, strict=True)])


def _without(view: View, axis: int) -> View:
    """A view that lacks an axis of one entry."""
    shape, stride = (values[:axis] + values[axis + 1 :] for values in (view.shape, view.stride))
    return replace(view, shape=shape, stride=stride)


def _rolled(lowering: Lowering, op: TorchOp) -> bool:
    """What leaves at one end comes in at the other: along each axis two parts change places."""
    args, made = op.named_args(), _meta(lowering, op)
    shifts, dims = _known(lowering, args["shifts"]), _known(lowering, args.get("dims") or [])
    given = _view(lowering, args["self"]["ref"])
    if given is None or shifts is None or not dims or len(shifts) != len(dims):
        return False
    axes = [dim % len(given.shape) for dim in dims]
    if len(set(axes)) < len(axes) or 2 ** len(dims) > MOST_PARTS or 0 in given.shape:
        return False
    cuts, copies = [], []
    for shift, axis in zip(shifts, axes, strict=True):
        extent = given.shape[axis]
        moved = shift % extent
        cuts.append([(axis, 0, moved, extent - moved), (axis, extent - moved, 0, moved)])
    for parts in itertools.product(*cuts):
        source, into = given, _whole(made)
        for axis, first, to, extent in parts:
            source, into = _part(source, axis, first, extent), _part(into, axis, to, extent)
        copies.append((_read(source), into))
    return _assembled(lowering, op, made, copies)


def _padded(lowering: Lowering, op: TorchOp) -> bool:
    """A number around a value, along any axes; or less of the value."""
    if map_rules.padded(lowering, op):
        return True
    args, made = op.named_args(), _meta(lowering, op)
    pads, name = _known(lowering, args["pad"]), args["self"]["ref"]
    number = value_of(args.get("value")) or 0
    given, constant = _view(lowering, name), args.get("mode", "constant") == "constant"
    filled = operand(lowering, number, made.dtype) if isinstance(number, (int, float)) and constant else None
    if given is None or pads is None or filled is None:
        return False
    source, into, parts = given, _whole(made), list[tuple[Operand, View]]()
    for pair, before in enumerate(pads[::2]):  # beside it first, then above and below what lies beside that
        axis, behind = len(given.shape) - 1 - pair, pads[2 * pair + 1]
        extent = max(0, given.shape[axis] + min(0, before) + min(0, behind))
        first = max(0, before)
        source = _part(source, axis, max(0, -before), extent)
        borders = (0, first), (first + extent, into.shape[axis])
        parts += [(filled, _part(into, axis, start, stop - start)) for start, stop in borders]
        into = _part(into, axis, first, extent)
    return _assembled(lowering, op, made, [*parts, (_read(source), into)])


def _flipped(lowering: Lowering, op: TorchOp) -> bool:
    """From the end to the begin along some axes."""
    args, made = op.named_args(), _meta(lowering, op)
    given = _view(lowering, args["self"]["ref"])
    if given is None or not given.shape:
        return False
    offset, stride = given.offset, list(given.stride)
    for dim in args["dims"]:
        axis = dim % len(given.shape)
        offset += (given.shape[axis] - 1) * given.stride[axis]
        stride[axis] = -stride[axis]
    return _copied(lowering, op, replace(given, offset=offset, stride=tuple(stride)), made)


def _copied(lowering: Lowering, op: TorchOp, source: View, made: Tensor) -> bool:
    """All of the result in one copy."""
    into = replace(_whole(made), shape=source.shape, stride=contiguous_strides(source.shape))
    return _assembled(lowering, op, made, [(_read(source), into)])


def _repeated(lowering: Lowering, op: TorchOp) -> bool:
    """A value over and over, along any axes, which may be new ones."""
    args, made = op.named_args(), _meta(lowering, op)
    given, repeats = _view(lowering, args["self"]["ref"]), _known(lowering, args["repeats"])
    if given is None or repeats is None:
        return False
    lead = len(repeats) - len(given.shape)
    shape, stride = list[int](), list[int]()
    for axis, count in enumerate(repeats):
        shape.append(count)
        stride.append(0)
        if axis >= lead:
            shape.append(given.shape[axis - lead])
            stride.append(given.stride[axis - lead])
    return _copied(lowering, op, replace(given, shape=tuple(shape), stride=tuple(stride)), made)


def _written(lowering: Lowering, op: TorchOp) -> bool:
    """A value of which some entries along an axis are another's: ``slice_scatter`` and ``select_scatter``."""
    args, made = op.named_args(), _meta(lowering, op)
    given, other = _view(lowering, args["self"]["ref"]), _view(lowering, args["src"]["ref"])
    bounds = _known(lowering, [args.get(each) or 0 for each in ("dim", "start", "index")])
    step = _known(lowering, args.get("step", 1))
    if given is None or other is None or bounds is None or step is None or not made.numel():
        return False
    axis, whole = bounds[0] % made.dim(), _whole(made)
    extent, first = made.shape[axis], bounds[1] + bounds[2]
    first = min(extent, max(0, first + extent if first < 0 else first))
    into = _part(whole, axis, first, 1)
    if "select" in op.op:
        into = _without(into, axis)
    else:
        stride = [n * step[0] if each == axis else n for each, n in enumerate(whole.stride)]
        into = replace(into, shape=other.shape, stride=tuple(stride))
    return _assembled(lowering, op, made, [(_read(given), whole), (_read(other), into)])


def _filled(lowering: Lowering, op: TorchOp) -> bool:
    """Another value, or a number, of a value's shape and type."""
    args, made = op.named_args(), _meta(lowering, op)
    encoded = args.get("src", args.get("value"))
    source = operand(lowering, value_of(encoded), made.dtype)
    return source is not None and _assembled(lowering, op, made, [(source, _whole(made))])


RULES: Mapping[str, Callable[[Lowering, TorchOp], bool]] = {
    "aten.cat.default": _joined,
    "aten.stack.default": _stacked,
    "aten.roll.default": _rolled,
    **dict.fromkeys(("aten.pad.default", "aten.constant_pad_nd.default"), _padded),
    "aten.flip.default": _flipped,
    "aten.repeat.default": _repeated,
    **dict.fromkeys(("aten.slice_scatter.default", "aten.select_scatter.default"), _written),
    **dict.fromkeys(("aten.copy.default", "aten.fill.Scalar", "aten.fill.Tensor"), _filled),
}
