"""Rows of floats to rows of bytes on a grid and back, native ops: what Linears over a few tokens read."""

from __future__ import annotations

from typing import NamedTuple

import llvmlite.ir as ir

from autoprune.repack.kernels.bytes_lanes import bounded, ints, rounded
from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import FLOAT, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    FLOATS,
    I8,
    I32,
    address,
    at,
    float_field,
    load_vector,
    op_function,
    splat,
    store_vector,
    vector,
)
from autoprune.repack.kernels.rows import each
from autoprune.repack.weights.quads import QUAD


class Field(Fields):
    """Entries of the int64 array that describes one op; an item is a token."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET  # of the first token's first entry
    X_TOKEN = NUMBER  # from a token to the next: floats, or lanes of four bytes, as long
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    Y_TOKEN = NUMBER
    FEATURES = NUMBER
    ZERO = NUMBER  # point
    INVERSE = FLOAT.of("bytes")  # what floats are multiplied by
    LOW = FLOAT.of("bytes")  # the lowest and the highest step from zero
    HIGH = FLOAT.of("bytes")
    SCALE = FLOAT.of("floats")  # what steps are multiplied by


@kernel
def rows_to_bytes(target: Target) -> ir.Module:
    """Moves each token's floats onto a grid; what lies behind its last feature in the last lane is left alone."""
    module = ir.Module()
    b, get, x, y = _started(module)
    inverse, low, high = (float_field(b, get[field]) for field in (Field.INVERSE, Field.LOW, Field.HIGH))
    place, grid = b.bitcast(y, I8.as_pointer()), Onto(inverse, low, high, get[Field.ZERO])
    quantise_row(b, x, place, get[Field.FEATURES], grid, target.lanes)
    b.ret_void()
    return module


@kernel
def bytes_to_rows(target: Target) -> ir.Module:
    """The floats that each token's bytes stand for."""
    module = ir.Module()
    b, get, x, y = _started(module)
    source, scale, zero = b.bitcast(x, I8.as_pointer()), float_field(b, get[Field.SCALE]), b.trunc(get[Field.ZERO], I32)

    def some(position: ir.Value, wide: int) -> None:
        steps = b.sub(b.zext(load_vector(b, at(b, source, position), wide), ints(wide)), splat(b, zero, wide))
        value = b.fmul(b.sitofp(steps, vector(wide)), splat(b, scale, wide))
        store_vector(b, value, at(b, y, position), wide)

    each(b, get[Field.FEATURES], target.lanes, some, QUAD)
    b.ret_void()
    return module


def _started(module: ir.Module) -> tuple[ir.IRBuilder, dict[Field, ir.Value], ir.Value, ir.Value]:
    """The op's beginning: its fields, and where the item's token begins in x and in y, pointers to floats."""
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    x, y = (
        at(b, b.bitcast(address(b, slots, get[slot], get[offset]), FLOATS), b.mul(item, get[token]))
        for slot, offset, token in (
            (Field.X_SLOT, Field.X_OFFSET, Field.X_TOKEN), (Field.Y_SLOT, Field.Y_OFFSET, Field.Y_TOKEN),
        )
    )  # fmt: skip
    return b, get, x, y


class Onto(NamedTuple):
    """A grid: floats that values are multiplied by and then kept between, in steps, and the zero point, an i64."""

    inverse: ir.Value
    low: ir.Value
    high: ir.Value
    zero: ir.Value


def quantise_row(b: ir.IRBuilder, x: ir.Value, y: ir.Value, count: ir.Value, grid: Onto, lanes: int) -> None:
    """Rounds `count` floats half to even, to bytes at `y`; NaN becomes the lowest."""
    zero = b.trunc(grid.zero, I32)

    def some(position: ir.Value, wide: int) -> None:
        inverse, low, high = (splat(b, value, wide) for value in grid[:3])
        value = bounded(b, b.fmul(load_vector(b, at(b, x, position), wide), inverse), low, high)
        steps = rounded(b, value, wide)
        kind = ir.VectorType(I8, wide) if wide > 1 else I8
        made = b.trunc(b.add(steps, splat(b, zero, wide)), kind)
        b.store(made, b.bitcast(at(b, y, position), kind.as_pointer()), align=1)

    each(b, count, lanes, some, QUAD)
