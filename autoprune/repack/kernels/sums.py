"""Sums of floats in an order that is the same on every processor, so that their bits are too.

As many partial sums are kept as the widest register holds, however wide those of a target are: LLVM splits a vector of
`PARTS` floats where it is too wide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import llvmlite.ir as ir

from autoprune.repack.kernels.ir import I32, const, fold
from autoprune.repack.kernels.math import splat_float

PARTS = 16  # partial sums side by side
CHAINS = 4  # vectors of them, since each sum waits for the one before


def pieces(wide: int, lanes: int) -> tuple[int, range]:
    """A vector of `wide` floats in pieces that a target's registers hold side by side: their width, their places."""
    width = min(wide, CHAINS * lanes)
    return width, range(0, wide, width)


def united(b: ir.IRBuilder, parts: Sequence[ir.Value], join: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """One float of all lanes of a vector, given in pieces: half to half."""
    found = list(parts)
    while len(found) > 1:
        half = len(found) // 2
        found = [join(one, other) for one, other in zip(found[:half], found[half:], strict=True)]
    (value,) = found
    if not isinstance(value.type, ir.VectorType):
        return value
    lanes = value.type.count
    while lanes > 1:
        lanes //= 2
        kind = ir.VectorType(I32, lanes)
        low, high = (ir.Constant(kind, list(range(first, first + lanes))) for first in (0, lanes))
        value = join(b.shuffle_vector(value, value, low), b.shuffle_vector(value, value, high))
    return b.extract_element(value, const(0))


def summed(
    b: ir.IRBuilder, count: ir.Value, lanes: int, step: Callable[[ir.Value, ir.Value, int], ir.Value]
) -> ir.Value:
    """A sum of `count` floats by ``step(total, position, width)``: some vectors at a time, one vector, one float."""

    def run(first: ir.Value, last: ir.Value, wide: int) -> ir.Value:
        width, places = pieces(wide, lanes)

        def add(i: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
            return [
                step(total, b.add(i, const(place)) if place else i, width)
                for total, place in zip(held, places, strict=True)
            ]

        return united(b, fold(b, first, last, [splat_float(0.0, width)] * len(places), add, wide), b.fadd)

    start, totals = const(0), []
    for wide in (CHAINS * PARTS, PARTS, 1):
        stop = b.mul(b.sdiv(count, const(wide)), const(wide))
        totals.append(run(start, stop, wide))
        start = stop
    return b.fadd(b.fadd(totals[0], totals[1]), totals[2])
