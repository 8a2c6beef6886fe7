"""Softmax of rows, a native op."""

from __future__ import annotations

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    F32,
    address,
    at,
    const,
    fold,
    load_vector,
    loop,
    op_function,
    smaller,
    splat,
    store_vector,
)
from autoprune.repack.kernels.math import exp, log, splat_float
from autoprune.repack.kernels.rows import each, summed, united


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes in floats."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    ROWS = NUMBER
    FEATURES = NUMBER
    BLOCK = NUMBER  # rows an item


@kernel
def softmax(logarithm: bool, target: Target) -> ir.Module:
    """Y = e ** (x - max) / their sum, or its `logarithm`, a row at a time; an item is some rows."""
    module, lanes = ir.Module(), target.lanes
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    first, features = b.mul(item, get[Field.BLOCK]), get[Field.FEATURES]
    x0 = address(b, slots, get[Field.X_SLOT], get[Field.X_OFFSET])
    y0 = address(b, slots, get[Field.Y_SLOT], get[Field.Y_OFFSET])
    with loop(b, first, smaller(b, b.add(first, get[Field.BLOCK]), get[Field.ROWS])) as row:
        x, y = (at(b, base, b.mul(row, features)) for base in (x0, y0))
        top = _largest(b, x, features, lanes)

        def add(
            total: ir.Value, position: ir.Value, wide: int, x: ir.Value = x, y: ir.Value = y, top: ir.Value = top
        ) -> ir.Value:
            away = b.fsub(load_vector(b, at(b, x, position), wide), splat(b, top, wide))
            power = exp(b, module, away, wide)
            store_vector(b, away if logarithm else power, at(b, y, position), wide)
            return b.fadd(total, power)

        total = summed(b, features, lanes, add)
        last = log(b, module, total, 1) if logarithm else b.fdiv(ir.Constant(F32, 1.0), total)

        def write(position: ir.Value, wide: int, y: ir.Value = y, last: ir.Value = last) -> None:
            here = at(b, y, position)
            value, other = load_vector(b, here, wide), splat(b, last, wide)
            store_vector(b, b.fsub(value, other) if logarithm else b.fmul(value, other), here, wide)

        each(b, features, lanes, write)
    b.ret_void()
    return module


def _largest(b: ir.IRBuilder, x: ir.Value, count: ir.Value, lanes: int) -> ir.Value:
    """May lose a NaN, which is in the sum of powers all the same."""

    def larger(one: ir.Value, other: ir.Value) -> ir.Value:
        return b.select(b.fcmp_ordered(">", one, other), one, other)

    start, top = const(0), ir.Constant(F32, float("-inf"))
    for wide in (lanes, 1):
        stop = b.mul(b.sdiv(count, const(wide)), const(wide))

        def meet(i: ir.Value, held: list[ir.Value], wide: int = wide) -> list[ir.Value]:
            return [larger(held[0], load_vector(b, at(b, x, i), wide))]

        (held,) = fold(b, start, stop, [splat_float(float("-inf"), wide)], meet, wide)
        top = larger(united(b, held, wide, larger), top)
        start = stop
    return top
