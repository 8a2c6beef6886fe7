"""Activations as LLVM IR, for vectors of any lane count; in float32, to about 2e-7 of torch's. NaN stays NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import llvmlite.ir as ir
import numpy as np

from autoprune.repack.kernels.ir import F32, I32, clamp, fma, vector

Emit = Callable[[ir.IRBuilder, ir.Module, ir.Value, int], ir.Value]

_ROUNDER = 12582912.0  # 1.5 * 2**23: adding it leaves an integer in the low bits
_EXP_RANGE = (-87.3, 88.3)  # where the result is a normal number
_EXP = (1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0)  # Taylor: enough for |r| <= ln(2) / 2
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # Cody & Waite: n * _LN2_HIGH is exact
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)  # Abramowitz & Stegun 7.1.26
_ERF_SLOPE = 0.3275911


def splat_float(value: float, lanes: int) -> ir.Constant:
    """A constant in every lane."""
    scalar = ir.Constant(F32, float(np.float32(value)))
    return scalar if lanes == 1 else ir.Constant(vector(lanes), [scalar] * lanes)


def _splat_int(value: int, lanes: int) -> ir.Constant:
    scalar = ir.Constant(I32, value)
    return scalar if lanes == 1 else ir.Constant(ir.VectorType(I32, lanes), [scalar] * lanes)


def _polynomial(b: ir.IRBuilder, module: ir.Module, x: ir.Value, factors: tuple[float, ...], lanes: int) -> ir.Value:
    """Horner's rule, the highest power's factor first."""
    total: ir.Value = splat_float(factors[0], lanes)
    for factor in factors[1:]:
        total = b.call(fma(module, lanes), [total, x, splat_float(factor, lanes)])
    return total


def exp(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    """E ** x; results beyond the normal numbers are their ends."""
    low, high = (splat_float(end, lanes) for end in _EXP_RANGE)
    x = clamp(b, x, low, high)
    multiply = fma(module, lanes)
    rounder = splat_float(_ROUNDER, lanes)
    shifted = b.call(multiply, [x, splat_float(1 / math.log(2), lanes), rounder])
    n = b.fsub(shifted, rounder)
    r = b.call(multiply, [n, splat_float(-_LN2_HIGH, lanes), x])
    r = b.call(multiply, [n, splat_float(-_LN2_LOW, lanes), r])
    power = _polynomial(b, module, r, _EXP, lanes)
    integers = _splat_int(0, lanes).type
    exponent = b.shl(b.bitcast(shifted, integers), _splat_int(23, lanes))
    return b.bitcast(b.add(b.bitcast(power, integers), exponent), x.type)


def _sigmoid(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    one = splat_float(1.0, lanes)
    return b.fdiv(one, b.fadd(one, exp(b, module, b.fneg(x), lanes)))


def _silu(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    return b.fmul(x, _sigmoid(b, module, x, lanes))


def _tanh(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    doubled = _sigmoid(b, module, b.fadd(x, x), lanes)
    return b.fsub(b.fadd(doubled, doubled), splat_float(1.0, lanes))


def _gelu(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    one = splat_float(1.0, lanes)
    negative = b.fcmp_ordered("<", x, splat_float(0.0, lanes))
    size = b.select(negative, b.fneg(x), x)
    z = b.fmul(size, splat_float(math.sqrt(0.5), lanes))
    t = b.fdiv(one, b.call(fma(module, lanes), [z, splat_float(_ERF_SLOPE, lanes), one]))
    tail = b.fmul(_polynomial(b, module, t, (*_ERF, 0.0), lanes), exp(b, module, b.fneg(b.fmul(z, z)), lanes))
    # x < 0: x/2 * tail; else x/2 * (2 - tail): no difference of nearly equal numbers.
    share = b.select(negative, tail, b.fsub(splat_float(2.0, lanes), tail))
    return b.fmul(b.fmul(x, splat_float(0.5, lanes)), share)


def _gelu_tanh(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    slope = math.sqrt(8 / math.pi)
    square = b.fmul(x, x)
    inner = b.call(fma(module, lanes), [square, splat_float(0.044715 * slope, lanes), splat_float(slope, lanes)])
    return b.fmul(x, _sigmoid(b, module, b.fmul(x, inner), lanes))


def _hardsigmoid(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    moved = clamp(b, b.fadd(x, splat_float(3.0, lanes)), splat_float(0.0, lanes), splat_float(6.0, lanes))
    return b.fmul(moved, splat_float(1 / 6, lanes))


def _hardswish(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    return b.fmul(x, _hardsigmoid(b, module, x, lanes))


ACTIVATIONS: Mapping[str, Emit] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "hardswish": _hardswish,
    "hardsigmoid": _hardsigmoid,
}
"""Name -> emitter; activations that are clamps are not here, see `clamp_bounds`."""

_CLAMPS: Mapping[str, tuple[float, float]] = {
    "": (-math.inf, math.inf),
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
}


def clamp_bounds(name: str) -> tuple[float, float] | None:
    """The bounds of an activation that is a clamp, ``""`` for none at all; None for the others."""
    return _CLAMPS.get(name)
