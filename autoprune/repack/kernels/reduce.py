"""Sums over any axes, a native op; the operand is read through strides."""

from __future__ import annotations

from enum import Enum

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import FLOAT, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    address,
    at,
    const,
    float_field,
    fold,
    load_vector,
    loop,
    op_function,
    smaller,
    spans,
    splat,
    store_vector,
)
from autoprune.repack.kernels.math import splat_float
from autoprune.repack.kernels.rows import CHAINS, summed

KEPT, SUMMED = 3, 2  # axes at most


class Run(Enum):
    """What lies together in the operand: the last axis that is kept, the last that is summed, or neither."""

    KEPT = "kept"
    SUMMED = "summed"
    NEITHER = "neither"


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes and strides in floats."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    STRIDE_0 = NUMBER  # of the operand, by axis that is kept
    STRIDE_1 = NUMBER
    STRIDE_2 = NUMBER
    SUMMED_STRIDE_0 = NUMBER  # by axis that is summed
    SUMMED_STRIDE_1 = NUMBER
    SIZE_0 = NUMBER
    SIZE_1 = NUMBER
    SIZE_2 = NUMBER
    SUMMED_SIZE_0 = NUMBER
    SUMMED_SIZE_1 = NUMBER
    BLOCK = NUMBER  # rows along the last kept axis an item
    SCALE = FLOAT  # of each sum


@kernel
def reduce(run: Run, target: Target) -> ir.Module:
    """Y = SCALE times the sums, in rows; an item is some rows along the last kept axis."""
    module, lanes = ir.Module(), target.lanes
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    x0 = address(b, slots, get[Field.X_SLOT], get[Field.X_OFFSET])
    y0 = address(b, slots, get[Field.Y_SLOT], get[Field.Y_OFFSET])
    scale = float_field(b, get[Field.SCALE])
    rows, first = b.mul(get[Field.SIZE_0], get[Field.SIZE_1]), b.mul(item, get[Field.BLOCK])
    outer, inner = get[Field.SUMMED_SIZE_0], get[Field.SUMMED_SIZE_1]
    with loop(b, first, smaller(b, b.add(first, get[Field.BLOCK]), rows)) as row:
        x = at(b, x0, b.mul(b.sdiv(row, get[Field.SIZE_1]), get[Field.STRIDE_0]))
        x = at(b, x, b.mul(b.srem(row, get[Field.SIZE_1]), get[Field.STRIDE_1]))
        y = at(b, y0, b.mul(row, get[Field.SIZE_2]))

        def compute(position: ir.Value, wide: int, x: ir.Value = x, y: ir.Value = y) -> None:
            source = at(b, x, b.mul(position, get[Field.STRIDE_2]))

            def add_line(index: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
                line = at(b, source, b.mul(index, get[Field.SUMMED_STRIDE_0]))
                if run is Run.SUMMED:
                    total = summed(
                        b, inner, lanes, lambda total, i, wide: b.fadd(total, load_vector(b, at(b, line, i), wide))
                    )
                    return [b.fadd(held[0], total)]

                def add(i: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
                    place = at(b, line, b.mul(i, get[Field.SUMMED_STRIDE_1]))
                    return [b.fadd(held[0], load_vector(b, place, wide))]

                return fold(b, const(0), inner, held, add)

            (total,) = fold(b, const(0), outer, [splat_float(0.0, wide)], add_line)
            store_vector(b, b.fmul(total, splat(b, scale, wide)), at(b, y, position), wide)

        spans(b, const(0), get[Field.SIZE_2], (CHAINS * lanes, lanes, 1) if run is Run.KEPT else (1,), compute)
    b.ret_void()
    return module
