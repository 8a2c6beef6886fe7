"""Softmax of rows, a native op."""

from __future__ import annotations

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    F32,
    I32,
    address,
    at,
    const,
    fold,
    load_vector,
    loop,
    masked_load,
    masked_store,
    op_function,
    smaller,
    splat,
    store_vector,
)
from autoprune.repack.kernels.math import exp, log, splat_float
from autoprune.repack.kernels.rows import each
from autoprune.repack.kernels.sums import PARTS, summed, united


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
def softmax(logarithm: bool, short: bool, target: Target) -> ir.Module:
    """Y = e ** (x - max) / their sum, or its `logarithm`, a row at a time; an item is some rows.

    `short`: rows are of at most `PARTS` floats, and one vector each.
    """
    module, lanes = ir.Module(), target.lanes
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    first, features = b.mul(item, get[Field.BLOCK]), get[Field.FEATURES]
    x0 = address(b, slots, get[Field.X_SLOT], get[Field.X_OFFSET])
    y0 = address(b, slots, get[Field.Y_SLOT], get[Field.Y_OFFSET])
    with loop(b, first, smaller(b, b.add(first, get[Field.BLOCK]), get[Field.ROWS])) as row:
        x, y = (at(b, base, b.mul(row, features)) for base in (x0, y0))
        if short:
            _at_once(b, module, x, y, features, logarithm)
        else:
            _in_vectors(b, module, x, y, features, lanes, logarithm)
    b.ret_void()
    return module


def _at_once(
    b: ir.IRBuilder, module: ir.Module, x: ir.Value, y: ir.Value, features: ir.Value, logarithm: bool
) -> None:  # fmt: skip
    """A row of at most `PARTS` floats."""
    number = ir.Constant(ir.VectorType(I32, PARTS), list(range(PARTS)))
    inside = b.icmp_signed("<", number, splat(b, b.trunc(features, I32), PARTS))
    nothing = splat_float(float("-inf"), PARTS)
    given = b.select(inside, masked_load(b, module, x, inside, PARTS), nothing)
    away = b.fsub(given, splat(b, united(b, [given], lambda one, other: _larger(b, one, other)), PARTS))
    power = b.select(inside, exp(b, module, away, PARTS), splat_float(0.0, PARTS))
    last = _last(b, module, united(b, [power], b.fadd), logarithm)
    masked_store(b, module, _finished(b, away if logarithm else power, last, PARTS, logarithm), y, inside, PARTS)


def _in_vectors(
    b: ir.IRBuilder, module: ir.Module, x: ir.Value, y: ir.Value, features: ir.Value, lanes: int, logarithm: bool
) -> None:  # fmt: skip
    """A row of any length."""
    top = _largest(b, x, features, lanes)

    def add(total: ir.Value, position: ir.Value, wide: int) -> ir.Value:
        away = b.fsub(load_vector(b, at(b, x, position), wide), splat(b, top, wide))
        power = exp(b, module, away, wide)
        store_vector(b, away if logarithm else power, at(b, y, position), wide)
        return b.fadd(total, power)

    last = _last(b, module, summed(b, features, lanes, add), logarithm)

    def write(position: ir.Value, wide: int) -> None:
        here = at(b, y, position)
        store_vector(b, _finished(b, load_vector(b, here, wide), last, wide, logarithm), here, wide)

    each(b, features, lanes, write)


def _last(b: ir.IRBuilder, module: ir.Module, total: ir.Value, logarithm: bool) -> ir.Value:
    """What a row is finished with: its sum's logarithm, or what its powers are multiplied by."""
    return log(b, module, total, 1) if logarithm else b.fdiv(ir.Constant(F32, 1.0), total)


def _finished(b: ir.IRBuilder, value: ir.Value, last: ir.Value, wide: int, logarithm: bool) -> ir.Value:
    """Results, of powers, or of how far the logarithms lie from the largest."""
    other = splat(b, last, wide)
    return b.fsub(value, other) if logarithm else b.fmul(value, other)


def _larger(b: ir.IRBuilder, one: ir.Value, other: ir.Value) -> ir.Value:
    return b.select(b.fcmp_ordered(">", one, other), one, other)


def _largest(b: ir.IRBuilder, x: ir.Value, count: ir.Value, lanes: int) -> ir.Value:
    """May lose a NaN, which is in the sum of powers all the same."""
    start, top = const(0), ir.Constant(F32, float("-inf"))
    for wide in (lanes, 1):
        stop = b.mul(b.sdiv(count, const(wide)), const(wide))

        def meet(i: ir.Value, held: list[ir.Value], wide: int = wide) -> list[ir.Value]:
            return [_larger(b, held[0], load_vector(b, at(b, x, i), wide))]

        (held,) = fold(b, start, stop, [splat_float(float("-inf"), wide)], meet, wide)
        top = _larger(b, united(b, [held], lambda one, other: _larger(b, one, other)), top)
        start = stop
    return top
