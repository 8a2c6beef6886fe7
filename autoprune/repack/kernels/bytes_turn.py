"""Turns rows of float features into an interleaved map of tokens, native ops: into bytes, and out again.

Four neighbouring features of a token are a lane. A block of as many tokens as a vector has lanes, and four times as
many features, is turned in registers.
"""

from __future__ import annotations

import llvmlite.ir as ir

from autoprune.repack.kernels.bytes_lanes import (
    bounded,
    floats_where,
    ints,
    load_lanes,
    rounded_bytes,
    spread,
    steps_from,
    store_lanes,
)
from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import FLOAT, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    F32,
    I8,
    I32,
    address,
    at,
    clear_border,
    const,
    float_field,
    loop,
    masked_store,
    op_function,
    smaller,
    splat,
    vector,
)
from autoprune.repack.kernels.turn import turned_block
from autoprune.repack.weights.quads import QUAD


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes in floats, which are as long as lanes."""

    ROWS_SLOT = SLOT
    ROWS_OFFSET = OFFSET
    ROWS_IMAGE = NUMBER
    ROWS_TOKEN = NUMBER  # from a token to the next
    MAP_SLOT = SLOT
    MAP_OFFSET = OFFSET
    MAP_IMAGE = NUMBER
    MAP_QUAD = NUMBER  # from a lane-channel to the next
    TOKENS = NUMBER  # of an image
    FEATURES = NUMBER
    QUADS = NUMBER  # a fourth of the features, rounded up
    BLOCKS = NUMBER  # of tokens, an item each
    ZERO = NUMBER  # the zero point
    SCALE = FLOAT  # what a float, or a byte without its zero point, is multiplied by
    LOW = FLOAT.of("quantised")  # products are clamped: -ZERO
    HIGH = FLOAT.of("quantised")  # 255 - ZERO
    BORDER = NUMBER.of("quantised")  # lanes of border behind a lane-channel's tokens, which are filled
    BORDER_FIRST = NUMBER.of("quantised")  # and before the first


@kernel
def tokens_to_bytes(target: Target) -> ir.Module:
    """The op; an item is as many tokens as a vector has lanes. Lanes are filled to whole vectors of tokens."""
    module, lanes = ir.Module(), target.lanes
    b, get, rows, map_, (block, image) = _start(module)
    first, features, zero = b.mul(block, const(lanes)), get[Field.FEATURES], get[Field.ZERO]
    scale, low, high = (splat(b, float_field(b, get[each]), lanes) for each in (Field.SCALE, Field.LOW, Field.HIGH))
    zeros = splat(b, spread(b, zero), lanes)
    lines, widths = [], []
    for i in range(lanes):
        token = b.add(first, const(i))
        here = b.icmp_signed("<", token, get[Field.TOKENS])
        lines.append(at(b, rows, b.select(here, b.mul(token, get[Field.ROWS_TOKEN]), const(0))))
        widths.append(splat(b, b.trunc(b.select(here, features, const(0)), I32), lanes))
    with loop(b, const(0), features, QUAD * lanes) as feature:
        made = []
        for line, width in zip(lines, widths, strict=True):
            values = []
            for part in range(QUAD):
                value, _ = floats_where(b, module, line, b.add(feature, const(part * lanes)), width, lanes)
                values.append(bounded(b, b.fmul(value, scale), low, high))
            made.append(b.bitcast(rounded_bytes(b, values, zeros, lanes), vector(lanes)))
        for i, quads in enumerate(turned_block(b, made)):
            quad = b.add(b.sdiv(feature, const(QUAD)), const(i))
            with b.if_then(b.icmp_signed("<", quad, get[Field.QUADS])):
                place = at(b, at(b, map_, b.mul(quad, get[Field.MAP_QUAD])), first)
                store_lanes(b, b.bitcast(quads, ints(lanes)), place, lanes)
    border = (get[Field.TOKENS], get[Field.BORDER], get[Field.BORDER_FIRST])
    with b.if_then(b.icmp_signed("==", block, const(0))), loop(b, const(0), get[Field.QUADS]) as quad:
        channel, lane = at(b, map_, b.mul(quad, get[Field.MAP_QUAD])), b.bitcast(spread(b, zero), F32)
        clear_border(b, channel, b.or_(image, quad), border, lane)
    b.ret_void()
    return module


@kernel
def bytes_to_tokens(target: Target) -> ir.Module:
    """The op; an item is as many tokens as a vector has lanes."""
    module, lanes = ir.Module(), target.lanes
    b, get, rows, map_, (block, _) = _start(module)
    first, width = b.mul(block, const(lanes)), splat(b, b.trunc(get[Field.FEATURES], I32), lanes)
    zero, scale = splat(b, b.trunc(get[Field.ZERO], I32), lanes), splat(b, float_field(b, get[Field.SCALE]), lanes)
    last = b.sub(get[Field.QUADS], const(1))
    with loop(b, const(0), get[Field.FEATURES], QUAD * lanes) as feature:
        given = []
        for i in range(lanes):  # the last lane-channel stands for those behind it
            quad = smaller(b, b.add(b.sdiv(feature, const(QUAD)), const(i)), last)
            place = at(b, at(b, map_, b.mul(quad, get[Field.MAP_QUAD])), first)
            given.append(b.bitcast(load_lanes(b, place, lanes), vector(lanes)))
        for i, quads in enumerate(turned_block(b, given)):
            token = b.add(first, const(i))
            with b.if_then(b.icmp_signed("<", token, get[Field.TOKENS])):
                line = at(b, rows, b.mul(token, get[Field.ROWS_TOKEN]))
                all_bytes = b.bitcast(quads, ir.VectorType(I8, QUAD * lanes))
                for part in range(QUAD):
                    places = ir.Constant(ir.VectorType(I32, lanes), [part * lanes + lane for lane in range(lanes)])
                    some = b.shuffle_vector(all_bytes, ir.Constant(all_bytes.type, ir.Undefined), places)
                    real = b.fmul(b.sitofp(b.sub(b.zext(some, ints(lanes)), zero), vector(lanes)), scale)
                    start = b.add(feature, const(part * lanes))
                    wanted = b.icmp_unsigned("<", steps_from(b, start, lanes), width)
                    masked_store(b, module, real, at(b, line, start), wanted, lanes)
    b.ret_void()
    return module


def _start(
    module: ir.Module,
) -> tuple[ir.IRBuilder, dict[Field, ir.Value], ir.Value, ir.Value, tuple[ir.Value, ir.Value]]:
    """Builder, fields, the rows and the map of the item's image, and which of its blocks of which image it is."""
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    block, image = b.srem(item, get[Field.BLOCKS]), b.sdiv(item, get[Field.BLOCKS])
    rows = at(b, address(b, slots, get[Field.ROWS_SLOT], get[Field.ROWS_OFFSET]), b.mul(image, get[Field.ROWS_IMAGE]))
    map_ = at(b, address(b, slots, get[Field.MAP_SLOT], get[Field.MAP_OFFSET]), b.mul(image, get[Field.MAP_IMAGE]))
    return b, get, rows, map_, (block, image)
