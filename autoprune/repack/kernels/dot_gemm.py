"""Group-wise sparse convolution of bytes as an offset-GEMM, a native op: `offset_gemm` with four channels a lane.

The input is an interleaved map: an entry is a 32-bit lane, which holds the unsigned bytes of four neighbouring channels
at one position. All distances are in lanes. The weights are signed bytes. The output is an interleaved map or one of
floats; what lies around it is written as well.

With s the exact sum of a row's products at a position, in float32::

    v = fma(s, FACTOR, BIAS)                    # real units before an activation that is no clamp, else output steps
    v = fma(residual, RESIDUAL_SCALE, v)        # its bytes, or floats
    v = fma(activation(v), INVERSE, ZERO)       # where there is such an activation
    y = min(max(v, LOW), HIGH)                  # for bytes, rounded half to even; NaN becomes LOW

The zero points of input and residual are part of BIAS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import llvmlite.ir as ir

from autoprune.errors import AutopruneError
from autoprune.repack.kernels import dot_amx
from autoprune.repack.kernels.compiler import Dot, Target, kernel
from autoprune.repack.kernels.dot_tile import Ending, Form, Scalars, entries, lines_of, tile
from autoprune.repack.kernels.fields import FLOAT, FLOAT32_ARRAY, INT32_ARRAY, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    FLOATS,
    I32,
    INTS,
    address,
    at,
    const,
    float_field,
    loop,
    module_of_bytes,
    op_function,
    pointer_field,
    smaller,
)
from autoprune.repack.kernels.register_tile import clear_borders, cover, place_of, tiles
from autoprune.repack.weights.quads import QUAD


class Field(Fields):
    """Entries of the int64 array that describes one op; distances in lanes, which are as long as floats."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET  # of the first image's position (0, 0) in lane 0
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    RESIDUAL_SLOT = SLOT.of("residual")
    RESIDUAL_OFFSET = OFFSET.of("residual")
    RESIDUAL_IMAGE = NUMBER.of("residual")
    RESIDUAL_CHANNEL = INT32_ARRAY.of("residual")  # as Y_CHANNEL, by the residual's form
    RESIDUAL_SCALE = FLOAT.of("residual")
    X_IMAGE = NUMBER  # from an image to the next
    Y_IMAGE = NUMBER
    MASK = INT32_ARRAY  # per position: -1 inside the map, 0 on its border
    GROUP_POINTER = INT32_ARRAY  # per group: its first whole cell
    OFFSETS = INT32_ARRAY  # per whole cell: from an output position to the lane it reads
    VALUES = INT32_ARRAY  # (whole cells, rows): four weights each
    MIXED_POINTER = INT32_ARRAY.of("mixed")  # per group: its first mixed cell
    MIXED_OFFSETS = INT32_ARRAY.of("mixed")  # (mixed cells, 4): from an output position to each lane it reads
    MIXED_BYTES = INT32_ARRAY.of("mixed")  # (mixed cells, 4): which byte of it, 0 to 3
    MIXED_VALUES = INT32_ARRAY.of("mixed")  # (mixed cells, rows)
    FACTOR = FLOAT32_ARRAY  # per row
    BIAS = FLOAT32_ARRAY
    Y_CHANNEL = INT32_ARRAY  # per row, or for bytes per four rows: from Y to their channel
    LOW = FLOAT  # results are clamped
    HIGH = FLOAT
    INVERSE = FLOAT.of("activation")
    ZERO = FLOAT.of("activation")
    BORDER_VALUE = NUMBER  # the lane around the output: its zero point in each byte; 0 for floats
    GROUPS = NUMBER
    POSITIONS = NUMBER
    CHUNK = NUMBER  # groups an item
    BLOCK = NUMBER  # positions an item
    CHUNKS = NUMBER
    BLOCKS = NUMBER
    BATCH = NUMBER
    CHUNK_STRIDE = NUMBER  # items from a chunk to the next
    BLOCK_STRIDE = NUMBER
    IMAGE_STRIDE = NUMBER
    BORDER = NUMBER  # lanes of border behind a channel's positions
    BORDER_FIRST = NUMBER  # and before the first channel
    START = INT32_ARRAY.of("signed")  # per row: 128 times the sum of its weights; for a target that is `signed`


@kernel
def dot_gemm(
    rows: int, target: Target, output: Form, activation: str = "", residual: Form | Literal[""] = "",
    mixed: bool = False, amx: bool = False,
) -> ir.Module:  # fmt: skip
    """The op for groups of `rows` filters; compiled once a process.

    Args:
        rows: filters in a group; a multiple of 4 where output or residual are bytes.
        target: what to compile for.
        output: bytes, or floats.
        activation: a row of ACTIVATIONS that is no clamp.
        residual: bytes, floats, or none.
        mixed: whether there are mixed cells; the input is read from three bytes before its first lane on then.
        amx: whether by tile registers; all cells, and their weights, are given `dot_amx.in_blocks` then.

    Raises:
        AutopruneError: rows that do not fill lanes, or a target without tile registers.
    """
    return dot_gemm_module(rows, target, Ending(output, activation, residual), mixed, amx)


def dot_gemm_module(rows: int, target: Target, ending: Ending, mixed: bool = False, amx: bool = False) -> ir.Module:
    """The op, not yet compiled."""
    if not ending.fits(rows):
        raise AutopruneError(f"bytes need groups of a multiple of {QUAD} filters, not of {rows}.")
    if amx and not target.amx:
        raise AutopruneError(f"the target {target.cpu!r} has no tile registers, or may not use them.")
    module = module_of_bytes(target.fused)
    if amx:
        heights = dict.fromkeys(range(1, dot_amx.WIDEST + 1), rows)
        built = {count: dot_amx.tile(module, rows, count, target, ending, mixed) for count in heights}
    else:
        heights = dot_tiles(rows, target, mixed)
        built = {count: tile(module, each, count, rows, target, ending, mixed) for count, each in heights.items()}
    _op(module, rows, built, heights, target, ending, mixed, amx)
    return module


_PARTS: Mapping[Dot, int] = {"vnni": 1, "usdot": 1, "sdot": 1, "madd": 2, "halves": 5, "plain": 2}
"""Registers that each input takes, and each weight: where no instruction multiplies bytes, they are taken apart."""


def dot_tiles(rows: int, target: Target, mixed: bool) -> dict[int, int]:
    """Vectors of positions -> rows of the register tile that computes them; whole lanes of rows, where `rows` are.

    Mixed cells are put together once a tile: it has the most rows that there is room for.
    """
    heights = tiles(rows, target, _PARTS[target.dot])
    least = heights[1] if mixed else min(rows, QUAD)
    return {count: height for count, height in heights.items() if height % least == 0}


def _op(
    module: ir.Module, rows: int, built: dict[int, ir.Function], heights: dict[int, int], target: Target,
    ending: Ending, mixed: bool, amx: bool,
) -> None:  # fmt: skip
    b, fields, slots, item, _ = op_function(module)
    if amx:
        dot_amx.configured(b, rows)
    get = Field.load(b, fields)
    chunk, block, image, start, length = place_of(b, item, Field, get)

    def base(slot: Field, offset: Field, stride: Field) -> ir.Value:
        map_ = b.bitcast(address(b, slots, get[slot], get[offset]), INTS)
        return at(b, map_, b.add(b.mul(image, get[stride]), start))

    def array(field: Field, first: ir.Value, kind: ir.Type = INTS) -> ir.Value:
        return at(b, pointer_field(b, get[field], kind), first)

    x = base(Field.X_SLOT, Field.X_OFFSET, Field.X_IMAGE)
    y = base(Field.Y_SLOT, Field.Y_OFFSET, Field.Y_IMAGE)
    residual = base(Field.RESIDUAL_SLOT, Field.RESIDUAL_OFFSET, Field.RESIDUAL_IMAGE)
    mask, border = array(Field.MASK, start), b.trunc(get[Field.BORDER_VALUE], I32)
    scalars = [float_field(b, get[Field[name.upper()]]) for name in Scalars._fields]
    first = b.mul(chunk, get[Field.CHUNK])
    last = smaller(b, b.add(first, get[Field.CHUNK]), get[Field.GROUPS])
    lines = const(lines_of(rows, ending.output))
    channels = array(Field.Y_CHANNEL, const(0))
    clear_borders(b, item, block, y, channels, (b.mul(first, lines), b.mul(last, lines)), Field, get, border)
    with loop(b, first, last) as group:
        begin, kept = entries(b, array(Field.GROUP_POINTER, const(0)), group)
        mixed_begin, mixed_kept = entries(b, array(Field.MIXED_POINTER, const(0)), group) if mixed else (const(0),) * 2
        four = b.mul(mixed_begin, const(QUAD))

        def compute(count: int, position: ir.Value) -> None:
            """`count` vectors from `position` on."""
            for row in reversed(range(0, rows, heights[count])):
                weights, mixed_weights = (
                    array(field, b.add(b.mul(cell, const(rows)), const(row)))
                    for field, cell in ((Field.VALUES, begin), (Field.MIXED_VALUES, mixed_begin))
                )
                own = b.add(b.mul(group, const(rows)), const(row))
                y_line, residual_line = (
                    b.add(b.mul(group, const(lines_of(rows, form))), const(lines_of(row, form)))
                    for form in (ending.output, ending.residual)
                )
                b.call(built[count], [
                    *(at(b, each, position) for each in (x, y, residual, mask)),
                    array(Field.OFFSETS, begin), kept, weights, array(Field.MIXED_OFFSETS, four),
                    array(Field.MIXED_BYTES, four), mixed_kept, mixed_weights, array(Field.FACTOR, own, FLOATS),
                    array(Field.BIAS, own, FLOATS), at(b, channels, y_line),
                    array(Field.RESIDUAL_CHANNEL, residual_line), border, *scalars,
                    *([array(Field.START, own)] if target.signed else []),
                ])  # fmt: skip

        cover(b, length, target.lanes, max(built), compute)
    if amx:
        dot_amx.released(b)
    b.ret_void()
