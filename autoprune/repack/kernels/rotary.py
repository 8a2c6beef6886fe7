"""Rotary position embedding, a native op; operands are read through strides."""

from __future__ import annotations

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    address,
    at,
    fma,
    load_vector,
    loop,
    op_function,
    smaller,
    store_vector,
)
from autoprune.repack.kernels.rows import each

AXES = 3  # before the features


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes and strides in floats; features are neighbours."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET
    X_STRIDE_0 = NUMBER  # by axis
    X_STRIDE_1 = NUMBER
    X_STRIDE_2 = NUMBER
    COS_SLOT = SLOT
    COS_OFFSET = OFFSET
    COS_STRIDE_0 = NUMBER
    COS_STRIDE_1 = NUMBER
    COS_STRIDE_2 = NUMBER
    SIN_SLOT = SLOT
    SIN_OFFSET = OFFSET
    SIN_STRIDE_0 = NUMBER
    SIN_STRIDE_1 = NUMBER
    SIN_STRIDE_2 = NUMBER
    Y_SLOT = SLOT  # row after row
    Y_OFFSET = OFFSET
    SIZE_0 = NUMBER
    SIZE_1 = NUMBER
    SIZE_2 = NUMBER
    HALF = NUMBER  # of a row's features
    BLOCK = NUMBER  # rows an item


@kernel
def rotary(target: Target) -> ir.Module:
    """Y = (a cos - b sin, b cos + a sin) of rows (a, b); an item is some rows."""
    module, lanes = ir.Module(), target.lanes
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    names, half = ("X", "COS", "SIN"), get[Field.HALF]
    bases = [address(b, slots, get[Field[f"{name}_SLOT"]], get[Field[f"{name}_OFFSET"]]) for name in (*names, "Y")]
    sizes = [get[Field[f"SIZE_{axis}"]] for axis in range(AXES)]
    rows, first = b.mul(b.mul(sizes[0], sizes[1]), sizes[2]), b.mul(item, get[Field.BLOCK])
    with loop(b, first, smaller(b, b.add(first, get[Field.BLOCK]), rows)) as row:
        rest, lines = row, bases[:3]
        for axis in reversed(range(AXES)):
            number, rest = b.srem(rest, sizes[axis]), b.sdiv(rest, sizes[axis])
            steps = [get[Field[f"{name}_STRIDE_{axis}"]] for name in names]
            lines = [at(b, line, b.mul(number, step)) for line, step in zip(lines, steps, strict=True)]
        out = at(b, bases[3], b.mul(row, b.add(half, half)))

        def turn(position: ir.Value, wide: int, lines: list[ir.Value] = lines, out: ir.Value = out) -> None:
            behind = b.add(position, half)
            (x, other), (cos, cos_), (sin, sin_) = (
                [load_vector(b, at(b, line, place), wide) for place in (position, behind)] for line in lines
            )
            lower = b.call(fma(module, wide), [x, cos, b.fneg(b.fmul(other, sin))])
            upper = b.call(fma(module, wide), [other, cos_, b.fmul(x, sin_)])
            store_vector(b, lower, at(b, out, position), wide)
            store_vector(b, upper, at(b, out, behind), wide)

        each(b, half, lanes, turn)
    b.ret_void()
    return module
