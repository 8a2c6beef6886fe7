"""Activations as LLVM IR, for vectors of any lane count; in float32, to about 2e-7 of torch's. NaN stays NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import llvmlite.ir as ir
import numpy as np

from autoprune.repack.kernels import bf16
from autoprune.repack.kernels.ir import F32, I32, clamp, fma, vector

Emit = Callable[[ir.IRBuilder, ir.Module, ir.Value, int], ir.Value]

_BIAS = 127  # of a float's exponent
_ROUNDER = 12582912.0 + _BIAS  # 1.5 * 2**23: adding it leaves an integer in the low bits, here an exponent field
_POWER_RANGE = (-127.0, 128.0)  # fields 0 and 255: as factors, exactly 0 and infinity
_EXP_RANGE = (-88.0, 88.7)  # natural, ends in the same fields
_LOG2E = float(np.float32(1 / math.log(2)))
# (2**r - 1) / r for |r| <= 1/2, minimax: of 2**r to 9.2e-8; of the quotient itself to 1.1e-8.
_POWER = (0.001326472731307149, 0.009671512991189957, 0.05550733581185341, 0.24022242426872253, 0.6931470036506653)
_RISE = (0.00015403512, 0.0013390735257416964, 0.009618237614631653, 0.055503573268651965, 0.24022649228572845,
         0.6931471824645996)  # fmt: skip
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)  # Abramowitz & Stegun 7.1.26
_ERF_SLOPE = 0.3275911
_ROOT_HALF = int(np.float32(math.sqrt(0.5)).view(np.int32))
_LN2 = 0.693359375  # so short that its products with exponents are exact
_LN2_LOW = math.log(2) - _LN2
_HALF_PI_LOW = 6.123233995736766e-17
# (log(1 + m) - m + m**2 / 2) / m**3, (sin(r) - r) / r**3 and (cos(r) - 1 + r**2 / 2) / r**4, of r**2, minimax.
_LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
        2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)  # fmt: skip
_SINE = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COSINE = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)


def maximum(b: ir.IRBuilder, one: ir.Value, other: ir.Value) -> ir.Value:
    """The larger of each two floats; NaN wins, as in torch."""
    larger = b.select(b.fcmp_ordered(">", one, other), one, other)  # one instruction; `other` where one of them is NaN
    return b.select(b.fcmp_unordered("uno", one, one), one, larger)


def minimum(b: ir.IRBuilder, one: ir.Value, other: ir.Value) -> ir.Value:
    """The smaller of each two floats; NaN wins, as in torch."""
    smaller = b.select(b.fcmp_ordered("<", one, other), one, other)
    return b.select(b.fcmp_unordered("uno", one, one), one, smaller)


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


def _scaled(b: ir.IRBuilder, module: ir.Module, r: ir.Value, shifted: ir.Value, lanes: int) -> ir.Value:
    """2 ** (r + n), n in the low bits of `shifted`; a product, since a sum of exponents is wrong at 0, inf and NaN."""
    return b.fmul(_polynomial(b, module, r, (*_POWER, 1.0), lanes), _factor(b, shifted, lanes))


def _factor(b: ir.IRBuilder, shifted: ir.Value, lanes: int) -> ir.Value:
    """2 ** n."""
    integers = _splat_int(0, lanes).type
    return b.bitcast(b.shl(b.bitcast(shifted, integers), _splat_int(23, lanes)), shifted.type)


def exp2(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    """2 ** x to 2 ulp; 0 below the normal numbers, infinity from 2 ** 127.5 on, NaN of NaN."""
    x = clamp(b, x, *(splat_float(end, lanes) for end in _POWER_RANGE))
    rounder = splat_float(_ROUNDER, lanes)
    shifted = b.fadd(x, rounder)
    return _scaled(b, module, b.fsub(x, b.fsub(shifted, rounder)), shifted, lanes)


def _split(
    b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int, factor: float = 1.0
) -> tuple[ir.Value, ir.Value]:
    """`factor` x log2(e) as a rest of at most one half, and the integer in the low bits of the other.

    The rest is taken of x, whose difference from a multiple of `_LN2` is exact even where nothing is fused. `factor` is
    a power of two or minus one, and changes no bits.
    """
    multiply, rounder = fma(module, lanes), splat_float(_ROUNDER, lanes)
    shifted = b.call(multiply, [x, splat_float(_LOG2E * factor, lanes), rounder])
    integer = b.fsub(shifted, rounder)
    rest = b.call(multiply, [integer, splat_float(-_LN2 / factor, lanes), x])
    rest = b.call(multiply, [integer, splat_float(-_LN2_LOW / factor, lanes), rest])
    return b.fmul(rest, splat_float(_LOG2E * factor, lanes)), shifted


def exp(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int, factor: float = 1.0) -> ir.Value:
    """E ** (`factor` x) to 2 ulp; 0 below the normal numbers, infinity from 2 ** 127.5 on, NaN of NaN.

    `factor` is a power of two or minus one: the same bits as if x were multiplied before, by fewer instructions.
    """
    x = clamp(b, x, *(splat_float(end, lanes) for end in sorted(end / factor for end in _EXP_RANGE)))
    return _scaled(b, module, *_split(b, module, x, lanes, factor), lanes)


def exp_falling(b: ir.IRBuilder, module: ir.Module, size: ir.Value, lanes: int, factor: float) -> ir.Value:
    """`exp` of no negative `size` by a `factor` below 0, which needs but one bound."""
    most = splat_float(_EXP_RANGE[0] / factor, lanes)
    size = b.select(b.fcmp_ordered(">", size, most), most, size)
    return _scaled(b, module, *_split(b, module, size, lanes, factor), lanes)


def _sigmoid(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    one = splat_float(1.0, lanes)
    return b.fdiv(one, b.fadd(one, exp(b, module, x, lanes, -1.0)))


def _silu(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    return b.fmul(x, _sigmoid(b, module, x, lanes))


def _tanh(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    """From exp(2 x) - 1, which keeps the digits of a small x; it is 1 to the last bit from 10 on."""
    x = clamp(b, x, splat_float(-10.0, lanes), splat_float(10.0, lanes))
    r, shifted = _split(b, module, b.fadd(x, x), lanes)
    factor = _factor(b, shifted, lanes)
    rise = b.fmul(r, _polynomial(b, module, r, _RISE, lanes))
    rise = b.call(fma(module, lanes), [rise, factor, b.fsub(factor, splat_float(1.0, lanes))])
    return b.fdiv(rise, b.fadd(rise, splat_float(2.0, lanes)))


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


def _gated(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int, cut: float, odd: tuple[float, ...]) -> ir.Value:
    """``x / 2 * (1 + p(x))``; p an odd polynomial, from its highest power on, held from `cut` on, and 1 there."""
    near = clamp(b, x, splat_float(-cut, lanes), splat_float(cut, lanes))
    share = b.fmul(near, _polynomial(b, module, b.fmul(near, near), odd, lanes))
    half = b.fmul(x, splat_float(0.5, lanes))
    return b.call(fma(module, lanes), [half, share, half])


def _hardsigmoid(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    moved = clamp(b, b.fadd(x, splat_float(3.0, lanes)), splat_float(0.0, lanes), splat_float(6.0, lanes))
    return b.fmul(moved, splat_float(1 / 6, lanes))


def _hardswish(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    return b.fmul(x, _hardsigmoid(b, module, x, lanes))


def _leaky_relu(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int, slope: float) -> ir.Value:
    negative = b.fcmp_ordered("<", x, splat_float(0.0, lanes))
    return b.select(negative, b.fmul(x, splat_float(slope, lanes)), x)


def _sqrt(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    name = f"llvm.sqrt.v{lanes}f32" if lanes > 1 else "llvm.sqrt.f32"
    function = module.globals.get(name) or ir.Function(module, ir.FunctionType(x.type, [x.type]), name)
    return b.call(function, [x])


def _abs(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    bits = b.and_(b.bitcast(x, _splat_int(0, lanes).type), _splat_int(2**31 - 1, lanes))
    return b.bitcast(bits, x.type)


def copysign(b: ir.IRBuilder, module: ir.Module, size: ir.Value, x: ir.Value, lanes: int) -> ir.Value:
    """The absolute value of `size` with the sign of x, a NaN's too."""
    name = f"llvm.copysign.v{lanes}f32" if lanes > 1 else "llvm.copysign.f32"
    function = module.globals.get(name) or ir.Function(module, ir.FunctionType(x.type, [x.type] * 2), name)
    return b.call(function, [size, x])


def _signed(b: ir.IRBuilder, size: ir.Value, x: ir.Value, lanes: int) -> ir.Value:
    """`size`, not negative, with the sign of x."""
    integers = _splat_int(0, lanes)
    sign = b.and_(b.bitcast(x, integers.type), _splat_int(-(2**31), lanes))
    return b.bitcast(b.or_(b.bitcast(size, integers.type), sign), x.type)


def _round(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    """To the next integer, to the even one of two: the sum with 2**23 has no room for more."""
    size, whole = _abs(b, module, x, lanes), splat_float(2.0**23, lanes)
    near = b.fsub(b.fadd(size, whole), whole)
    return _signed(b, b.select(b.fcmp_ordered("<", size, whole), near, size), x, lanes)


def _floor(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    near = _round(b, module, x, lanes)
    return b.select(b.fcmp_ordered(">", near, x), b.fsub(near, splat_float(1.0, lanes)), near)


def _ceil(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    near = _round(b, module, x, lanes)
    return b.select(b.fcmp_ordered("<", near, x), b.fadd(near, splat_float(1.0, lanes)), near)


def _trunc(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    return _signed(b, _floor(b, module, _abs(b, module, x, lanes), lanes), x, lanes)


def _sign(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    """0 of NaN, as torch has it."""
    zero, one = splat_float(0.0, lanes), splat_float(1.0, lanes)
    above, below = (b.select(b.fcmp_ordered(sign, x, zero), one, zero) for sign in (">", "<"))
    return b.fsub(above, below)


def _erf(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    one, size = splat_float(1.0, lanes), _abs(b, module, x, lanes)
    t = b.fdiv(one, b.call(fma(module, lanes), [size, splat_float(_ERF_SLOPE, lanes), one]))
    power = exp(b, module, b.fneg(b.fmul(size, size)), lanes)
    return _signed(b, b.fsub(one, b.fmul(_polynomial(b, module, t, (*_ERF, 0.0), lanes), power)), x, lanes)


def log(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int) -> ir.Value:
    """The natural logarithm: minus infinity of 0, NaN below."""
    small = b.fcmp_ordered("<", x, splat_float(2.0**-126, lanes))  # without a leading 1 of their own
    normal = b.select(small, b.fmul(x, splat_float(2.0**23, lanes)), x)
    bits = b.bitcast(normal, _splat_int(0, lanes).type)
    away = b.sub(bits, _splat_int(_ROOT_HALF, lanes))
    exponent = b.ashr(away, _splat_int(23, lanes))
    mantissa = b.sub(bits, b.shl(exponent, _splat_int(23, lanes)))  # from the root of one half to that of 2
    power = b.fsub(b.sitofp(exponent, x.type), b.select(small, splat_float(23.0, lanes), splat_float(0.0, lanes)))
    m = b.fsub(b.bitcast(mantissa, x.type), splat_float(1.0, lanes))
    square = b.fmul(m, m)
    rest = b.fmul(b.fmul(_polynomial(b, module, m, _LOG, lanes), m), square)
    rest = b.call(fma(module, lanes), [power, splat_float(_LN2_LOW, lanes), rest])
    rest = b.call(fma(module, lanes), [square, splat_float(-0.5, lanes), rest])
    found = b.call(fma(module, lanes), [power, splat_float(_LN2, lanes), b.fadd(m, rest)])
    zero, infinite = splat_float(0.0, lanes), splat_float(math.inf, lanes)
    found = b.select(b.fcmp_ordered(">", x, zero), found, splat_float(math.nan, lanes))
    found = b.select(b.fcmp_ordered("==", x, infinite), infinite, found)
    return b.select(b.fcmp_ordered("==", x, zero), splat_float(-math.inf, lanes), found)


def _wave(b: ir.IRBuilder, module: ir.Module, x: ir.Value, lanes: int, ahead: int) -> ir.Value:
    """The sine `ahead` quarter turns further; NaN from 2**51 on. Whole quarters are taken off in float64."""
    double = ir.DoubleType() if lanes == 1 else ir.VectorType(ir.DoubleType(), lanes)
    long = ir.IntType(64) if lanes == 1 else ir.VectorType(ir.IntType(64), lanes)

    def splat_double(value: float) -> ir.Constant:
        one = ir.Constant(ir.DoubleType(), value)
        return one if lanes == 1 else ir.Constant(double, [one] * lanes)

    name = "llvm.fma.f64" if lanes == 1 else f"llvm.fma.v{lanes}f64"
    multiply = module.globals.get(name) or ir.Function(module, ir.FunctionType(double, [double] * 3), name)
    exact, rounder = b.fpext(x, double), splat_double(1.5 * 2.0**52)  # adding it leaves an integer in the low bits
    shifted = b.fadd(b.fmul(exact, splat_double(2 / math.pi)), rounder)
    turns = b.fneg(b.fsub(shifted, rounder))
    exact = b.call(multiply, [turns, splat_double(math.pi / 2), exact])
    r = b.fptrunc(b.call(multiply, [turns, splat_double(_HALF_PI_LOW), exact]), x.type)
    quarter = b.add(b.trunc(b.bitcast(shifted, long), _splat_int(0, lanes).type), _splat_int(ahead, lanes))
    square = b.fmul(r, r)
    odd = b.call(fma(module, lanes), [b.fmul(_polynomial(b, module, square, _SINE, lanes), square), r, r])
    even = b.fmul(_polynomial(b, module, square, _COSINE, lanes), b.fmul(square, square))
    even = b.fadd(b.fsub(even, b.fmul(square, splat_float(0.5, lanes))), splat_float(1.0, lanes))

    def has(bit: int) -> ir.Value:
        return b.icmp_signed("!=", b.and_(quarter, _splat_int(bit, lanes)), _splat_int(0, lanes))

    found = b.select(has(1), even, odd)
    found = b.select(has(2), b.fneg(found), found)
    near = b.fcmp_ordered("<", _abs(b, module, x, lanes), splat_float(2.0**51, lanes))
    return b.select(near, found, splat_float(math.nan, lanes))


ACTIVATIONS: Mapping[str, Emit] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "hardswish": _hardswish,
    "hardsigmoid": _hardsigmoid,
    **{f"leaky_relu_{slope}": partial(_leaky_relu, slope=slope) for slope in (0.001, 0.01, 0.1, 0.2)},
}
"""Name -> emitter; activations that are clamps are not here, see `clamp_bounds`."""

# Polynomials p for erf(x / sqrt(2)) up to 3.94 and tanh(sqrt(2 / pi) * (x + 0.044715 x^3)) up to 3.85: of those that
# are 1 at their end, computed in float32, the ones whose largest error of x / 2 * (1 + p(x)) is least (reweighted least
# squares).
_GELU = (4.9683297e-08, -3.4021646e-06, 9.986158e-05, -0.0016650759, 0.017717974, -0.12951179, 0.7960171)
_GELU_TANH = (5.9886936e-08, -3.911871e-06, 0.00010976707, -0.0017582458, 0.018138304, -0.13023081, 0.7961263)

BYTE_ACTIVATIONS: Mapping[str, Emit] = {
    **ACTIVATIONS,
    "gelu": partial(_gated, cut=3.94, odd=_GELU),
    "gelu_tanh": partial(_gated, cut=3.85, odd=_GELU_TANH),
}
"""The same for results that become bytes, faster: off by at most 0.0002, a twentieth of a step of a grid 1 wide.

Beyond 4 they are exactly x or 0, so that the error does not grow with x.
"""

FUNCTIONS: Mapping[str, Emit] = {
    **ACTIVATIONS,
    "bf16": lambda b, module, x, lanes: bf16.rounded(b, x, lanes),
    "exp": exp,
    "sqrt": _sqrt,
    "rsqrt": lambda b, module, x, lanes: b.fdiv(splat_float(1.0, lanes), _sqrt(b, module, x, lanes)),
    "reciprocal": lambda b, module, x, lanes: b.fdiv(splat_float(1.0, lanes), x),
    "square": lambda b, module, x, lanes: b.fmul(x, x),
    "cube": lambda b, module, x, lanes: b.fmul(b.fmul(x, x), x),
    "neg": lambda b, module, x, lanes: b.fneg(x),
    "abs": _abs,
    "sign": _sign,
    "round": _round,
    "floor": _floor,
    "ceil": _ceil,
    "trunc": _trunc,
    "erf": _erf,
    "log": log,
    "sin": partial(_wave, ahead=0),
    "cos": partial(_wave, ahead=1),
}
"""Name -> emitter of what `kernels.strided` computes of one value: activations, and what no layer ends in."""

_CLAMPS: Mapping[str, tuple[float, float]] = {
    "": (-math.inf, math.inf),
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
}


def clamp_bounds(name: str) -> tuple[float, float] | None:
    """The bounds of an activation that is a clamp, ``""`` for none at all; None for the others."""
    return _CLAMPS.get(name)


def clamped(activation: str | None) -> tuple[float, float, str]:
    """An activation as bounds to clamp to, infinite where it is no clamp, and its row of ACTIVATIONS, else ``""``."""
    bounds = clamp_bounds(activation or "")
    return (-math.inf, math.inf, activation or "") if bounds is None else (*bounds, "")
