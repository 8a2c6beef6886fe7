"""What slides one window over one channel, a native op: depthwise convolution, maximum and average pooling.

Reads a map with its border around it; a stride is served by loading whole runs and keeping every stride-th float.
"""

from __future__ import annotations

from enum import Enum, IntEnum

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, compile_op, once_a_process
from autoprune.repack.kernels.ir import (
    F32,
    FLOATS,
    I32,
    INTS,
    address,
    at,
    clamp,
    clear,
    const,
    float_field,
    fma,
    inner_function,
    load_vector,
    long_at,
    loop,
    masked,
    op_function,
    pointer_field,
    smaller,
    splat,
    store_vector,
    vector,
)
from autoprune.repack.kernels.math import ACTIVATIONS
from autoprune.repack.kernels.offset_gemm import cover


class Mode(Enum):
    """What becomes of the values in a window."""

    MAX = "max"
    AVERAGE = "average"
    DEPTHWISE = "depthwise"


class Field(IntEnum):
    """Entries of the int64 array that describes one op; sizes in floats."""

    X_SLOT = 0
    X_OFFSET = 1  # bytes, of position (0, 0) in channel 0
    Y_SLOT = 2
    Y_OFFSET = 3
    X_IMAGE = 4
    Y_IMAGE = 5
    X_CHANNEL = 6
    Y_CHANNEL = 7
    X_ROW = 8  # from the input of an output row to that of the next
    Y_ROW = 9
    ROWS = 10  # of the output; a map of stride 1 is one long row
    COLUMNS = 11
    CHANNELS = 12
    CHUNK = 13  # channels an item
    CHUNKS = 14
    TAPS = 15
    OFFSETS = 16  # address of int32 a tap
    WEIGHTS = 17  # address of floats, (channels, taps); depthwise
    BIAS = 18  # address of floats, (channels,); depthwise
    SCALE = 19  # address of floats, (rows, columns) with the output's pitch; average
    MASK = 20  # address of int32 a position: -1 inside the map, 0 on its border
    LOW = 21  # float bits: results are clamped
    HIGH = 22
    POSITIONS = 23  # of a channel of the output, those on the border between rows counted
    BORDER = 24  # floats of border behind them, which are cleared
    BORDER_FIRST = 25  # and before the first channel


@once_a_process
def window(mode: Mode, stride: int, target: Target, activation: str = "") -> int:
    """The op for windows `stride` columns apart; an item is some channels of an image."""
    module = ir.Module()
    widest = 6 if stride == 1 else 4  # at once, so that none waits for the one before it
    built = {count: _run(module, mode, stride, count, target.lanes, activation) for count in range(1, widest + 1)}
    b, fields, slots, item, _ = op_function(module)
    get = {field: b.load(at(b, fields, const(field))) for field in Field}
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

            cover(b, get[Field.COLUMNS], target.lanes, widest, compute)
        clear(b, at(b, out, get[Field.POSITIONS]), get[Field.BORDER])
        with b.if_then(b.icmp_signed("==", b.or_(image, channel), const(0))):
            clear(b, at(b, out, b.neg(get[Field.BORDER_FIRST])), get[Field.BORDER_FIRST])
    b.ret_void()
    return compile_op(module, "op", target)


def _run(module: ir.Module, mode: Mode, stride: int, vectors: int, lanes: int, activation: str) -> ir.Function:
    """`vectors` x `lanes` neighbouring results of a row."""
    kinds = [FLOATS, INTS, const(0).type, FLOATS, FLOATS, FLOATS, INTS, FLOATS, F32, F32]
    function = inner_function(module, f"run_{vectors}", kinds)
    x, offsets, taps, weights, bias, scale, mask, y, low, high = function.args
    entry, head, body, done = (function.append_basic_block(name) for name in ("entry", "head", "body", "done"))
    b = ir.IRBuilder(entry)
    initial = {
        Mode.MAX: ir.Constant(F32, float("-inf")),
        Mode.AVERAGE: ir.Constant(F32, 0.0),
        Mode.DEPTHWISE: b.load(bias) if mode is Mode.DEPTHWISE else None,
    }[mode]
    first = splat(b, initial, lanes)
    b.branch(head)
    b.position_at_end(head)
    tap = b.phi(const(0).type)
    tap.add_incoming(const(0), entry)
    sums = [b.phi(vector(lanes)) for _ in range(vectors)]
    for each in sums:
        each.add_incoming(first, entry)
    b.cbranch(b.icmp_signed("<", tap, taps), body, done)
    b.position_at_end(body)
    source = at(b, x, long_at(b, offsets, tap))
    weight = splat(b, b.load(at(b, weights, tap)), lanes) if mode is Mode.DEPTHWISE else None
    for v, each in enumerate(sums):
        given = _every(b, at(b, source, const(v * lanes * stride)), stride, lanes)
        if mode is Mode.DEPTHWISE:
            value = b.call(fma(module, lanes), [given, weight, each])
        elif mode is Mode.AVERAGE:
            value = b.fadd(given, each)
        else:  # NaN wins, as in torch
            wins = b.or_(b.fcmp_ordered(">", given, each), b.fcmp_unordered("uno", given, given))
            value = b.select(wins, given, each)
        each.add_incoming(value, body)
    tap.add_incoming(b.add(tap, const(1)), body)
    b.branch(head)
    b.position_at_end(done)
    lows, highs = splat(b, low, lanes), splat(b, high, lanes)
    for v, each in enumerate(sums):
        at_v = const(v * lanes)
        value = b.fmul(each, load_vector(b, at(b, scale, at_v), lanes)) if mode is Mode.AVERAGE else each
        value = clamp(b, value, lows, highs)
        if activation:
            value = ACTIVATIONS[activation](b, module, value, lanes)
        store_vector(b, masked(b, value, at(b, mask, at_v), lanes), at(b, y, at_v), lanes)
    b.ret_void()
    return function


def _every(b: ir.IRBuilder, pointer: ir.Value, stride: int, lanes: int) -> ir.Value:
    """`lanes` floats, `stride` apart."""
    loaded = load_vector(b, pointer, lanes * stride)
    if stride == 1:
        return loaded
    picked = ir.Constant(ir.VectorType(I32, lanes), [i * stride for i in range(lanes)])
    return b.shuffle_vector(loaded, ir.Constant(loaded.type, ir.Undefined), picked)
