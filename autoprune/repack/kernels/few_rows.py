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
    spans,
    splat,
    store_vector,
)
from autoprune.repack.kernels.math import splat_float
from autoprune.repack.kernels.matmul import Field, matrices
from autoprune.repack.kernels.panels import Lines, sums, tile
from autoprune.repack.kernels.rows import CHAINS, summed


def few(rows: int, target: Target) -> bool:
    """Whether so many rows fill no tile of registers."""
    return rows < tile(target)[0]


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
    b: ir.IRBuilder, module: ir.Module, row: ir.Value, matrix: Lines, into: ir.Value, lanes: int
) -> None:  # fmt: skip
    """``into = matrix @ row``: a result for each line."""
    width = matrix.width
    whole = b.mul(b.sdiv(width, const(lanes)), const(lanes))
    number = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
    inside = b.icmp_signed("<", number, splat(b, b.trunc(b.sub(width, whole), I32), lanes))

    def many(first: ir.Value) -> None:
        lines = [at(b, matrix.start, b.mul(b.add(first, const(lane)), matrix.step)) for lane in range(lanes)]

        def add(position: ir.Value, held: list[ir.Value], rest: bool = False) -> list[ir.Value]:
            def read(line: ir.Value) -> ir.Value:
                place = at(b, line, position)
                return masked_load(b, module, place, inside, lanes) if rest else load_vector(b, place, lanes)

            factor = read(row)
            return [b.call(fma(module, lanes), [factor, read(line), held[n]]) for n, line in enumerate(lines)]

        totals = fold(b, const(0), whole, [splat_float(0.0, lanes)] * lanes, add, lanes)
        totals = fold(b, whole, width, totals, lambda position, held: add(position, held, rest=True), lanes)
        store_vector(b, sums(b, totals), at(b, into, first), lanes)

    def single(first: ir.Value) -> None:
        line = at(b, matrix.start, b.mul(first, matrix.step))

        def add(total: ir.Value, position: ir.Value, wide: int) -> ir.Value:
            pair = [load_vector(b, at(b, each, position), wide) for each in (row, line)]
            return b.call(fma(module, wide), [*pair, total])

        b.store(summed(b, width, lanes, add), at(b, into, first))

    spans(b, const(0), matrix.count, (lanes, 1), lambda first, wide: (many if wide > 1 else single)(first))


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
            times_turned(b, module, row, Lines(other, step, columns, inner), into, target.lanes)
        else:
            times(b, module, row, Lines(other, step, inner, columns), into, target.lanes)
    b.ret_void()
    return module
