"""Brings a value into or out of an interleaved map, native ops: floats into bytes, bytes into floats, or as it is.

Rows are neighbouring floats or lanes; what is written may be phase planes for a stride, and has its border.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import llvmlite.ir as ir

from autoprune.repack.kernels.bytes_lanes import (
    Store,
    across,
    bounded,
    floats_where,
    ints,
    lanes_where,
    packed,
    unpacked,
)
from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.copy import MOST_PHASES
from autoprune.repack.kernels.fields import FLOAT, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    I32,
    address,
    at,
    clear_border,
    const,
    float_field,
    loop,
    op_function,
    picked,
    smaller,
    splat,
    vector,
)
from autoprune.repack.weights.quads import QUAD


class Form(Enum):
    """What is read, and what it becomes."""

    MOVED = "bytes as they are"
    QUANTISED = "floats into bytes"
    DEQUANTISED = "bytes into floats"


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes in floats, which are as long as lanes."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET  # of position (0, 0)
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET  # of position (0, 0), or of the first phase plane
    CHANNELS = NUMBER  # of the value
    QUADS = NUMBER  # lane-channels: a fourth of them, rounded up
    HEIGHT = NUMBER
    WIDTH = NUMBER
    X_IMAGE = NUMBER
    X_CHANNEL = NUMBER  # from a channel of floats, or a lane-channel, to the next
    X_ROW = NUMBER
    Y_IMAGE = NUMBER
    Y_CHANNEL = NUMBER
    Y_ROW = NUMBER
    STRIDE_H = NUMBER  # row phases
    PAD_H = NUMBER  # border rows and columns that are written with the map; 0 where there is one plane
    PAD_W = NUMBER
    ROWS = NUMBER  # of a plane
    COLUMNS = NUMBER  # of a row of a plane that are written
    Y_PLANE = NUMBER  # from a phase plane to the next
    BLOCK = NUMBER  # rows of a plane an item
    BLOCKS = NUMBER
    POSITIONS = NUMBER  # of a channel; this and the next two: 0 where there are several planes, or no map
    BORDER = NUMBER  # behind them, which is filled
    BORDER_FIRST = NUMBER  # and before the first channel
    BORDER_VALUE = NUMBER  # lanes around an interleaved map: of zero points where it is on a grid
    SCALE = FLOAT.of("grid")  # what a float, or a byte without its zero point, is multiplied by
    LOW = FLOAT.of("quantised")  # products are clamped: minus the zero point
    HIGH = FLOAT.of("quantised")  # 255 minus the zero point
    ZERO = NUMBER.of("dequantised")  # the zero point


@kernel
def copy_bytes(form: Form, stride: int, target: Target) -> ir.Module:
    """The op that deals columns out to `stride` phases, and rows to theirs; an item is some rows of a lane-channel.

    Args:
        form: what is read, and what it becomes.
        stride: column phases of what is written.
        target: what to compile for.
    """
    module = ir.Module()
    lanes = target.lanes if stride <= MOST_PHASES else 1  # code for many phases at once would take long to compile
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    block, channel = b.srem(item, get[Field.BLOCKS]), b.sdiv(item, get[Field.BLOCKS])
    quad, image = b.srem(channel, get[Field.QUADS]), b.sdiv(channel, get[Field.QUADS])
    x, y = _base(b, get, slots, image, "X"), _base(b, get, slots, image, "Y")
    numbers = [b.add(b.mul(quad, const(QUAD)), const(j)) for j in range(QUAD)]
    exists = [b.icmp_signed("<", number, get[Field.CHANNELS]) for number in numbers]
    several = quad if form is not Form.QUANTISED else numbers[0]
    x = at(b, x, b.mul(several, get[Field.X_CHANNEL]))
    y = at(b, y, b.mul(numbers[0] if form is Form.DEQUANTISED else quad, get[Field.Y_CHANNEL]))
    load = _loading(b, module, get, form, exists, lanes)
    store = _storing(b, get, form, exists, lanes)
    first = b.mul(block, get[Field.BLOCK])
    last = smaller(b, b.add(first, get[Field.BLOCK]), get[Field.ROWS])
    with loop(b, first, last) as row, loop(b, const(0), get[Field.STRIDE_H]) as phase:
        source = b.sub(b.add(b.mul(row, get[Field.STRIDE_H]), phase), get[Field.PAD_H])
        inside = b.icmp_unsigned("<", source, get[Field.HEIGHT])  # a row above the map is a large one, unsigned
        line = at(b, x, b.select(inside, b.mul(source, get[Field.X_ROW]), const(0)))
        width = b.select(inside, get[Field.WIDTH], const(0))
        into = at(b, y, b.mul(b.mul(phase, const(stride)), get[Field.Y_PLANE]))
        into = at(b, into, b.mul(row, get[Field.Y_ROW]))

        def deal(
            position: ir.Value, put: Store, line: ir.Value = line, width: ir.Value = width, into: ir.Value = into
        ) -> None:  # fmt: skip
            start, place = b.sub(b.mul(position, const(stride)), get[Field.PAD_W]), at(b, into, position)
            if lanes == 1:
                with loop(b, const(0), const(stride)) as column:
                    store(load(line, b.add(start, column), width), at(b, place, b.mul(column, get[Field.Y_PLANE])), put)
                return
            parts = [load(line, b.add(start, const(part * lanes)), width) for part in range(stride)]
            parts = [b.bitcast(part, vector(lanes)) for part in parts]
            for column in range(stride):
                dealt = parts[0] if stride == 1 else picked(b, parts, column, stride, lanes)
                store(b.bitcast(dealt, ints(lanes)), at(b, place, b.mul(const(column), get[Field.Y_PLANE])), put)

        across(b, module, get[Field.COLUMNS], lanes, deal)
    with b.if_then(b.icmp_signed("==", block, const(0))):
        _fill_borders(b, get, form, exists, y, b.or_(image, quad))
    b.ret_void()
    return module


def _base(b: ir.IRBuilder, get: dict[Field, ir.Value], slots: ir.Value, image: ir.Value, side: str) -> ir.Value:
    start = address(b, slots, get[Field[f"{side}_SLOT"]], get[Field[f"{side}_OFFSET"]])
    return at(b, start, b.mul(image, get[Field[f"{side}_IMAGE"]]))


def _loading(
    b: ir.IRBuilder, module: ir.Module, get: dict[Field, ir.Value], form: Form, exists: list[ir.Value], lanes: int
) -> Callable[[ir.Value, ir.Value, ir.Value], ir.Value]:  # fmt: skip
    """``load(line, start, width)``: the lanes from column `start` on, the zero point where there is none."""
    border = splat(b, b.trunc(get[Field.BORDER_VALUE], I32), lanes)
    scale, low, high = (splat(b, float_field(b, get[each]), lanes) for each in (Field.SCALE, Field.LOW, Field.HIGH))

    def lanes_of(line: ir.Value, start: ir.Value, width: ir.Value) -> ir.Value:
        return lanes_where(b, module, line, start, splat(b, b.trunc(width, I32), lanes), border, lanes)

    def quantised(line: ir.Value, start: ir.Value, width: ir.Value) -> ir.Value:
        values = []
        for j, known in enumerate(exists):
            wide = splat(b, b.trunc(b.select(known, width, const(0)), I32), lanes)
            channel = at(b, line, b.mul(get[Field.X_CHANNEL], const(j)))
            value, _ = floats_where(b, module, channel, start, wide, lanes)  # 0.0 becomes the zero point
            values.append(bounded(b, b.fmul(value, scale), low, high))
        return packed(b, values, border, lanes)

    return quantised if form is Form.QUANTISED else lanes_of


def _storing(
    b: ir.IRBuilder, get: dict[Field, ir.Value], form: Form, exists: list[ir.Value], lanes: int
) -> Callable[[ir.Value, ir.Value, Store], None]:  # fmt: skip
    """``store(lanes, place, put)``: as they are, or as the floats of each channel that there is."""
    zero, scale = splat(b, b.trunc(get[Field.ZERO], I32), lanes), splat(b, float_field(b, get[Field.SCALE]), lanes)

    def dequantised(value: ir.Value, place: ir.Value, put: Store) -> None:
        for j, part in enumerate(unpacked(b, value, lanes)):
            with b.if_then(exists[j]):
                real = b.fmul(b.sitofp(b.sub(part, zero), vector(lanes)), scale)
                put(real, at(b, place, b.mul(get[Field.Y_CHANNEL], const(j))))

    def plain(value: ir.Value, place: ir.Value, put: Store) -> None:
        put(value, place)

    return dequantised if form is Form.DEQUANTISED else plain


def _fill_borders(
    b: ir.IRBuilder, get: dict[Field, ir.Value], form: Form, exists: list[ir.Value], y: ir.Value, number: ir.Value
) -> None:  # fmt: skip
    """What lies around the channels of an item: the zero point, or 0.0."""
    border = (get[Field.POSITIONS], get[Field.BORDER], get[Field.BORDER_FIRST])
    if form is not Form.DEQUANTISED:
        clear_border(b, y, number, border, float_field(b, get[Field.BORDER_VALUE]))
        return
    for j, known in enumerate(exists):
        with b.if_then(known):
            channel = at(b, y, b.mul(get[Field.Y_CHANNEL], const(j)))
            clear_border(b, channel, b.or_(number, const(j)), border)
