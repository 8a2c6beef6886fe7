"""Lowers what works on one position at a time, wherever it lies: sums, products, copies, concatenations.

Values are read where they are, a feature map through its strides, and the result is written in rows; maps that are
concatenated by channel become a map again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoprune.repack.kernels.strided import AXES
from autoprune.repack.program import nodes
from autoprune.repack.program.graph import Op, evaluate_op
from autoprune.repack.program.layout import FLOAT_BYTES, LONG_FLOATS
from autoprune.repack.program.memory import Buffer
from autoprune.repack.program.native import NativeOp
from autoprune.repack.program.steps import Map, NativeStep, View, contiguous_strides, is_float, place_of, storage_of

if TYPE_CHECKING:
    from autoprune.repack.program.lower import Lowering

_OPERATIONS: Mapping[str, str] = {f"aten.{name}.Tensor": name for name in ("add", "sub", "mul", "div")}

_COPIES = ("aten.reshape.default", "aten.clone.default", "aten.contiguous.default")


def in_rows(lowering: Lowering, op: Op) -> bool:
    """An activation, or the sum of two values; False when torch has to run it."""
    if op.kind == "activation":
        return _computed(lowering, op, op.inputs, "", op.attributes["name"])
    return _computed(lowering, op, op.inputs, "add", op.activation)


def torch_operator(lowering: Lowering, op: Op) -> bool:
    """One of torch's operators; False when torch has to run it itself."""
    a = op.attributes
    if a["op"] == "aten.cat.default":
        return _concatenated(lowering, op)
    if a["op"] == "aten.embedding.default":
        return _looked_up(lowering, op)
    if a["op"] == "aten.gather.default":
        return _taken(lowering, op)
    operation = _OPERATIONS.get(a["op"])
    if operation is None or a["kwargs"] or len(a["args"]) != 2:
        return False
    given = [each["ref"] if isinstance(each, dict) and "ref" in each else each for each in a["args"]]
    return _computed(lowering, op, given, operation, None)


def is_copy(op: Op) -> bool:
    """Whether it gives its input's entries in their order."""
    return op.kind == "reshape" or op.attributes.get("op") in _COPIES


def copied(lowering: Lowering, name: str, meta: Tensor) -> View | None:
    """The value copied into rows, which `meta` stands for; None when torch has to copy it."""
    x = _operand(lowering, name)
    if x is None or not meta.is_contiguous() or not _fitting(x.shape, [x]):
        return None
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())
    _write(lowering, name, x.shape, [x], View(buffer, 0, x.shape, contiguous_strides(x.shape)), "", None)
    return View(buffer, 0, tuple(meta.shape), tuple(meta.stride()))


@dataclass(frozen=True)
class _Operand:
    """A value to be read.

    Attributes:
        source: where it lies; an array of one float for a number.
    """

    source: Map | View | NDArray[np.float32]
    shape: tuple[int, ...]

    def place(self, shape: tuple[int, ...]) -> nodes.Place:
        """Where it lies, repeated to `shape`."""
        if isinstance(self.source, np.ndarray):
            return 0, self.source.ctypes.data, (0,) * len(shape)
        slot, offset, strides = place_of(self.source)
        own = [0 if size == 1 else step for size, step in zip(self.shape, strides, strict=True)]
        return slot, offset, (0,) * (len(shape) - len(own)) + tuple(own)


def _operand(lowering: Lowering, given: Any) -> _Operand | None:
    """A value by its name, or a number; None for anything else."""
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return _Operand(np.full(1, given, np.float32), ())
    value = lowering.values.get(given) if isinstance(given, str) else None
    if value is None or not is_float(value):
        return None
    made = lowering.maps.get((given, (1, 1), 0.0)) if storage_of(value) not in lowering.buffers else None
    return _Operand(lowering.plain(given) if made is None else made, tuple(value.shape))


def _fitting(shape: tuple[int, ...], operands: Sequence[_Operand]) -> bool:
    """Whether the kernel has enough axes."""
    if sum(size != 1 for size in shape) <= AXES:
        return True
    if any(isinstance(each.source, Map) for each in operands):  # its strides are not known yet
        return False
    strides = [*(each.place(shape)[2] for each in operands), contiguous_strides(shape)]
    return len(nodes.merged_axes(shape, strides)[0]) <= AXES


def _computed(lowering: Lowering, op: Op, given: Sequence[Any], operation: str, activation: str | None) -> bool:
    operands = [each for each in (_operand(lowering, each) for each in given) if each is not None]
    if len(operands) < len(given):
        return False
    shape = tuple(torch.broadcast_shapes(*(each.shape for each in operands)))
    if not _fitting(shape, operands):
        return False
    meta = lowering.define(op.output, shape)
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())
    _write(
        lowering, op.output, shape, operands, View(buffer, 0, shape, contiguous_strides(shape)), operation, activation
    )
    return True


def _write(
    lowering: Lowering, name: str, shape: tuple[int, ...], operands: Sequence[_Operand], y: View, operation: str,
    activation: str | None,
) -> None:  # fmt: skip
    """The step that computes `shape` of `y`."""

    def build(*_: Any) -> NativeOp:
        places = [each.place(shape) for each in operands]
        other = places[1] if len(places) > 1 else None
        made = nodes.pointwise(name, shape, places[0], other, place_of(y), operation, activation, lowering.target)
        arrays = tuple(each.source for each in operands if isinstance(each.source, np.ndarray))
        return NativeOp(made.name, made.kernel, made.fields, made.items, (*made.keep, *arrays))

    reads = [each.source.buffer for each in operands if not isinstance(each.source, np.ndarray)]
    lowering.steps.append(NativeStep(name, reads, y.buffer, build))


def _concatenated(lowering: Lowering, op: Op) -> bool:
    """Each part is copied to its place."""
    if op.attributes["kwargs"] or not op.inputs:
        return False
    names = [each["ref"] for each in op.attributes["args"][0]]
    meta = evaluate_op(op, lowering.values, lowering.constants)
    axis = (op.attributes["args"][1] if len(op.attributes["args"]) > 1 else 0) % max(1, meta.dim())
    shapes = [tuple(lowering.values[name].shape) for name in names]
    if any(len(shape) != meta.dim() for shape in shapes):  # torch leaves out empty ones of one axis
        return False
    if not all(is_float(lowering.values[name]) for name in names):
        return False
    as_map = [(name, (1, 1), 0.0) in lowering.maps for name in names]
    if meta.dim() == 4 and axis == 1 and any(as_map):
        made, first = lowering.new_map(op, tuple(meta.shape)), 0
        for name, shape in zip(names, shapes, strict=True):
            lowering.copy_into(name, made, first)
            first += shape[1]
        if all(name in lowering.positive for name in names):
            lowering.positive.add(op.output)
        return True
    operands = [each for each in (_operand(lowering, name) for name in names) if each is not None]
    if len(operands) < len(names) or not all(_fitting(each.shape, [each]) for each in operands):
        return False
    buffer = Buffer(meta.numel())
    lowering.buffers[storage_of(lowering.define(op.output, tuple(meta.shape)))] = buffer
    strides, start = contiguous_strides(meta.shape), 0
    for each in operands:
        view = View(buffer, start * strides[axis], each.shape, strides)
        _write(lowering, op.output, each.shape, [each], view, "", None)
        start += each.shape[axis]
    return True


def _looked_up(lowering: Lowering, op: Op) -> bool:
    """Rows of a constant table by an input of int64, which is checked at each call."""
    table, index = (each["ref"] for each in op.attributes["args"][:2])
    values = lowering.values
    known = table in lowering.constants and is_float(values[table]) and values[table].is_contiguous()
    if not known or values[index].dtype != torch.int64 or index not in lowering.input_slots:
        return False
    rows, features = values[table].shape
    meta = lowering.define(op.output, (*values[index].shape, features))
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())
    places = [lowering.plain(table), lowering.plain(index)]
    y, count = View(buffer, 0, tuple(meta.shape), tuple(meta.stride())), values[index].numel()
    slot = lowering.input_slots[index]
    lowering.limits[slot] = min(rows, lowering.limits.get(slot, rows))

    def build(*_: Any) -> NativeOp:
        (table_slot, table_at, _), (slot, at, _), y_at = (place_of(each) for each in (*places, y))
        x_at, index_at = (table_slot, table_at, (0, features)), (slot, at, (0, 1))
        return nodes.taken(op.output, x_at, index_at, y_at, (1, count, features), None, lowering.target)

    lowering.steps.append(NativeStep(op.output, [each.buffer for each in places], buffer, build))
    return True


def _taken(lowering: Lowering, op: Op) -> bool:
    """Whole rows of a value, by numbers that are the same for all of a row's features."""
    args = op.attributes["args"]
    if op.attributes["kwargs"] or len(args) != 3:
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
        x_at = (given.buffer.slot, given.start * FLOAT_BYTES, at_x)
        index_at = (told.buffer.slot, told.offset * LONG_FLOATS * FLOAT_BYTES, at_index)  # which lies in no arena
        y_at, checked = (buffer.slot, buffer.offset, ()), (wrong.slot, wrong.offset, limit)
        return nodes.taken(op.output, x_at, index_at, y_at, (batch, rows, features), checked, lowering.target)

    lowering.steps.append(NativeStep(op.output, [given.buffer, told.buffer, wrong], buffer, build))
    return True
