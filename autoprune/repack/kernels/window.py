"""What slides one window over one channel, a native op: depthwise convolution, maximum and average pooling.

Reads a map with its border around it; a stride is served by loading whole runs and keeping every stride-th float.
Pooling combines the rows of a window first, then its columns, which need no further loads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial, reduce

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import FLOAT, FLOAT32_ARRAY, INT32_ARRAY, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    F32,
    FLOATS,
    I32,
    I64,
    INTS,
    address,
    at,
    clamp,
    clear_border,
    const,
    float_field,
    fma,
    fold,
    inner_function,
    load_vector,
    long_at,
    loop,
    masked,
    op_function,
    picked,
    pointer_field,
    smaller,
    splat,
    store_vector,
    vector,
)
from autoprune.repack.kernels.math import ACTIVATIONS, maximum
from autoprune.repack.kernels.register_tile import cover


class Mode(Enum):
    """What becomes of the values in a window."""

    MAX = "max"
    AVERAGE = "average"
    DEPTHWISE = "depthwise"


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes in floats."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET  # of position (0, 0) in channel 0
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    X_IMAGE = NUMBER
    Y_IMAGE = NUMBER
    X_CHANNEL = NUMBER
    Y_CHANNEL = NUMBER
    X_ROW = NUMBER  # from the input of an output row to that of the next
    Y_ROW = NUMBER
    ROWS = NUMBER  # of the output; a map of stride 1 is one long row
    COLUMNS = NUMBER
    CHANNELS = NUMBER
    CHUNK = NUMBER  # channels an item
    CHUNKS = NUMBER
    TAPS = NUMBER  # of a depthwise kernel; rows of a pooling's window
    OFFSETS = INT32_ARRAY  # per tap, or a row: floats from an output's input to where it is read, or begins
    WEIGHTS = FLOAT32_ARRAY.of("depthwise")  # (channels, taps); depthwise
    BIAS = FLOAT32_ARRAY.of("depthwise")  # (channels,); depthwise
    SCALE = FLOAT32_ARRAY  # (rows, columns) with the output's pitch; average
    MASK = INT32_ARRAY  # per position: -1 inside the map, 0 on its border
    LOW = FLOAT  # results are clamped
    HIGH = FLOAT
    POSITIONS = NUMBER  # of a channel of the output, those on the border between rows counted
    BORDER = NUMBER  # floats of border behind them, which are cleared
    BORDER_FIRST = NUMBER  # and before the first channel


@kernel
def window(mode: Mode, stride: int, target: Target, activation: str = "", columns: tuple[int, ...] = ()) -> ir.Module:
    """The op for windows `stride` columns apart; an item is some channels of an image.

    Args:
        mode: what becomes of what a window holds.
        stride: from an output's input to the next output's, in columns.
        target: what to compile for.
        activation: a row of ACTIVATIONS that is no clamp.
        columns: of a pooling's window, counted from its first.
    """
    module, lanes = ir.Module(), target.lanes
    widest = 6 if stride == 1 else 4  # vectors at once, so that none waits for the one before it
    built = {count: _run(module, mode, stride, count, lanes, activation, columns) for count in range(1, widest + 1)}
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    chunk, image = b.srem(item, get[Field.CHUNKS]), b.sdiv(item, get[Field.CHUNKS])
    x = at(b, address(b, slots, get[Field.X_SLOT], get[Field.X_OFFSET]), b.mul(image, get[Field.X_IMAGE]))
    y = at(b, address(b, slots, get[Field.Y_SLOT], get[Field.Y_OFFSET]), b.mul(image, get[Field.Y_IMAGE]))
    low, high = float_field(b, get[Field.LOW]), float_field(b, get[Field.HIGH])
    mask, scale = pointer_field(b, get[Field.MASK], INTS), pointer_field(b, get[Field.SCALE], FLOATS)
    offsets = pointer_field(b, get[Field.OFFSETS], INTS)
    start = b.mul(chunk, get[Field.CHUNK])
    with loop(b, start, smaller(b, b.add(start, get[Field.CHUNK]), get[Field.CHANNELS])) as channel:
        plane, out = at(b, x, b.mul(channel, get[Field.X_CHANNEL])), at(b, y, b.mul(channel, get[Field.Y_CHANNEL]))
        weights = at(b, pointer_field(b, get[Field.WEIGHTS], FLOATS), b.mul(channel, get[Field.TAPS]))
        bias = at(b, pointer_field(b, get[Field.BIAS], FLOATS), channel)
        with loop(b, const(0), get[Field.ROWS]) as row:
            line, position = at(b, plane, b.mul(row, get[Field.X_ROW])), b.mul(row, get[Field.Y_ROW])

            def compute(count: int, column: ir.Value, line: ir.Value = line, position: ir.Value = position) -> None:
                here = b.add(position, column)
                given = at(b, line, b.mul(column, const(stride)))
                b.call(
                    built[count],
                    [given, offsets, get[Field.TAPS], weights, bias, at(b, scale, here), at(b, mask, here),
                     at(b, out, here), low, high],
                )  # fmt: skip

            cover(b, get[Field.COLUMNS], lanes, widest, compute)
        border = (get[Field.POSITIONS], get[Field.BORDER], get[Field.BORDER_FIRST])
        clear_border(b, out, b.or_(image, channel), border)
    b.ret_void()
    return module


def _run(
    module: ir.Module, mode: Mode, stride: int, vectors: int, lanes: int, activation: str, columns: tuple[int, ...]
) -> ir.Function:
    """`vectors` x `lanes` neighbouring results of a row."""
    kinds = [FLOATS, INTS, I64, FLOATS, FLOATS, FLOATS, INTS, FLOATS, F32, F32]
    function = inner_function(module, f"run_{vectors}", kinds)
    x, offsets, taps, weights, bias, scale, mask, y, low, high = function.args
    b = ir.IRBuilder(function.append_basic_block("entry"))
    if mode is Mode.DEPTHWISE:

        def add_tap(tap: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            source = at(b, x, long_at(b, offsets, tap))
            weight = splat(b, b.load(at(b, weights, tap)), lanes)
            given = [_every(b, at(b, source, const(v * lanes * stride)), stride, lanes) for v in range(vectors)]
            return [b.call(fma(module, lanes), [each, weight, total]) for each, total in zip(given, sums, strict=True)]

        results = fold(b, const(0), taps, [splat(b, b.load(bias), lanes)] * vectors, add_tap)
    else:
        start, combine = _POOLING[mode]
        count = -(-(vectors * lanes * stride + columns[-1]) // lanes)

        def add_row(row: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
            source = at(b, x, long_at(b, offsets, row))
            given = [load_vector(b, at(b, source, const(v * lanes)), lanes) for v in range(count)]
            return [combine(b, each, total) for each, total in zip(given, held, strict=True)]

        rows = fold(b, const(0), taps, [ir.Constant(vector(lanes), [start] * lanes)] * count, add_row)
        results = []
        for v in range(vectors):
            parts = [picked(b, rows, v * lanes * stride + column, stride, lanes) for column in columns]
            results.append(reduce(partial(combine, b), parts))
    lows, highs = splat(b, low, lanes), splat(b, high, lanes)
    for v, value in enumerate(results):
        at_v = const(v * lanes)
        if mode is Mode.AVERAGE:
            value = b.fmul(value, load_vector(b, at(b, scale, at_v), lanes))
        value = clamp(b, value, lows, highs)
        if activation:
            value = ACTIVATIONS[activation](b, module, value, lanes)
        store_vector(b, masked(b, value, at(b, mask, at_v), lanes), at(b, y, at_v), lanes)
    b.ret_void()
    return function


_POOLING: Mapping[Mode, tuple[float, Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]]] = {
    Mode.MAX: (float("-inf"), maximum),
    Mode.AVERAGE: (0.0, lambda b, one, other: b.fadd(one, other)),
}
"""What a pooling begins with, and how two values become one."""


def _every(b: ir.IRBuilder, pointer: ir.Value, stride: int, lanes: int) -> ir.Value:
    """`lanes` floats, `stride` apart."""
    loaded = load_vector(b, pointer, lanes * stride)
    if stride == 1:
        return loaded
    picked = ir.Constant(ir.VectorType(I32, lanes), [i * stride for i in range(lanes)])
    return b.shuffle_vector(loaded, ir.Constant(loaded.type, ir.Undefined), picked)
