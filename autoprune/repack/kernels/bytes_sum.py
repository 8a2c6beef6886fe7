"""The sum of two values on a grid, or one brought onto another: a native op on interleaved maps and maps of floats.

What is written may begin within a lane of Y, behind the channels of another value: so values are joined along channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import llvmlite.ir as ir

from autoprune.repack.kernels.bytes_lanes import (
    bordered,
    bounded,
    int_splat,
    kept_bytes,
    load_lanes,
    packed,
    store_lanes,
    unpacked_floats,
)
from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import FLOAT, INT32_ARRAY, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    F32,
    I32,
    INTS,
    address,
    at,
    clear_border,
    const,
    float_field,
    fma,
    larger,
    load_vector,
    loop,
    module_of_bytes,
    op_function,
    pointer_field,
    smaller,
    splat,
)
from autoprune.repack.weights.quads import QUAD

Source = Literal["lanes", "bytes", "floats"]
"""A value as it is stored: floats, bytes, or bytes that are not changed."""


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes in floats, which are as long as lanes."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET  # of position (0, 0) in channel 0
    X_IMAGE = NUMBER
    X_QUAD = NUMBER  # from four channels to the next four
    X_CHANNEL = NUMBER  # where it holds floats
    X_FACTOR = FLOAT
    OTHER_SLOT = SLOT.of("other")
    OTHER_OFFSET = OFFSET.of("other")
    OTHER_IMAGE = NUMBER.of("other")
    OTHER_QUAD = NUMBER.of("other")
    OTHER_CHANNEL = NUMBER.of("other")
    OTHER_FACTOR = FLOAT.of("other")
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET  # of the first lane-channel that is written
    Y_IMAGE = NUMBER
    Y_QUAD = NUMBER
    BIAS = FLOAT  # added to the products
    LOW = FLOAT  # sums are clamped
    HIGH = FLOAT
    CHANNELS = NUMBER  # that are read
    QUADS = NUMBER  # lane-channels that are written
    CHUNK = NUMBER  # of them an item
    CHUNKS = NUMBER
    POSITIONS = NUMBER
    MASK = INT32_ARRAY  # per position: -1 inside the map, 0 on its border
    BORDER_VALUE = NUMBER  # what a lane of y's border holds
    BORDER = NUMBER  # lanes of border behind a channel's positions, which are filled
    BORDER_FIRST = NUMBER  # and before the first channel


@kernel
def sum_bytes(sources: tuple[Source, ...], shift: int, target: Target) -> ir.Module:
    """The op; the maps have one pitch. An item is some lane-channels of an image.

    Args:
        sources: what is read: one value, or two of which neither is "lanes".
        shift: bytes of Y's first lane that other channels fill, 0 to 3.
        target: what to compile for.
    """
    module, lanes = module_of_bytes(target.fused), target.lanes
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    chunk, image = b.srem(item, get[Field.CHUNKS]), b.sdiv(item, get[Field.CHUNKS])
    y = at(b, address(b, slots, get[Field.Y_SLOT], get[Field.Y_OFFSET]), b.mul(image, get[Field.Y_IMAGE]))
    made = _making(b, module, get, slots, image, sources, lanes)
    mask = pointer_field(b, get[Field.MASK], INTS)
    lane = b.trunc(get[Field.BORDER_VALUE], I32)
    last = b.sdiv(b.sub(get[Field.CHANNELS], const(1)), const(QUAD))
    first = b.mul(chunk, get[Field.CHUNK])
    with loop(b, first, smaller(b, b.add(first, get[Field.CHUNK]), get[Field.QUADS])) as quad:
        out = at(b, y, b.mul(quad, get[Field.Y_QUAD]))
        kept = splat(b, kept_bytes(b, quad, b.add(get[Field.CHANNELS], const(shift))), lanes)
        is_first = b.icmp_signed("==", quad, const(0))
        with loop(b, const(0), get[Field.POSITIONS], lanes) as position:
            place = at(b, out, position)
            value = made(smaller(b, quad, last), position)
            if shift:
                before = made(larger(b, b.sub(quad, const(1)), const(0)), position)
                before = b.lshr(before, int_splat(8 * (QUAD - shift), lanes))
                other = b.and_(load_lanes(b, place, lanes), int_splat((1 << 8 * shift) - 1, lanes))
                value = b.or_(b.shl(value, int_splat(8 * shift, lanes)), b.select(is_first, other, before))
            inside = b.and_(load_lanes(b, at(b, mask, position), lanes), kept)
            store_lanes(b, bordered(b, value, inside, splat(b, lane, lanes)), place, lanes)
        border = (get[Field.POSITIONS], get[Field.BORDER], get[Field.BORDER_FIRST])
        clear_border(b, out, b.or_(image, quad), border, b.bitcast(lane, F32))
    b.ret_void()
    return module


def _making(
    b: ir.IRBuilder, module: ir.Module, get: dict[Field, ir.Value], slots: ir.Value, image: ir.Value,
    sources: tuple[Source, ...], lanes: int,
) -> Callable[[ir.Value, ir.Value], ir.Value]:  # fmt: skip
    """``made(quad, position)``: lanes of the sum, from four channels of what is read."""
    bases = [
        at(b, address(b, slots, get[Field[f"{side}_SLOT"]], get[Field[f"{side}_OFFSET"]]),
           b.mul(image, get[Field[f"{side}_IMAGE"]]))
        for side in ("X", "OTHER")
    ]  # fmt: skip
    bias, low, high = (splat(b, float_field(b, get[each]), lanes) for each in (Field.BIAS, Field.LOW, Field.HIGH))
    factors = [splat(b, float_field(b, get[each]), lanes) for each in (Field.X_FACTOR, Field.OTHER_FACTOR)]
    last = b.sub(get[Field.CHANNELS], const(1))

    def floats(number: int, quad: ir.Value, position: ir.Value) -> list[ir.Value]:
        side = ("X", "OTHER")[number]
        if sources[number] == "bytes":
            place = at(b, bases[number], b.add(b.mul(quad, get[Field[f"{side}_QUAD"]]), position))
            return unpacked_floats(b, load_lanes(b, place, lanes), lanes)
        channels = [smaller(b, b.add(b.mul(quad, const(QUAD)), const(j)), last) for j in range(QUAD)]
        places = [b.add(b.mul(channel, get[Field[f"{side}_CHANNEL"]]), position) for channel in channels]
        return [load_vector(b, at(b, bases[number], place), lanes) for place in places]

    def summed(quad: ir.Value, position: ir.Value) -> ir.Value:
        values = [bias] * QUAD
        for number, factor in zip(range(len(sources)), factors, strict=False):
            given = floats(number, quad, position)
            values = [b.call(fma(module, lanes), [each, factor, v]) for each, v in zip(given, values, strict=True)]
        return packed(b, [bounded(b, value, low, high) for value in values], None, lanes)

    def same(quad: ir.Value, position: ir.Value) -> ir.Value:
        return load_lanes(b, at(b, bases[0], b.add(b.mul(quad, get[Field.X_QUAD]), position)), lanes)

    return same if sources == ("lanes",) else summed
