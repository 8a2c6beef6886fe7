"""Copies a feature map into another layout, native ops: as it is, or with its border, in phase planes for a stride."""

from __future__ import annotations

import llvmlite.ir as ir

from autoprune.repack.kernels import bf16
from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    I32,
    address,
    at,
    clear_border,
    const,
    loop,
    masked_load,
    op_function,
    picked,
    splat,
    store_vector,
)

MOST_PHASES = 32  # that are dealt out a vector at a time: code for them grows with their square


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes in floats."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET  # of position (0, 0)
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET  # of position (0, 0), or of the first phase plane
    CHANNELS = NUMBER
    HEIGHT = NUMBER
    WIDTH = NUMBER
    X_IMAGE = NUMBER
    X_CHANNEL = NUMBER
    X_ROW = NUMBER
    Y_IMAGE = NUMBER
    Y_CHANNEL = NUMBER
    Y_ROW = NUMBER
    STRIDE_H = NUMBER.of("planes")  # row phases
    PAD_H = NUMBER.of("planes")  # border rows and columns that are written with the map; 0 where there is one plane
    PAD_W = NUMBER.of("planes")
    ROWS = NUMBER.of("planes")  # of a plane
    Y_PLANE = NUMBER.of("planes")  # from a phase plane to the next
    POSITIONS = NUMBER.of("planes")  # of a channel; this and the next two: 0 where there are several planes
    BORDER = NUMBER.of("planes")  # floats of border behind them, which are cleared
    BORDER_FIRST = NUMBER.of("planes")  # and before the first channel


@kernel
def copy_map(target: Target) -> ir.Module:
    """The op that keeps rows as they are; an item is a channel of an image."""
    module = ir.Module()
    b, get, _, x, y = _start(module)
    with loop(b, const(0), get[Field.HEIGHT]) as row:
        line, into = at(b, x, b.mul(row, get[Field.X_ROW])), at(b, y, b.mul(row, get[Field.Y_ROW]))
        with loop(b, const(0), get[Field.WIDTH]) as column:
            b.store(b.load(at(b, line, column)), at(b, into, column))
    b.ret_void()
    return module


@kernel
def planes(stride: int, target: Target, rounds: bool = False) -> ir.Module:
    """The op that deals columns out to `stride` phases, and rows to theirs; an item is a channel of an image.

    Whole rows of the planes are written, their border too, and up to a vector of zeros behind them. One phase each is
    a map with its border. Where it `rounds`, to bfloat16 numbers.
    """
    module, lanes = ir.Module(), target.lanes
    b, get, item, x, y = _start(module)
    with loop(b, const(0), get[Field.ROWS]) as row, loop(b, const(0), get[Field.STRIDE_H]) as phase:
        source = b.sub(b.add(b.mul(row, get[Field.STRIDE_H]), phase), get[Field.PAD_H])
        inside = b.icmp_unsigned("<", source, get[Field.HEIGHT])  # a row above the map is a large one, unsigned
        line = at(b, x, b.select(inside, b.mul(source, get[Field.X_ROW]), const(0)))
        width = b.select(inside, get[Field.WIDTH], const(0))
        into = at(b, y, b.mul(b.mul(phase, const(stride)), get[Field.Y_PLANE]))
        into = at(b, into, b.mul(row, get[Field.Y_ROW]))
        if stride <= MOST_PHASES:
            _deal(b, module, get, stride, (line, into, width), lanes, rounds)
        else:
            _deal_singly(b, get, stride, (line, into, width), rounds)
    clear_border(b, y, item, (get[Field.POSITIONS], get[Field.BORDER], get[Field.BORDER_FIRST]))
    b.ret_void()
    return module


def _deal(
    b: ir.IRBuilder, module: ir.Module, get: dict[Field, ir.Value], stride: int,
    row: tuple[ir.Value, ir.Value, ir.Value], lanes: int, rounds: bool,
) -> None:  # fmt: skip
    """A row's columns, a vector of each phase at a time; `row` is (from, to, width)."""
    line, into, whole = row
    width = splat(b, b.trunc(whole, I32), lanes)
    with loop(b, const(0), get[Field.Y_ROW], lanes) as position:
        first = b.sub(b.mul(position, const(stride)), get[Field.PAD_W])
        parts = []
        for part in range(stride):
            start = b.add(first, const(part * lanes))
            index = b.add(
                splat(b, b.trunc(start, I32), lanes), ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
            )
            parts.append(masked_load(b, module, at(b, line, start), b.icmp_unsigned("<", index, width), lanes))
        for column in range(stride):
            place = at(b, into, b.mul(const(column), get[Field.Y_PLANE]))
            made = picked(b, parts, column, stride, lanes)
            store_vector(b, bf16.rounded(b, made, lanes) if rounds else made, at(b, place, position), lanes)


def _deal_singly(
    b: ir.IRBuilder, get: dict[Field, ir.Value], stride: int, row: tuple[ir.Value, ir.Value, ir.Value], rounds: bool
) -> None:
    """The same, a number at a time: code for many phases at once would take long to compile."""
    line, into, width = row
    with loop(b, const(0), get[Field.Y_ROW]) as position, loop(b, const(0), const(stride)) as column:
        source = b.sub(b.add(b.mul(position, const(stride)), column), get[Field.PAD_W])
        inside = b.icmp_unsigned("<", source, width)
        value = b.load(at(b, line, b.select(inside, source, const(0))))
        value = bf16.rounded(b, value, 1) if rounds else value
        place = at(b, at(b, into, b.mul(column, get[Field.Y_PLANE])), position)
        b.store(b.select(inside, value, ir.Constant(value.type, 0.0)), place)


def _start(module: ir.Module) -> tuple[ir.IRBuilder, dict[Field, ir.Value], ir.Value, ir.Value, ir.Value]:
    """Builder, fields, item, and where its channel lies."""
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    channel, image = b.srem(item, get[Field.CHANNELS]), b.sdiv(item, get[Field.CHANNELS])
    x = address(b, slots, get[Field.X_SLOT], get[Field.X_OFFSET])
    x = at(b, x, b.add(b.mul(image, get[Field.X_IMAGE]), b.mul(channel, get[Field.X_CHANNEL])))
    y = address(b, slots, get[Field.Y_SLOT], get[Field.Y_OFFSET])
    y = at(b, y, b.add(b.mul(image, get[Field.Y_IMAGE]), b.mul(channel, get[Field.Y_CHANNEL])))
    return b, get, item, x, y
