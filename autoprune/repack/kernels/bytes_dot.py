"""Four products of bytes added to each 32-bit lane, by what a target has for it."""

from __future__ import annotations

import llvmlite.ir as ir

from autoprune.repack.kernels.bytes_lanes import BYTES, int_splat
from autoprune.repack.kernels.compiler import Target

_VNNI = {16: ("avx512vnni",), 8: ("avxvnni",)}  # one of them, by lanes
_MADD = {16: ("avx512bw",), 8: ("avx2",)}


def dot(b: ir.IRBuilder, sums: ir.Value, given: ir.Value, weights: ir.Value, target: Target) -> ir.Value:
    """`sums` and, in each 32-bit lane, four products: of the unsigned bytes `given` by the signed ones in `weights`."""
    named = {feature[1:]: feature.startswith("+") for feature in target.features.split(",") if feature}
    for features, form in ((_VNNI, _vnni), (_MADD, _madd)):
        if any(named.get(name, False) for name in features.get(target.lanes, ())):
            return form(b, sums, given, weights, target.lanes)
    return _plain(b, sums, given, weights, target.lanes)


def _vnni(b: ir.IRBuilder, sums: ir.Value, given: ir.Value, weights: ir.Value, lanes: int) -> ir.Value:
    # LLVM 22 takes bytes here; it changes this older form into that when it reads it.
    function = _intrinsic(b, f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", sums.type, [sums.type] * 3)
    return b.call(function, [sums, given, weights])


def _madd(b: ir.IRBuilder, sums: ir.Value, given: ir.Value, weights: ir.Value, lanes: int) -> ir.Value:
    """By 16-bit halves, of the even bytes and of the odd ones, whose products fit: those of pairs of bytes do not."""
    halves = ir.VectorType(ir.IntType(16), 2 * lanes)
    name = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}[lanes]
    multiply, eight = _intrinsic(b, name, sums.type, [halves] * 2), ir.Constant(halves, [8] * 2 * lanes)
    low = ir.Constant(halves, [255] * 2 * lanes)
    given, weights = (b.bitcast(each, halves) for each in (given, weights))
    even = b.call(multiply, [b.and_(given, low), b.ashr(b.shl(weights, eight), eight)])
    odd = b.call(multiply, [b.lshr(given, eight), b.ashr(weights, eight)])
    return b.add(b.add(sums, even), odd)


def _plain(b: ir.IRBuilder, sums: ir.Value, given: ir.Value, weights: ir.Value, lanes: int) -> ir.Value:
    low, above = int_splat(255, lanes), int_splat(24, lanes)
    for j in range(BYTES):
        byte = b.and_(b.lshr(given, int_splat(8 * j, lanes)), low)
        weight = b.ashr(b.shl(weights, int_splat(24 - 8 * j, lanes)), above)
        sums = b.add(sums, b.mul(byte, weight))
    return sums


def _intrinsic(b: ir.IRBuilder, name: str, result: ir.Type, kinds: list[ir.Type]) -> ir.Function:
    return b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(result, kinds), name)
