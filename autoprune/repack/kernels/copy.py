"""Copies a feature map into another layout, a native op: into a border, into phase planes, or out again."""

from __future__ import annotations

from enum import IntEnum

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, compile_op, once_a_process
from autoprune.repack.kernels.ir import (
    F32,
    I32,
    address,
    at,
    const,
    larger,
    load_vector,
    loop,
    op_function,
    store_vector,
)


class Field(IntEnum):
    """Entries of the int64 array that describes one op; sizes in floats."""

    X_SLOT = 0
    X_OFFSET = 1  # bytes, of position (0, 0)
    Y_SLOT = 2
    Y_OFFSET = 3  # bytes, of position (0, 0), or of the first phase plane
    CHANNELS = 4
    HEIGHT = 5
    WIDTH = 6
    X_IMAGE = 7
    X_CHANNEL = 8
    X_ROW = 9
    Y_IMAGE = 10
    Y_CHANNEL = 11
    Y_ROW = 12
    STRIDE_H = 13  # phases; 1 and 1: no phase planes, and the pads are not used
    STRIDE_W = 14
    PAD_H = 15
    PAD_W = 16
    Y_PLANE = 17  # from a phase plane to the next
    CLEARED = 18  # floats of a channel that are set to zero first: phase planes hold their border themselves


@once_a_process
def copy_map(target: Target) -> int:
    """The op; an item is a channel of an image."""
    module = ir.Module()
    b, fields, slots, item, _ = op_function(module)
    get = {field: b.load(at(b, fields, const(field))) for field in Field}
    channel, image = b.srem(item, get[Field.CHANNELS]), b.sdiv(item, get[Field.CHANNELS])
    x = address(b, slots, get[Field.X_SLOT], get[Field.X_OFFSET])
    x = at(b, x, b.add(b.mul(image, get[Field.X_IMAGE]), b.mul(channel, get[Field.X_CHANNEL])))
    y = address(b, slots, get[Field.Y_SLOT], get[Field.Y_OFFSET])
    y = at(b, y, b.add(b.mul(image, get[Field.Y_IMAGE]), b.mul(channel, get[Field.Y_CHANNEL])))
    with loop(b, const(0), get[Field.CLEARED]) as position:
        b.store(ir.Constant(F32, 0.0), at(b, y, position))
    high, wide = get[Field.STRIDE_H], get[Field.STRIDE_W]
    whole = b.icmp_signed("==", b.mul(high, wide), const(1))
    with loop(b, const(0), get[Field.HEIGHT]) as row:
        line = at(b, x, b.mul(row, get[Field.X_ROW]))
        with b.if_else(whole) as (plain, phased):
            with plain:
                into = at(b, y, b.mul(row, get[Field.Y_ROW]))
                with loop(b, const(0), get[Field.WIDTH]) as column:
                    b.store(b.load(at(b, line, column)), at(b, into, column))
            with phased:
                padded = b.add(row, get[Field.PAD_H])
                plane = b.mul(b.mul(b.srem(padded, high), wide), get[Field.Y_PLANE])
                into = at(b, y, b.add(plane, b.mul(b.sdiv(padded, high), get[Field.Y_ROW])))
                with b.if_else(b.icmp_signed("==", wide, const(2))) as (pairs, any_):
                    with pairs:
                        _pairs(b, get, line, into, target.lanes)
                    with any_:
                        _phases(b, get, line, into, wide)
    b.ret_void()
    return compile_op(module, "op", target)


def _pairs(b: ir.IRBuilder, get: dict[Field, ir.Value], line: ir.Value, into: ir.Value, lanes: int) -> None:
    """A row into two phases: its even and its odd columns, which the padding may exchange."""
    pad, width, plane = get[Field.PAD_W], get[Field.WIDTH], get[Field.Y_PLANE]

    def place(column: int) -> ir.Value:
        """Where the row's columns of this parity go."""
        padded = b.add(pad, const(column))
        return at(b, into, b.add(b.mul(b.srem(padded, const(2)), plane), b.sdiv(padded, const(2))))

    places, done = [place(0), place(1)], const(0)
    for count in (lanes, lanes // 2):  # vectors, then narrower ones: nothing may be written beyond the row
        stop = b.mul(b.sdiv(width, const(2 * count)), const(count))
        with loop(b, done, stop, count) as pair:
            source = at(b, line, b.mul(pair, const(2)))
            first, second = (load_vector(b, at(b, source, const(part)), count) for part in (0, count))
            for parity in (0, 1):
                picked = ir.Constant(ir.VectorType(I32, count), [2 * i + parity for i in range(count)])
                store_vector(b, b.shuffle_vector(first, second, picked), at(b, places[parity], pair), count)
        done = stop
    with loop(b, b.mul(done, const(2)), width) as column:
        source = b.load(at(b, line, column))
        odd = b.icmp_signed("==", b.srem(column, const(2)), const(1))
        b.store(source, at(b, b.select(odd, places[1], places[0]), b.sdiv(column, const(2))))


def _phases(b: ir.IRBuilder, get: dict[Field, ir.Value], line: ir.Value, into: ir.Value, wide: ir.Value) -> None:
    """A row into its phases: every `wide`-th column from the first with padded column = phase (mod wide)."""
    pad = get[Field.PAD_W]
    with loop(b, const(0), wide) as phase:
        target = at(b, into, b.mul(phase, get[Field.Y_PLANE]))
        before = larger(b, b.sub(b.add(pad, b.sub(wide, const(1))), phase), const(0))
        first = b.sdiv(before, wide)  # the first index whose column is inside the image
        column = b.sub(b.add(b.mul(first, wide), phase), pad)
        left = larger(b, b.sub(get[Field.WIDTH], column), const(0))
        count = b.sdiv(b.add(left, b.sub(wide, const(1))), wide)
        source, shifted = at(b, line, column), at(b, target, first)
        with loop(b, const(0), count) as i:
            b.store(b.load(at(b, source, b.mul(i, wide))), at(b, shifted, i))
