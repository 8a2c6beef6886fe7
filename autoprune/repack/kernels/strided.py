"""A native op on values wherever they lie: one, or two combined, read and written at any strides.

It copies, transposes, concatenates, adds or scales by what is repeated along some axes (a stride of 0), and picks one
of two values by a boolean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import FLOAT, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    I8,
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
from autoprune.repack.kernels.rows import CHAINS

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
    CHOICE_SLOT = SLOT.of("choice")
    CHOICE_OFFSET = OFFSET.of("choice")
    CHOICE_STRIDE_0 = NUMBER.of("choice")  # in bytes, one a boolean
    CHOICE_STRIDE_1 = NUMBER.of("choice")
    CHOICE_STRIDE_2 = NUMBER.of("choice")
    CHOICE_STRIDE_3 = NUMBER.of("choice")
    BLOCK = NUMBER  # rows along the last axis an item
    LOW = FLOAT.of("bounds")  # results are clamped
    HIGH = FLOAT.of("bounds")


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


@kernel
def strided(
    x: Along, other: Along | None, operation: str, activation: str, target: Target, together: bool = True,
    bounded: bool = False, choice: Along | None = None,
) -> ir.Module:  # fmt: skip
    """Y = activation(clamp(x [operation other])); an item is some rows along the last axis.

    Args:
        x: how the operand lies.
        other: how the second does; there is none where it is None.
        operation: a row of OPERATIONS; empty without a second operand, or where one of the two is picked.
        activation: a row of `math.FUNCTIONS`; empty for none.
        target: what to compile for.
        together: whether the results are neighbours along the last axis.
        bounded: whether they are clamped.
        choice: how booleans lie that pick the first operand, where they are true, or the second; None without them.
    """
    module, lanes = ir.Module(), target.lanes
    b, fields, slots, item, _ = op_function(module)

    def get(field: Field) -> ir.Value:
        return b.load(at(b, fields, const(field)))

    sizes = [get(field) for field in per_axis("SIZE")]
    bounds = tuple(float_field(b, get(field)) for field in (Field.LOW, Field.HIGH)) if bounded else ()
    operands = {"X": x, "OTHER": other, "CHOICE": choice}
    lie = [along for along in operands.values() if along is not None]
    names = [*(name for name, along in operands.items() if along is not None), "Y"]
    bases = [address(b, slots, get(Field[f"{name}_SLOT"]), get(Field[f"{name}_OFFSET"])) for name in names]
    if choice is not None:
        bases[2] = b.bitcast(bases[2], I8.as_pointer())
    strides = [[get(field) for field in per_axis(f"{name}_STRIDE")] for name in names]
    rows = b.mul(b.mul(sizes[0], sizes[1]), sizes[2])
    first = b.mul(item, get(Field.BLOCK))
    with loop(b, first, smaller(b, b.add(first, get(Field.BLOCK)), rows)) as row:
        rest, index = row, []
        for axis in (2, 1, 0):
            index.append(b.srem(rest, sizes[axis]))
            rest = b.sdiv(rest, sizes[axis])
        lines = [_row(b, base, steps, index) for base, steps in zip(bases, strides, strict=True)]

        def compute(position: ir.Value, wide: int, lines: list[ir.Value] = lines) -> None:
            values = [
                _read(b, line, position, steps[-1], along, wide)
                for line, steps, along in zip(lines, strides, lie, strict=False)
            ]
            value = _combined(b, values, operation, wide)
            if bounds:
                value = clamp(b, value, *(splat(b, bound, wide) for bound in bounds))
            if activation:
                value = FUNCTIONS[activation](b, module, value, wide)
            _write(b, value, lines[-1], position, None if together else strides[-1][-1], wide)

        gathers = not together or Along.APART in lie  # a wider vector would be many single floats
        spans(b, const(0), sizes[-1], (lanes, 1) if gathers else (CHAINS * lanes, lanes, 1), compute)
    b.ret_void()
    return module


def _read(b: ir.IRBuilder, line: ir.Value, position: ir.Value, step: ir.Value, along: Along, wide: int) -> ir.Value:
    """`wide` values of an operand, from `position` on; of its own type."""
    if along is Along.SAME:
        return splat(b, b.load(line), wide)
    if along is Along.RUN:
        return load_vector(b, at(b, line, position), wide)
    places = [at(b, line, b.mul(b.add(position, const(lane)), step)) for lane in range(wide)]
    return gathered(b, places) if wide > 1 else b.load(places[0])


def _row(b: ir.IRBuilder, base: ir.Value, steps: list[ir.Value], index: list[ir.Value]) -> ir.Value:
    """Where a row along the last axis begins; `index` is that of the axis before it, and of those before that one."""
    for axis, number in zip((2, 1, 0), index, strict=True):
        base = at(b, base, b.mul(number, steps[axis]))
    return base


def _write(
    b: ir.IRBuilder, value: ir.Value, line: ir.Value, position: ir.Value, step: ir.Value | None, wide: int
) -> None:  # fmt: skip
    """`wide` results, from `position` on; neighbours where `step` is None."""
    if step is None:
        store_vector(b, value, at(b, line, position), wide)
    elif wide == 1:
        b.store(value, at(b, line, b.mul(position, step)))
    else:
        for lane in range(wide):
            place = at(b, line, b.mul(b.add(position, const(lane)), step))
            b.store(b.extract_element(value, const(lane)), place)


def _combined(b: ir.IRBuilder, values: list[ir.Value], operation: str, wide: int) -> ir.Value:
    """One value of one, of two by an operation, or of two by the booleans that pick one."""
    if len(values) == 3:
        no = ir.Constant(values[2].type, None if wide > 1 else 0)
        return b.select(b.icmp_signed("!=", values[2], no), values[0], values[1])
    return OPERATIONS[operation](b, *values) if len(values) == 2 else values[0]
