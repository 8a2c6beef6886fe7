"""Products of a row and a matrix that is read where it lies: for few rows, storing it as panels takes longer."""

from __future__ import annotations

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.ir import (
    I32,
    at,
    const,
    fma,
    fold,
    load_vector,
    loop,
    masked_load,
    op_function,
    smaller,
    spans,
    splat,
    store_vector,
)
from autoprune.repack.kernels.math import splat_float
from autoprune.repack.kernels.matmul import Field, matrices
from autoprune.repack.kernels.panels import Lines, sums
from autoprune.repack.kernels.sums import CHAINS, PARTS, united

FEW = 12  # rows of the largest tile of registers; the same for all targets, as the orders of the sums differ


def few(rows: int) -> bool:
    """Whether so many rows fill no tile of registers."""
    return rows < FEW


def times(b: ir.IRBuilder, module: ir.Module, row: ir.Value, matrix: Lines, into: ir.Value, lanes: int) -> None:
    """``into = row @ matrix``: a float of the row for each line."""

    def compute(column: ir.Value, wide: int) -> None:
        def add(number: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
            line = at(b, matrix.start, b.add(b.mul(number, matrix.step), column))
            factor = splat(b, b.load(at(b, row, number)), wide)
            return [b.call(fma(module, wide), [factor, load_vector(b, line, wide), held[0]])]

        (total,) = fold(b, const(0), matrix.count, [splat_float(0.0, wide)], add)
        store_vector(b, total, at(b, into, column), wide)

    spans(b, const(0), matrix.width, (CHAINS * lanes, lanes, lanes // 4, 1), compute)


def times_turned(
    b: ir.IRBuilder, module: ir.Module, row: ir.Value, matrix: Lines, into: ir.Value, target: Target
) -> None:  # fmt: skip
    """``into = matrix @ row``: a result for each line, of `PARTS` partial sums each."""
    width, lanes, last = matrix.width, target.lanes, b.sub(matrix.count, const(1))
    whole = b.mul(b.sdiv(width, const(PARTS)), const(PARTS))
    number = ir.Constant(ir.VectorType(I32, PARTS), list(range(PARTS)))
    inside = b.icmp_signed("<", number, splat(b, b.trunc(b.sub(width, whole), I32), PARTS))

    def dotted(numbers: list[ir.Value]) -> list[ir.Value]:
        """The partial sums of some lines."""
        lines = [at(b, matrix.start, b.mul(each, matrix.step)) for each in numbers]

        def add(position: ir.Value, held: list[ir.Value], rest: bool = False) -> list[ir.Value]:
            def read(line: ir.Value) -> ir.Value:
                place = at(b, line, position)
                return masked_load(b, module, place, inside, PARTS) if rest else load_vector(b, place, PARTS)

            factor = read(row)
            return [b.call(fma(module, PARTS), [factor, read(line), held[n]]) for n, line in enumerate(lines)]

        totals = fold(b, const(0), whole, [splat_float(0.0, PARTS)] * len(lines), add, PARTS)
        return fold(b, whole, width, totals, lambda position, held: add(position, held, rest=True), PARTS)

    # as many lines at a time as half of the registers hold the partial sums of
    together = min(lanes, target.registers * lanes // (2 * PARTS))
    with b.if_else(b.icmp_signed(">=", last, const(lanes - 1))) as (many, few_lines):
        with many, loop(b, const(0), matrix.count, lanes) as begin:
            first = smaller(b, begin, b.sub(last, const(lanes - 1)))  # the last lines are moved back
            numbers = [b.add(first, const(lane)) for lane in range(lanes)]
            parts = [dotted(numbers[place : place + together]) for place in range(0, lanes, together)]
            totals = [_narrowed(b, total, lanes) for part in parts for total in part]
            store_vector(b, sums(b, totals), at(b, into, first), lanes)
        with few_lines, loop(b, const(0), matrix.count) as line:
            b.store(united(b, dotted([line]), b.fadd), at(b, into, line))


def _narrowed(b: ir.IRBuilder, total: ir.Value, lanes: int) -> ir.Value:
    """Partial sums added half to half until a register of `lanes` holds them."""
    count = PARTS
    while count > lanes:
        count //= 2
        low, high = (ir.Constant(ir.VectorType(I32, count), list(range(first, first + count))) for first in (0, count))
        total = b.fadd(b.shuffle_vector(total, total, low), b.shuffle_vector(total, total, high))
    return total


@kernel
def product(target: Target, turned: bool) -> ir.Module:
    """Y = x other; an item is one product. `turned`: a column of the right matrix lies together, not a row."""
    module = ir.Module()
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    x, other, y = matrices(b, get, slots, item)
    inner, columns, step = get[Field.INNER], get[Field.COLUMNS], get[Field.OTHER_LINE]
    with loop(b, const(0), get[Field.ROWS]) as number:
        row, into = (at(b, x, b.mul(number, get[Field.X_ROW])), at(b, y, b.mul(number, get[Field.Y_ROW])))
        if turned:
            times_turned(b, module, row, Lines(other, step, columns, inner), into, target)
        else:
            times(b, module, row, Lines(other, step, inner, columns), into, target.lanes)
    b.ret_void()
    return module
