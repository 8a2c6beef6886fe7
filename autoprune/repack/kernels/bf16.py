"""bfloat16 numbers: the upper halves of floats. Floats rounded to them, and products of two of them a 32-bit lane.

Feature maps stay maps of floats, rounded ones. So any two channels make the pairs that the instruction multiplies: what
is read two bytes behind a float has that float's upper half as its lower one.
"""

from __future__ import annotations

from collections.abc import Sequence

import llvmlite.ir as ir

from autoprune.repack.kernels.bytes_lanes import int_splat, ints
from autoprune.repack.kernels.dot_products import intrinsic
from autoprune.repack.kernels.ir import I8, I32, at, const, load_vector, vector

_UPPER, _LOWER = 0xFFFF0000, 0xFFFF
_QUIET = 0x00400000  # of a NaN: its upper half is one, too
_FIRST_THIRD = 0b11100100  # ternary logic: the first where the third has bits, else the second


def rounded(b: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """Each float's nearest bfloat16 number, of two the even one, as a float; NaN stays NaN."""
    integers = ints(lanes)
    bits = b.bitcast(value, integers)
    odd = b.and_(b.lshr(bits, int_splat(16, lanes)), int_splat(1, lanes))
    up = b.add(b.add(bits, int_splat(0x7FFF, lanes)), odd)
    nan = b.fcmp_unordered("uno", value, value)
    chosen = b.select(nan, b.or_(bits, int_splat(_QUIET, lanes)), up)
    return b.bitcast(b.and_(chosen, int_splat(_UPPER, lanes)), vector(lanes))


def pairs_at(b: ir.IRBuilder, places: Sequence[ir.Value], lanes: int) -> ir.Value:
    """Lanes whose lower half is that of a float at the first place, and whose upper half of one at the second."""
    first, second = places
    if lanes == 1:  # nothing behind the float itself is touched
        low = b.lshr(b.bitcast(b.load(first), I32), int_splat(16, 1))
        return b.or_(low, b.and_(b.bitcast(b.load(second), I32), int_splat(_UPPER, 1)))
    kind, behind = ints(lanes), at(b, b.bitcast(first, I8.as_pointer()), const(2))
    low = b.bitcast(load_vector(b, behind, 4 * lanes), kind)
    high = b.bitcast(load_vector(b, second, lanes), kind)
    # said outright: LLVM makes two instructions of the selection
    ternary = intrinsic(b, f"llvm.x86.avx512.pternlog.d.{32 * lanes}", kind, [kind] * 3 + [I32])
    return b.call(ternary, [low, high, int_splat(_LOWER, lanes), ir.Constant(I32, _FIRST_THIRD)])


def add_products(b: ir.IRBuilder, sums: ir.Value, given: ir.Value, weights: ir.Value, lanes: int) -> ir.Value:
    """`sums` and, in each lane, two products: of the upper halves, then of the lower ones, each sum rounded.

    Numbers too small to be normal count as zero.
    """
    pairs = ints(lanes)
    # LLVM 22 takes bfloats here; it changes this older form into that when it reads it.
    function = intrinsic(b, f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}", sums.type, [sums.type, pairs, pairs])
    return b.call(function, [sums, b.bitcast(given, pairs), b.bitcast(weights, pairs)])


def halves(b: ir.IRBuilder, pairs: Sequence[ir.Value], lanes: int) -> list[list[ir.Value]]:
    """Of some vectors of pairs the lower halves as floats, and the upper ones."""
    lower = [b.shl(each, int_splat(16, lanes)) for each in pairs]
    upper = [b.and_(each, int_splat(_UPPER, lanes)) for each in pairs]
    return [[b.bitcast(each, vector(lanes)) for each in half] for half in (lower, upper)]
