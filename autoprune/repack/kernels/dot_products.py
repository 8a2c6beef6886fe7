"""Dot products of bytes, added to 32-bit lanes: how each target computes them.

A lane of what is given holds four unsigned bytes, one of the weights four signed ones from -127 to 127. Where a target
multiplies signed bytes alone, 128 is taken from each unsigned one, and sums start from 128 times those of their
weights: they end as the same integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import llvmlite.ir as ir
import numpy as np
from numpy.typing import NDArray

from autoprune.repack.kernels.bytes_lanes import int_splat
from autoprune.repack.kernels.compiler import Dot, Target
from autoprune.repack.kernels.ir import I8, I32, at, broadcast, const, lanes_at
from autoprune.repack.weights.quads import QUAD

I16 = ir.IntType(16)
_TOP_BITS = 0x80808080
_HALF = 128


def starts_of(row_sums: NDArray[np.int64]) -> NDArray[np.int32]:
    """What the sums of rows start from on targets that are `signed`; `row_sums`: of their weights."""
    return (_HALF * row_sums).astype(np.int32)


def ready(b: ir.IRBuilder, given: ir.Value, target: Target) -> ir.Value:
    """Lanes of unsigned bytes as `dot` takes them: 128 less each where the target multiplies signed ones.

    Sums start from 128 times those of their weights then.
    """
    if not target.signed:
        return given
    return b.xor(given, int_splat(_TOP_BITS, getattr(given.type, "count", 1)))


def dot(b: ir.IRBuilder, sums: ir.Value, given: ir.Value, weights: ir.Value, target: Target) -> ir.Value:
    """`sums` and, in each 32-bit lane, four products: of the bytes `given`, which are `ready`, by signed `weights`."""
    return _DOTS[target.dot](b, sums, given, weights, target)


def _vnni(b: ir.IRBuilder, sums: ir.Value, given: ir.Value, weights: ir.Value, target: Target) -> ir.Value:
    # LLVM 22 takes bytes here; it changes this older form into that when it reads it.
    function = intrinsic(b, f"llvm.x86.avx512.vpdpbusd.{32 * target.lanes}", sums.type, [sums.type] * 3)
    return b.call(function, [sums, given, weights])


def _arm_dot(b: ir.IRBuilder, sums: ir.Value, given: ir.Value, weights: ir.Value, target: Target) -> ir.Value:
    bytes_ = ir.VectorType(I8, QUAD * target.lanes)
    name = f"llvm.aarch64.neon.{target.dot}.v{target.lanes}i32.v{bytes_.count}i8"
    function = intrinsic(b, name, sums.type, [sums.type, bytes_, bytes_])
    return b.call(function, [sums, b.bitcast(given, bytes_), b.bitcast(weights, bytes_)])


_MADDS = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}


def _madd(b: ir.IRBuilder, sums: ir.Value, given: ir.Value, weights: ir.Value, target: Target) -> ir.Value:
    """By 16-bit halves, of the even bytes and of the odd ones, whose products fit: those of pairs of bytes do not."""
    lanes = target.lanes
    halves = ir.VectorType(I16, 2 * lanes)
    name = "llvm.wasm.dot" if target.family == "wasm32" else _MADDS[lanes]
    multiply, eight = intrinsic(b, name, sums.type, [halves] * 2), ir.Constant(halves, [8] * 2 * lanes)
    low = ir.Constant(halves, [255] * 2 * lanes)
    given, weights = (b.bitcast(each, halves) for each in (given, weights))
    even = b.call(multiply, [b.and_(given, low), b.ashr(b.shl(weights, eight), eight)])
    odd = b.call(multiply, [b.lshr(given, eight), b.ashr(weights, eight)])
    return b.add(b.add(sums, even), odd)


def _halves(b: ir.IRBuilder, sums: ir.Value, given: ir.Value, weights: ir.Value, target: Target) -> ir.Value:
    """By bytes 0 and 1 of each lane, then 2 and 3: two products fit 16 bits, as no weight is -128."""
    count = 2 * target.lanes
    halves, bytes_ = ir.VectorType(I16, count), ir.VectorType(I8, count)

    def part(value: ir.Value, which: int) -> ir.Value:
        chosen = lanes_at(b, b.bitcast(value, halves), range(which, count, 2))
        return b.sext(b.bitcast(chosen, bytes_), halves)

    low, high = (b.mul(part(given, which), part(weights, which)) for which in (0, 1))
    pairs = b.add(low, high)
    if target.family == "armv7":
        name = f"llvm.arm.neon.vpadals.v{target.lanes}i32.v{count}i16"
        return b.call(intrinsic(b, name, sums.type, [sums.type, halves]), [sums, pairs])
    name = f"llvm.aarch64.neon.saddlp.v{target.lanes}i32.v{count}i16"
    return b.add(sums, b.call(intrinsic(b, name, sums.type, [halves]), [pairs]))


def _plain(b: ir.IRBuilder, sums: ir.Value, given: ir.Value, weights: ir.Value, target: Target) -> ir.Value:
    for place in range(QUAD):
        above = int_splat(24 - 8 * place, target.lanes)  # bits above the byte
        weight = b.ashr(b.shl(weights, above), int_splat(24, target.lanes))
        sums = b.add(sums, b.mul(byte_of(b, given, place, target.lanes), weight))
    return sums


_DOTS: Mapping[Dot, Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value, Target], ir.Value]] = {
    "vnni": _vnni, "usdot": _arm_dot, "sdot": _arm_dot, "madd": _madd, "halves": _halves, "plain": _plain,
}  # fmt: skip


def row_weights(b: ir.IRBuilder, pointer: ir.Value, rows: int, target: Target) -> Iterator[ir.Value]:
    """The weights of each of `rows` rows, in every lane."""
    if target.dot != "halves":
        yield from broadcast(b, pointer, rows, target.lanes, target.by_lane)
        return
    halves, wide = b.bitcast(pointer, I16.as_pointer()), 2 * min(rows, target.lanes)
    for first in range(0, 2 * rows, wide):  # as halves, for LLVM to see that it broadcasts two of them
        held = b.load(b.bitcast(at(b, halves, const(first)), ir.VectorType(I16, wide).as_pointer()), align=4)
        for lane in range(0, wide, 2):
            yield b.bitcast(lanes_at(b, held, [lane, lane + 1] * target.lanes), ir.VectorType(I32, target.lanes))


def byte_of(b: ir.IRBuilder, given: ir.Value, place: int, lanes: int) -> ir.Value:
    """The byte at `place` of each lane, 0 to 255."""
    return b.and_(b.lshr(given, int_splat(8 * place, lanes)), int_splat(255, lanes))


def intrinsic(b: ir.IRBuilder, name: str, result: ir.Type, kinds: list[ir.Type]) -> ir.Function:
    """A function of LLVM, declared once a module."""
    return b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(result, kinds), name)
