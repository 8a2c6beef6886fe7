"""What slides one window over an interleaved map, a native op: maximum and average pooling of bytes.

Rows of a window are combined first, then its columns, which need no further loads. Averages are made of exact sums.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import llvmlite.ir as ir

from autoprune.repack.kernels.bytes_lanes import (
    bordered,
    bounded,
    int_splat,
    ints,
    load_lanes,
    packed,
    spread,
    store_lanes,
    unpacked,
)
from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import FLOAT, FLOAT32_ARRAY, INT32_ARRAY, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    FLOATS,
    I8,
    I32,
    I64,
    INTS,
    LONGS,
    address,
    at,
    clear_border,
    const,
    float_field,
    fold,
    inner_function,
    load_vector,
    long_at,
    loop,
    op_function,
    picked,
    pointer_field,
    smaller,
    splat,
    vector,
)
from autoprune.repack.kernels.register_tile import cover
from autoprune.repack.weights.quads import QUAD

MOST_HALVES = 257  # bytes whose sum fits 16 bits


class Mode(Enum):
    """What becomes of the bytes in a window; sums are kept in 16 bits where they fit."""

    MAX = "max"
    AVERAGE = "average"
    LARGE_AVERAGE = "average of more than MOST_HALVES"


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes in lanes, which are as long as floats."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET  # of position (0, 0) in lane-channel 0
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    X_IMAGE = NUMBER
    Y_IMAGE = NUMBER
    X_QUAD = NUMBER  # from a lane-channel to the next
    Y_QUAD = NUMBER  # likewise; where y holds floats, from a channel to the fourth after it
    X_ROW = NUMBER  # from the input of an output row to that of the next
    Y_ROW = NUMBER
    ROWS = NUMBER  # of the output; a map of stride 1 is one long row
    COLUMNS = NUMBER
    QUADS = NUMBER
    CHUNK = NUMBER  # lane-channels an item
    CHUNKS = NUMBER
    MASK = INT32_ARRAY  # per position: -1 inside the map, 0 on its border
    BORDER_VALUE = NUMBER  # what a lane of y's border holds
    POSITIONS = NUMBER  # of a channel of the output, those on the border between rows counted
    BORDER = NUMBER  # lanes of border behind them, which are filled
    BORDER_FIRST = NUMBER  # and before the first channel
    TAPS = NUMBER  # rows of a pooling's window; whole fours of a depthwise kernel's taps
    OFFSETS = INT32_ARRAY  # per tap, or a row: lanes from an output's input to where it is read, or begins
    LOW = FLOAT.of("rounded")  # results are clamped
    HIGH = FLOAT.of("rounded")
    SUM_ZERO = NUMBER.of("average")  # what all the zero points of a window sum to
    SCALE = FLOAT32_ARRAY.of("average")  # per position of the output: of a window's sum
    ZERO = NUMBER.of("average")  # the output's zero point
    CHANNELS = NUMBER.of("depthwise")
    Y_CHANNEL = NUMBER.of("depthwise")  # where y holds floats
    WEIGHTS = INT32_ARRAY.of("depthwise")  # (QUADS, fours of taps, 4 channels), four signed bytes each
    FACTOR = FLOAT32_ARRAY.of("depthwise")  # (QUADS, 4): of a sum
    BIAS = FLOAT32_ARRAY.of("depthwise")  # (QUADS, 4): added to the product
    INVERSE = FLOAT.of("activation")  # of what an activation gives
    OUTPUT_ZERO = FLOAT.of("activation")  # added to that product
    START = INT32_ARRAY.of("signed")  # (QUADS, 4): what sums start from, see `dot_products`


Runs = Callable[[int], ir.Function]
"""From how many vectors to the function ``run(x, y, position, quad, fields)`` that computes so many.

`x` points to the first output's input, `y` to the first output, whose flat position in its lane-channel is `position`.
"""

RUN_ARGUMENTS = [FLOATS, FLOATS, I64, I64, LONGS]
Borders = Callable[[ir.IRBuilder, dict[Field, ir.Value], ir.Value, ir.Value, ir.Value], None]


@kernel
def pool_bytes(mode: Mode, stride: int, columns: tuple[int, ...], target: Target) -> ir.Module:
    """The op for windows `stride` columns apart; an item is some lane-channels of an image.

    Args:
        mode: what becomes of what a window holds.
        stride: from an output's input to the next output's, in columns.
        columns: of the window, counted from its first.
        target: what to compile for.
    """
    module = ir.Module()
    widest = (6 if stride == 1 else 4) if mode is Mode.MAX else 2
    run = _largest if mode is Mode.MAX else _average

    def build(vectors: int) -> ir.Function:
        return run(module, mode, stride, columns, vectors, target.lanes)

    return sliding_op(module, stride, widest, build, fill_lanes, target)


def sliding_op(module: ir.Module, stride: int, widest: int, runs: Runs, borders: Borders, target: Target) -> ir.Module:
    """The op that calls one of `runs`, of at most `widest` vectors, for all outputs, and writes their borders."""
    built = {count: runs(count) for count in range(1, widest + 1)}
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    chunk, image = b.srem(item, get[Field.CHUNKS]), b.sdiv(item, get[Field.CHUNKS])
    x = at(b, address(b, slots, get[Field.X_SLOT], get[Field.X_OFFSET]), b.mul(image, get[Field.X_IMAGE]))
    y = at(b, address(b, slots, get[Field.Y_SLOT], get[Field.Y_OFFSET]), b.mul(image, get[Field.Y_IMAGE]))
    start = b.mul(chunk, get[Field.CHUNK])
    with loop(b, start, smaller(b, b.add(start, get[Field.CHUNK]), get[Field.QUADS])) as quad:
        plane, out = at(b, x, b.mul(quad, get[Field.X_QUAD])), at(b, y, b.mul(quad, get[Field.Y_QUAD]))
        with loop(b, const(0), get[Field.ROWS]) as row:
            line, position = at(b, plane, b.mul(row, get[Field.X_ROW])), b.mul(row, get[Field.Y_ROW])

            def compute(count: int, column: ir.Value, line: ir.Value = line, position: ir.Value = position) -> None:
                here = b.add(position, column)
                b.call(built[count], [at(b, line, b.mul(column, const(stride))), at(b, out, here), here, quad, fields])

            cover(b, get[Field.COLUMNS], target.lanes, widest, compute)
        borders(b, get, out, quad, image)
    b.ret_void()
    return module


def fill_lanes(
    b: ir.IRBuilder, get: dict[Field, ir.Value], out: ir.Value, quad: ir.Value, image: ir.Value
) -> None:  # fmt: skip
    """The border of a lane-channel."""
    border = (get[Field.POSITIONS], get[Field.BORDER], get[Field.BORDER_FIRST])
    clear_border(b, out, b.or_(image, quad), border, float_field(b, get[Field.BORDER_VALUE]))


def every(b: ir.IRBuilder, pointer: ir.Value, stride: int, lanes: int) -> ir.Value:
    """`lanes` lanes, `stride` apart."""
    given = [load_lanes(b, at(b, pointer, const(v * lanes)), lanes) for v in range(stride)]
    return given[0] if stride == 1 else dealt(b, given, 0, stride, lanes)


def dealt(b: ir.IRBuilder, vectors: list[ir.Value], first: int, stride: int, lanes: int) -> ir.Value:
    """Of the lanes in `vectors`, one after the other: `lanes` of them from `first` on, `stride` apart."""
    floats = [b.bitcast(each, vector(lanes)) for each in vectors]
    return b.bitcast(picked(b, floats, first, stride, lanes), ints(lanes))


def _largest(
    module: ir.Module, mode: Mode, stride: int, columns: tuple[int, ...], vectors: int, lanes: int
) -> ir.Function:  # fmt: skip
    function, b, get, source = _begin(module, mode, vectors)
    count = -(-(vectors * lanes * stride + columns[-1]) // lanes)

    def add_row(row: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
        line = source(row)
        given = [load_lanes(b, at(b, line, const(v * lanes)), lanes) for v in range(count)]
        return [larger_bytes(b, each, total, lanes) for each, total in zip(given, held, strict=True)]

    rows = fold(b, const(0), get[Field.TAPS], [int_splat(0, lanes)] * count, add_row)
    for v in range(vectors):
        result = dealt(b, rows, v * lanes * stride, stride, lanes)
        for column in columns[1:]:
            result = larger_bytes(b, result, dealt(b, rows, v * lanes * stride + column, stride, lanes), lanes)
        finish(b, get, function, result, v, lanes)
    b.ret_void()
    return function


def larger_bytes(b: ir.IRBuilder, one: ir.Value, other: ir.Value, lanes: int) -> ir.Value:
    """The larger of each two bytes in lanes."""
    one, other = (b.bitcast(each, ir.VectorType(I8, QUAD * lanes)) for each in (one, other))
    return b.bitcast(b.select(b.icmp_unsigned(">", one, other), one, other), ints(lanes))


def _average(
    module: ir.Module, mode: Mode, stride: int, columns: tuple[int, ...], vectors: int, lanes: int
) -> ir.Function:  # fmt: skip
    function, b, get, source = _begin(module, mode, vectors)
    count = -(-(vectors * lanes * stride + columns[-1]) // lanes)
    halves, low = mode is Mode.AVERAGE, int_splat(0x00FF00FF, lanes)
    parts = 2 if halves else QUAD

    def split(value: ir.Value) -> list[ir.Value]:
        """Its bytes as 32 bits each, or two of them in one: 0 and 2, 1 and 3."""
        if not halves:
            return unpacked(b, value, lanes)
        return [b.and_(value, low), b.and_(b.lshr(value, int_splat(8, lanes)), low)]

    def add_row(row: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
        line = source(row)
        given = [part for v in range(count) for part in split(load_lanes(b, at(b, line, const(v * lanes)), lanes))]
        return [b.add(total, part) for total, part in zip(held, given, strict=True)]

    rows = fold(b, const(0), get[Field.TAPS], [int_splat(0, lanes)] * (parts * count), add_row)
    sum_zero = splat(b, b.trunc(get[Field.SUM_ZERO], I32), lanes)
    bounds = [splat(b, float_field(b, get[each]), lanes) for each in (Field.LOW, Field.HIGH)]
    zeros = splat(b, spread(b, get[Field.ZERO]), lanes)
    for v in range(vectors):
        sums = []
        for part in range(parts):
            total = dealt(b, rows[part::parts], v * lanes * stride, stride, lanes)
            for column in columns[1:]:
                total = b.add(total, dealt(b, rows[part::parts], v * lanes * stride + column, stride, lanes))
            sums.append(total)
        if halves:
            mask, upper = int_splat(0xFFFF, lanes), int_splat(16, lanes)
            sums = [*(b.and_(total, mask) for total in sums), *(b.lshr(total, upper) for total in sums)]
        scale = at(b, pointer_field(b, get[Field.SCALE], FLOATS), b.add(function.args[2], const(v * lanes)))
        share = load_vector(b, scale, lanes)
        real = [b.fmul(b.sitofp(b.sub(total, sum_zero), vector(lanes)), share) for total in sums]
        result = packed(b, [bounded(b, each, *bounds) for each in real], zeros, lanes)
        finish(b, get, function, result, v, lanes)
    b.ret_void()
    return function


def _begin(
    module: ir.Module, mode: Mode, vectors: int
) -> tuple[ir.Function, ir.IRBuilder, dict[Field, ir.Value], Callable[[ir.Value], ir.Value]]:
    """A run: function, builder, fields, and where a row of the window begins."""
    function = inner_function(module, f"{mode.name.lower()}_{vectors}", RUN_ARGUMENTS)
    b = ir.IRBuilder(function.append_basic_block("entry"))
    get = Field.load(b, function.args[4])
    offsets = pointer_field(b, get[Field.OFFSETS], INTS)
    return function, b, get, lambda row: at(b, function.args[0], long_at(b, offsets, row))


def finish(
    b: ir.IRBuilder, get: dict[Field, ir.Value], function: ir.Function, value: ir.Value, v: int, lanes: int,
    kept: ir.Value | None = None,
) -> None:  # fmt: skip
    """Stores vector `v` of a run's lanes: the border's value where no position is, or no bits of `kept` are set."""
    _, y, position, *_ = function.args
    mask = at(b, pointer_field(b, get[Field.MASK], INTS), b.add(position, const(v * lanes)))
    inside = load_lanes(b, mask, lanes)
    inside = inside if kept is None else b.and_(inside, kept)
    border = splat(b, b.trunc(get[Field.BORDER_VALUE], I32), lanes)
    store_lanes(b, bordered(b, value, inside, border), at(b, y, const(v * lanes)), lanes)
