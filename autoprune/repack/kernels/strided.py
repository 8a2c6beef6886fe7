"""A native op on values wherever they lie: one, or two combined, read and written at any strides.

It copies, transposes, concatenates, and adds or scales by what is repeated along some axes (a stride of 0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, compile_op, once_a_process
from autoprune.repack.kernels.fields import FLOAT, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    address,
    at,
    clamp,
    const,
    float_field,
    gathered,
    load_vector,
    loop,
    op_function,
    smaller,
    spans,
    splat,
    store_vector,
)
from autoprune.repack.kernels.math import FUNCTIONS

AXES = 4


class Along(Enum):
    """How an operand lies along the last axis."""

    RUN = "run"  # neighbours
    SAME = "same"  # one value for all
    APART = "apart"


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes and strides in floats."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET
    X_STRIDE_0 = NUMBER  # by axis
    X_STRIDE_1 = NUMBER
    X_STRIDE_2 = NUMBER
    X_STRIDE_3 = NUMBER
    OTHER_SLOT = SLOT.of("other")
    OTHER_OFFSET = OFFSET.of("other")
    OTHER_STRIDE_0 = NUMBER.of("other")
    OTHER_STRIDE_1 = NUMBER.of("other")
    OTHER_STRIDE_2 = NUMBER.of("other")
    OTHER_STRIDE_3 = NUMBER.of("other")
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    Y_STRIDE_0 = NUMBER
    Y_STRIDE_1 = NUMBER
    Y_STRIDE_2 = NUMBER
    Y_STRIDE_3 = NUMBER
    SIZE_0 = NUMBER
    SIZE_1 = NUMBER
    SIZE_2 = NUMBER
    SIZE_3 = NUMBER
    BLOCK = NUMBER  # rows along the last axis an item
    LOW = FLOAT  # results are clamped
    HIGH = FLOAT


def per_axis(name: str) -> list[Field]:
    """The fields that say something of each axis, such as ``X_STRIDE``, in the axes' order."""
    return [Field[f"{name}_{axis}"] for axis in range(AXES)]


Operation = Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]
OPERATIONS: Mapping[str, Operation] = {
    "add": lambda b, x, other: b.fadd(x, other),
    "sub": lambda b, x, other: b.fsub(x, other),
    "mul": lambda b, x, other: b.fmul(x, other),
    "div": lambda b, x, other: b.fdiv(x, other),
}
"""How two values become one."""


@once_a_process
def strided(
    x: Along, other: Along | None, operation: str, activation: str, target: Target, together: bool = True
) -> int:
    """Y = activation(clamp(x [operation other])); an item is some rows along the last axis.

    Args:
        x: how the operand lies.
        other: how the second does; there is none where it is None.
        operation: a row of OPERATIONS; empty without a second operand.
        activation: a row of `math.FUNCTIONS`; empty for none.
        target: what to compile for.
        together: whether the results are neighbours along the last axis.
    """
    module, lanes = ir.Module(), target.lanes
    b, fields, slots, item, _ = op_function(module)

    def get(field: Field) -> ir.Value:
        return b.load(at(b, fields, const(field)))

    sizes = [get(field) for field in per_axis("SIZE")]
    low, high = (float_field(b, get(field)) for field in (Field.LOW, Field.HIGH))
    operands = [("X", x)] if other is None else [("X", x), ("OTHER", other)]
    names = [*(name for name, _ in operands), "Y"]
    bases = [address(b, slots, get(Field[f"{name}_SLOT"]), get(Field[f"{name}_OFFSET"])) for name in names]
    strides = [[get(field) for field in per_axis(f"{name}_STRIDE")] for name in names]
    rows = b.mul(b.mul(sizes[0], sizes[1]), sizes[2])
    first = b.mul(item, get(Field.BLOCK))
    with loop(b, first, smaller(b, b.add(first, get(Field.BLOCK)), rows)) as row:
        rest, index = row, []
        for axis in (2, 1, 0):
            index.append(b.srem(rest, sizes[axis]))
            rest = b.sdiv(rest, sizes[axis])
        lines = []
        for base, steps in zip(bases, strides, strict=True):
            for axis, number in zip((2, 1, 0), index, strict=True):
                base = at(b, base, b.mul(number, steps[axis]))
            lines.append(base)

        def compute(position: ir.Value, wide: int, lines: list[ir.Value] = lines) -> None:
            values = [
                _read(b, line, position, steps[-1], along, wide)
                for line, steps, (_, along) in zip(lines, strides, operands, strict=False)
            ]
            value = values[0] if other is None else OPERATIONS[operation](b, values[0], values[1])
            value = clamp(b, value, splat(b, low, wide), splat(b, high, wide))
            if activation:
                value = FUNCTIONS[activation](b, module, value, wide)
            if together or wide == 1:
                place = position if together else b.mul(position, strides[-1][-1])
                store_vector(b, value, at(b, lines[-1], place), wide)
                return
            for lane in range(wide):
                place = at(b, lines[-1], b.mul(b.add(position, const(lane)), strides[-1][-1]))
                b.store(b.extract_element(value, const(lane)), place)

        spans(b, const(0), sizes[-1], (lanes, 1), compute)
    b.ret_void()
    return compile_op(module, "op", target)


def _read(b: ir.IRBuilder, line: ir.Value, position: ir.Value, step: ir.Value, along: Along, wide: int) -> ir.Value:
    """`wide` values of an operand, from `position` on."""
    if along is Along.SAME:
        return splat(b, b.load(line), wide)
    if along is Along.RUN:
        return load_vector(b, at(b, line, position), wide)
    places = [at(b, line, b.mul(b.add(position, const(lane)), step)) for lane in range(wide)]
    return gathered(b, places) if wide > 1 else b.load(places[0])
