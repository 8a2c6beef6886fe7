"""A native op on values wherever they lie: one, or two combined, read and written at any strides.

It copies, transposes, concatenates, adds or scales by what is repeated along some axes (a stride of 0), compares,
converts from one type to another, and picks one of two values by a boolean.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.entries import COMPARISONS, OPERATIONS, Entry, compared, converted, is_true
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
from autoprune.repack.kernels.sums import CHAINS

AXES = 6  # at most
COUNTS = (2, 4, AXES)  # of axes that kernels are made for


class Along(Enum):
    """How an operand lies along the last axis."""

    RUN = "run"  # neighbours
    SAME = "same"  # one value for all
    APART = "apart"


class Field(Fields):
    """Entries of the int64 array that describes one op; strides in entries of the operand that they belong to."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET
    X_STRIDE_0 = NUMBER  # by axis
    X_STRIDE_1 = NUMBER
    X_STRIDE_2 = NUMBER
    X_STRIDE_3 = NUMBER
    X_STRIDE_4 = NUMBER
    X_STRIDE_5 = NUMBER
    OTHER_SLOT = SLOT.of("other")
    OTHER_OFFSET = OFFSET.of("other")
    OTHER_STRIDE_0 = NUMBER.of("other")
    OTHER_STRIDE_1 = NUMBER.of("other")
    OTHER_STRIDE_2 = NUMBER.of("other")
    OTHER_STRIDE_3 = NUMBER.of("other")
    OTHER_STRIDE_4 = NUMBER.of("other")
    OTHER_STRIDE_5 = NUMBER.of("other")
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    Y_STRIDE_0 = NUMBER
    Y_STRIDE_1 = NUMBER
    Y_STRIDE_2 = NUMBER
    Y_STRIDE_3 = NUMBER
    Y_STRIDE_4 = NUMBER
    Y_STRIDE_5 = NUMBER
    SIZE_0 = NUMBER
    SIZE_1 = NUMBER
    SIZE_2 = NUMBER
    SIZE_3 = NUMBER
    SIZE_4 = NUMBER
    SIZE_5 = NUMBER
    CHOICE_SLOT = SLOT.of("choice")
    CHOICE_OFFSET = OFFSET.of("choice")
    CHOICE_STRIDE_0 = NUMBER.of("choice")
    CHOICE_STRIDE_1 = NUMBER.of("choice")
    CHOICE_STRIDE_2 = NUMBER.of("choice")
    CHOICE_STRIDE_3 = NUMBER.of("choice")
    CHOICE_STRIDE_4 = NUMBER.of("choice")
    CHOICE_STRIDE_5 = NUMBER.of("choice")
    BLOCK = NUMBER  # rows along the last axis an item
    LOW = FLOAT.of("bounds")  # results are clamped
    HIGH = FLOAT.of("bounds")


def per_axis(name: str) -> list[Field]:
    """The fields that say something of each axis, such as ``X_STRIDE``, in the axes' order."""
    return [Field[f"{name}_{axis}"] for axis in range(AXES)]


class Read(NamedTuple):
    """An operand: how it lies, and what its entries are."""

    along: Along
    entry: Entry = Entry.FLOAT32


class Made(NamedTuple):
    """A result: the type it is computed in, its entries, and whether they are neighbours along the last axis."""

    computed: Entry = Entry.FLOAT32
    entry: Entry = Entry.FLOAT32
    together: bool = True


@kernel
def strided(
    x: Read, other: Read | None, choice: Read | None, operation: str, activation: str, made: Made, axes: int,
    target: Target, bounded: bool = False,
) -> ir.Module:  # fmt: skip
    """Y = activation(clamp(x [operation other])); an item is some rows along the last axis.

    Args:
        x: an operand.
        other: the second; there is none where it is None.
        choice: booleans that pick the first operand, where they are true, or the second; None without them.
        operation: a row of `entries.OPERATIONS` or of COMPARISONS; empty without a second operand, or with a choice.
        activation: a row of `math.FUNCTIONS`, of floats; empty for none.
        made: the result.
        axes: how many of the last axes have entries, 2 or more; those before have one each.
        target: what to compile for.
        bounded: whether the results, floats, are clamped.
    """
    module, lanes = ir.Module(), target.lanes
    b, fields, slots, item, _ = op_function(module)

    def get(field: Field) -> ir.Value:
        return b.load(at(b, fields, const(field)))

    sizes = [get(field) for field in per_axis("SIZE")[-axes:]]
    bounds = tuple(float_field(b, get(field)) for field in (Field.LOW, Field.HIGH)) if bounded else ()
    given = {name: read for name, read in (("X", x), ("OTHER", other), ("CHOICE", choice)) if read is not None}
    bases = []
    for name, entry in [*((name, read.entry) for name, read in given.items()), ("Y", made.entry)]:
        place = address(b, slots, get(Field[f"{name}_SLOT"]), get(Field[f"{name}_OFFSET"]))
        bases.append(b.bitcast(place, entry.kind.as_pointer()))
    strides = [[get(field) for field in per_axis(f"{name}_STRIDE")[-axes:]] for name in (*given, "Y")]
    rows = sizes[0]
    for size in sizes[1:-1]:
        rows = b.mul(rows, size)
    first = b.mul(item, get(Field.BLOCK))
    with loop(b, first, smaller(b, b.add(first, get(Field.BLOCK)), rows)) as row:
        rest, index = row, []
        for size in sizes[-2::-1]:
            index.append(b.srem(rest, size))
            rest = b.sdiv(rest, size)
        lines = [_row(b, base, steps[-2::-1], index) for base, steps in zip(bases, strides, strict=True)]

        def compute(position: ir.Value, wide: int, lines: list[ir.Value] = lines) -> None:
            values = [
                _read(b, line, position, steps[-1], read.along, wide)
                for line, steps, read in zip(lines, strides, given.values(), strict=False)
            ]
            value, kind = _combined(b, values, list(given.values()), operation, made.computed, wide)
            if bounds:
                value = clamp(b, value, *(splat(b, bound, wide) for bound in bounds))
            if activation:
                value = FUNCTIONS[activation](b, module, value, wide)
            value = converted(b, value, kind, made.entry, wide)
            _write(b, value, lines[-1], position, None if made.together else strides[-1][-1], wide)

        apart = any(read.along is Along.APART for read in given.values())
        gathers = not made.together or apart  # a wider vector would be many single entries
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
    for step, number in zip(steps, index, strict=True):
        base = at(b, base, b.mul(number, step))
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


def _combined(
    b: ir.IRBuilder, values: list[ir.Value], read: list[Read], operation: str, computed: Entry, wide: int
) -> tuple[ir.Value, Entry]:
    """One value of one, of two by an operation, or of two by the booleans that pick one; and its type."""
    operands = [
        converted(b, value, given.entry, computed, wide) for value, given in zip(values[:2], read, strict=False)
    ]
    if len(values) == 3:
        return b.select(is_true(b, values[2], read[2].entry, wide), *operands), computed
    if operation in COMPARISONS:
        return compared(b, operation, operands[0], operands[1], computed, wide), Entry.BOOL
    return (OPERATIONS[computed][operation](b, *operands) if operation else operands[0]), computed
