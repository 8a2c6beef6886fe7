"""Products of dense matrices in registers: the right one lies in panels, some vectors of columns, line after line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target
from autoprune.repack.kernels.ir import (
    FLOATS,
    I64,
    at,
    const,
    fma,
    fold,
    inner_function,
    load_vector,
    loop,
    smaller,
    splat,
    store_vector,
    vector,
)


def tile(target: Target) -> tuple[int, int]:
    """Rows of the left matrix by vectors of a panel that stay in registers."""
    return (12, 2) if target.lanes == 16 else (6, 2)


class Lines(NamedTuple):
    """A matrix in memory: `count` lines, `step` floats apart, of `width` floats that are neighbours."""

    start: ir.Value
    step: ir.Value
    count: ir.Value
    width: ir.Value


def pack(b: ir.IRBuilder, given: Lines, into: ir.Value, wide: int) -> None:
    """Panels of a matrix's columns, zeros where a panel is padded."""
    with loop(b, const(0), given.width, wide) as column:
        panel = at(b, into, b.mul(column, given.count))
        inside = smaller(b, const(wide), b.sub(given.width, column))
        with loop(b, const(0), given.count) as number:
            source = at(b, given.start, b.add(b.mul(number, given.step), column))
            line = at(b, panel, b.mul(number, const(wide)))
            with b.if_else(b.icmp_signed("==", inside, const(wide))) as (whole, partial):
                with whole:
                    store_vector(b, load_vector(b, source, wide), line, wide)
                with partial:
                    store_vector(b, ir.Constant(vector(wide), None), line, wide)
                    with loop(b, const(0), inside) as offset:
                        b.store(b.load(at(b, source, offset)), at(b, line, offset))


def pack_turned(
    b: ir.IRBuilder, given: Lines, into: ir.Value, vectors: int, lanes: int, end: ir.Value,
    factor: ir.Value | None = None,
) -> None:  # fmt: skip
    """Panels of a matrix's lines, as columns, times `factor`.

    There are `end` columns, whole panels of them: the last line stands for those that there is no line for.
    """
    width, wide, last = given.width, vectors * lanes, b.sub(given.count, const(1))

    def line(number: ir.Value, offset: int) -> ir.Value:
        return at(b, given.start, b.mul(smaller(b, b.add(number, const(offset)), last), given.step))

    def scaled(value: ir.Value, count: int) -> ir.Value:
        return value if factor is None else b.fmul(value, splat(b, factor, count))

    with loop(b, const(0), end, lanes) as number:
        panel = at(b, into, b.mul(b.sdiv(number, const(wide)), b.mul(width, const(wide))))
        panel = at(b, panel, b.srem(number, const(wide)))
        lines = [line(number, lane) for lane in range(lanes)]
        whole = b.icmp_signed(">=", width, const(lanes))
        with b.if_else(whole) as (square, narrow):
            with square, loop(b, const(0), width, lanes) as column:  # the last square is moved back
                column = smaller(b, column, b.sub(width, const(lanes)))
                found = [load_vector(b, at(b, source, column), lanes) for source in lines]
                for lane, value in enumerate(_transposed(b, found)):
                    place = at(b, panel, b.mul(b.add(column, const(lane)), const(wide)))
                    store_vector(b, scaled(value, lanes), place, lanes)
            with narrow, loop(b, const(0), width) as column:
                for lane, source in enumerate(lines):
                    place = at(b, panel, b.add(b.mul(column, const(wide)), const(lane)))
                    b.store(scaled(b.load(at(b, source, column)), 1), place)


def _transposed(b: ir.IRBuilder, rows: Sequence[ir.Value]) -> list[ir.Value]:
    """A square of vectors: swaps its quarters, then those of the quarters, down to single floats."""
    lanes, found = len(rows), list(rows)
    kind = ir.VectorType(ir.IntType(32), lanes)
    half = lanes // 2
    while half:
        upper = [lane if not lane & half else lane - half + lanes for lane in range(lanes)]
        lower = [lane + half if not lane & half else lane + lanes for lane in range(lanes)]
        for index in range(lanes):
            if not index & half:
                one, other = found[index], found[index + half]
                found[index] = b.shuffle_vector(one, other, ir.Constant(kind, upper))
                found[index + half] = b.shuffle_vector(one, other, ir.Constant(kind, lower))
        half //= 2
    return found


def sums(b: ir.IRBuilder, rows: Sequence[ir.Value]) -> ir.Value:
    """The sum of each of a square of vectors, as a vector: halves of two vectors are added and become one."""
    lanes, found = len(rows), list(rows)
    kind, half = ir.VectorType(ir.IntType(32), lanes), lanes // 2
    while half:
        upper = [lane if not lane & half else lane - half + lanes for lane in range(lanes)]
        lower = [lane + half if not lane & half else lane + lanes for lane in range(lanes)]
        masks = [ir.Constant(kind, picked) for picked in (upper, lower)]
        found = [
            b.fadd(*(b.shuffle_vector(one, other, mask) for mask in masks))
            for one, other in zip(found[:half], found[half:], strict=True)
        ]
        half //= 2
    return found[0]


def panel_product(module: ir.Module, rows: int, vectors: int, lanes: int) -> ir.Function:
    """C = start + A B for `rows` rows and a panel: (a, a's pitch, inner, panel, start, c, c's pitch)."""
    kinds = [FLOATS, I64, I64, FLOATS, FLOATS, FLOATS, I64]
    function = inner_function(module, f"product_{rows}", kinds)
    left, left_pitch, inner, panel, start, out, out_pitch = function.args
    b = ir.IRBuilder(function.append_basic_block("entry"))
    lines = [at(b, left, b.mul(left_pitch, const(row))) for row in range(rows)]
    initial = [load_vector(b, at(b, start, const(lanes * v)), lanes) for v in range(vectors)]

    def add(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        source = at(b, panel, b.mul(k, const(vectors * lanes)))
        inputs = [load_vector(b, at(b, source, const(lanes * v)), lanes) for v in range(vectors)]
        factors = [splat(b, b.load(at(b, line, k)), lanes) for line in lines]
        pairs = [(factor, given) for factor in factors for given in inputs]
        return [b.call(fma(module, lanes), [*pair, total]) for pair, total in zip(pairs, sums, strict=True)]

    sums = fold(b, const(0), inner, initial * rows, add)
    for row in range(rows):
        target_line = at(b, out, b.mul(out_pitch, const(row)))
        for v in range(vectors):
            store_vector(b, sums[row * vectors + v], at(b, target_line, const(lanes * v)), lanes)
    b.ret_void()
    return function
