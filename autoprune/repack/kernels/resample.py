"""Resampling of a feature map, a native op: each row and each column of the output comes from some of the input's.

It is their sum or the largest of them. So resize and adaptive pooling are computed, and a border of what lies inside is
added. The rows of an output row are combined first, then its columns, which are picked by number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import FLOAT32_ARRAY, INT32_ARRAY, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    FLOATS,
    INTS,
    address,
    at,
    clear_border,
    const,
    fma,
    fold,
    gathered,
    load_vector,
    long_at,
    loop,
    masked,
    op_function,
    pointer_field,
    splat,
    store_vector,
)
from autoprune.repack.kernels.math import maximum, splat_float


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes in floats."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET  # of position (0, 0) in channel 0
    X_IMAGE = NUMBER
    X_CHANNEL = NUMBER
    X_ROW = NUMBER
    X_WIDTH = NUMBER
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    Y_IMAGE = NUMBER
    Y_CHANNEL = NUMBER
    Y_ROW = NUMBER
    CHANNELS = NUMBER
    ROWS = NUMBER  # of the output
    COLUMNS = NUMBER  # of the output and its border, whole vectors
    ROW_TAPS = NUMBER  # rows that become one
    ROW_INDEX = INT32_ARRAY  # (rows, taps)
    ROW_WEIGHT = FLOAT32_ARRAY  # of a sum alone
    COLUMN_TAPS = NUMBER
    COLUMN_INDEX = INT32_ARRAY  # (taps, columns)
    COLUMN_WEIGHT = FLOAT32_ARRAY  # of a sum alone
    MASK = INT32_ARRAY  # per column: -1 inside the map, 0 on its border
    SCRATCH_SLOT = SLOT
    SCRATCH_OFFSET = OFFSET
    SCRATCH = NUMBER  # a row of the input, from a thread's to the next
    POSITIONS = NUMBER  # of a channel of the output
    BORDER = NUMBER  # floats of border behind them, which are cleared
    BORDER_FIRST = NUMBER  # and before the first channel


@kernel
def resample(target: Target, largest: bool) -> ir.Module:
    """The op; an item is a channel of an image.

    Args:
        target: what to compile for.
        largest: whether the largest is taken; else a weighted sum.
    """
    module, lanes = ir.Module(), target.lanes
    b, fields, slots, item, thread = op_function(module)
    get = Field.load(b, fields)
    channel, image = b.srem(item, get[Field.CHANNELS]), b.sdiv(item, get[Field.CHANNELS])
    x, y = (
        at(b, address(b, slots, get[Field[f"{name}_SLOT"]], get[Field[f"{name}_OFFSET"]]),
           b.add(b.mul(image, get[Field[f"{name}_IMAGE"]]), b.mul(channel, get[Field[f"{name}_CHANNEL"]])))
        for name in "XY"
    )  # fmt: skip
    line = address(b, slots, get[Field.SCRATCH_SLOT], get[Field.SCRATCH_OFFSET])
    line = at(b, line, b.mul(thread, get[Field.SCRATCH]))
    row_index, column_index, mask = (
        pointer_field(b, get[field], INTS) for field in (Field.ROW_INDEX, Field.COLUMN_INDEX, Field.MASK)
    )
    row_weight, column_weight = (
        pointer_field(b, get[field], FLOATS) for field in (Field.ROW_WEIGHT, Field.COLUMN_WEIGHT)
    )
    columns, empty = get[Field.COLUMNS], splat_float(float("-inf") if largest else 0.0, lanes)

    def combined(x: ir.Value, weight: Callable[[], ir.Value], held: ir.Value) -> ir.Value:
        return maximum(b, x, held) if largest else b.call(fma(module, lanes), [x, weight(), held])

    with loop(b, const(0), get[Field.ROWS]) as row:
        first = b.mul(row, get[Field.ROW_TAPS])
        with loop(b, const(0), get[Field.X_WIDTH], lanes) as position:

            def add_row(
                tap: ir.Value, held: list[ir.Value], first: ir.Value = first, position: ir.Value = position
            ) -> list[ir.Value]:
                number = b.add(first, tap)
                source = at(b, x, b.add(b.mul(long_at(b, row_index, number), get[Field.X_ROW]), position))
                weight = partial(_weight, b, at(b, row_weight, number), lanes)
                return [combined(load_vector(b, source, lanes), weight, held[0])]

            (total,) = fold(b, const(0), get[Field.ROW_TAPS], [empty], add_row)
            store_vector(b, total, at(b, line, position), lanes)
        out = at(b, y, b.mul(row, get[Field.Y_ROW]))
        with loop(b, const(0), columns, lanes) as position:

            def add_column(tap: ir.Value, held: list[ir.Value], position: ir.Value = position) -> list[ir.Value]:
                number = b.add(b.mul(tap, columns), position)
                places = [at(b, line, long_at(b, column_index, b.add(number, const(lane)))) for lane in range(lanes)]
                weight = partial(load_vector, b, at(b, column_weight, number), lanes)
                return [combined(gathered(b, places), weight, held[0])]

            (total,) = fold(b, const(0), get[Field.COLUMN_TAPS], [empty], add_column)
            store_vector(b, masked(b, total, at(b, mask, position), lanes), at(b, out, position), lanes)
    clear_border(b, y, item, (get[Field.POSITIONS], get[Field.BORDER], get[Field.BORDER_FIRST]))
    b.ret_void()
    return module


def _weight(b: ir.IRBuilder, place: ir.Value, lanes: int) -> ir.Value:
    return splat(b, b.load(place), lanes)
