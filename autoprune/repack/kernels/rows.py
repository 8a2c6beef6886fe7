"""Native ops on rows of features (tokens): layer norm and RMS norm."""

from __future__ import annotations

from collections.abc import Callable

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import FLOAT, FLOAT32_ARRAY, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    F32,
    FLOATS,
    address,
    at,
    const,
    float_field,
    fma,
    load_vector,
    loop,
    op_function,
    pointer_field,
    smaller,
    spans,
    splat,
    store_vector,
)
from autoprune.repack.kernels.sums import summed


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes in floats."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    ROWS = NUMBER
    FEATURES = NUMBER
    BLOCK = NUMBER  # rows an item
    WEIGHT = FLOAT32_ARRAY  # (features,)
    BIAS = FLOAT32_ARRAY.of("bias")
    EPSILON = FLOAT
    SHARE = FLOAT  # one over the number of features


def each(
    b: ir.IRBuilder, count: ir.Value, lanes: int, body: Callable[[ir.Value, int], None], together: int = 1
) -> None:
    """``body(position, lanes)`` over `count` floats: `together` vectors as one, whole vectors, then single floats."""
    spans(b, const(0), count, (together * lanes, lanes, 1), body)


@kernel
def layer_norm(target: Target) -> ir.Module:
    """Y = (x - mean) / sqrt(variance + epsilon) * weight + bias, a row at a time; an item is some rows."""
    return _norm(target, centred=True)


@kernel
def rms_norm(target: Target) -> ir.Module:
    """Y = x / sqrt(mean square + epsilon) * weight, a row at a time; an item is some rows."""
    return _norm(target, centred=False)


def _norm(target: Target, centred: bool) -> ir.Module:
    """`centred`: the mean is subtracted first, and a bias is added."""
    module, lanes = ir.Module(), target.lanes
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    first = b.mul(item, get[Field.BLOCK])
    x0 = address(b, slots, get[Field.X_SLOT], get[Field.X_OFFSET])
    y0 = address(b, slots, get[Field.Y_SLOT], get[Field.Y_OFFSET])
    weight, bias = (pointer_field(b, get[field], FLOATS) for field in (Field.WEIGHT, Field.BIAS))
    features, share = get[Field.FEATURES], float_field(b, get[Field.SHARE])
    root = ir.Function(module, ir.FunctionType(F32, [F32]), "llvm.sqrt.f32")
    with loop(b, first, smaller(b, b.add(first, get[Field.BLOCK]), get[Field.ROWS])) as row:
        x, y = (at(b, base, b.mul(row, features)) for base in (x0, y0))

        def add(total: ir.Value, position: ir.Value, wide: int, x: ir.Value = x) -> ir.Value:
            return b.fadd(total, load_vector(b, at(b, x, position), wide))

        mean = b.fmul(summed(b, features, lanes, add), share) if centred else None

        def away(position: ir.Value, wide: int, x: ir.Value = x, mean: ir.Value | None = mean) -> ir.Value:
            value = load_vector(b, at(b, x, position), wide)
            return value if mean is None else b.fsub(value, splat(b, mean, wide))

        def square(total: ir.Value, position: ir.Value, wide: int) -> ir.Value:
            value = away(position, wide)
            return b.call(fma(module, wide), [value, value, total])

        variance = b.fmul(summed(b, features, lanes, square), share)
        scale = b.fdiv(ir.Constant(F32, 1.0), b.call(root, [b.fadd(variance, float_field(b, get[Field.EPSILON]))]))

        def write(position: ir.Value, wide: int, y: ir.Value = y, scale: ir.Value = scale) -> None:
            value = b.fmul(away(position, wide), splat(b, scale, wide))
            gain = load_vector(b, at(b, weight, position), wide)
            if centred:
                shift = load_vector(b, at(b, bias, position), wide)
                value = b.call(fma(module, wide), [value, gain, shift])
            else:
                value = b.fmul(value, gain)
            store_vector(b, value, at(b, y, position), wide)

        each(b, features, lanes, write)
    b.ret_void()
    return module
