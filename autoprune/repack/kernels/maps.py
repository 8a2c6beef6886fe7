"""Native ops on whole feature maps: sums, products and activations a position, and the mean of each channel."""

from __future__ import annotations

from enum import Enum

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import FLOAT, INT32_ARRAY, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    F32,
    INTS,
    address,
    at,
    clamp,
    clear_border,
    const,
    float_field,
    fold,
    load_vector,
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
from autoprune.repack.kernels.sums import PARTS


class Combine(Enum):
    """How two maps become one; NONE reads the first alone."""

    NONE = "none"
    ADD = "add"


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes in floats."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET  # of position (0, 0) in channel 0
    OTHER_SLOT = SLOT.of("other")
    OTHER_OFFSET = OFFSET.of("other")
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    X_IMAGE = NUMBER
    OTHER_IMAGE = NUMBER.of("other")
    Y_IMAGE = NUMBER
    X_CHANNEL = NUMBER
    OTHER_CHANNEL = NUMBER.of("other")
    Y_CHANNEL = NUMBER
    POSITIONS = NUMBER
    CHANNELS = NUMBER
    CHUNK = NUMBER  # channels an item
    CHUNKS = NUMBER
    MASK = INT32_ARRAY  # per position: -1 inside the map, 0 on its border
    LOW = FLOAT.of("elementwise")  # results are clamped
    HIGH = FLOAT.of("elementwise")
    SCALE = FLOAT.of("mean")  # of a channel's sum
    BORDER = NUMBER.of("elementwise")  # floats of border behind a channel's positions, which are cleared
    BORDER_FIRST = NUMBER.of("elementwise")  # and before the first channel


def _start(
    module: ir.Module,
) -> tuple[ir.IRBuilder, dict[Field, ir.Value], ir.Value, ir.Value, tuple[ir.Value, ir.Value]]:
    """Builder, fields, slots, image, and the channels of the item."""
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    chunk, image = b.srem(item, get[Field.CHUNKS]), b.sdiv(item, get[Field.CHUNKS])
    first = b.mul(chunk, get[Field.CHUNK])
    return b, get, slots, image, (first, smaller(b, b.add(first, get[Field.CHUNK]), get[Field.CHANNELS]))


@kernel
def elementwise(combine: Combine, target: Target, activation: str = "") -> ir.Module:
    """Y = activation(clamp(x [+ other])); the maps have one pitch. An item is some channels of an image."""
    module, lanes = ir.Module(), target.lanes
    b, get, slots, image, channels = _start(module)
    low, high = (splat(b, float_field(b, get[field]), lanes) for field in (Field.LOW, Field.HIGH))
    mask = pointer_field(b, get[Field.MASK], INTS)

    def base(slot: Field, offset: Field, stride: Field) -> ir.Value:
        return at(b, address(b, slots, get[slot], get[offset]), b.mul(image, get[stride]))

    x = base(Field.X_SLOT, Field.X_OFFSET, Field.X_IMAGE)
    y = base(Field.Y_SLOT, Field.Y_OFFSET, Field.Y_IMAGE)
    other = base(Field.OTHER_SLOT, Field.OTHER_OFFSET, Field.OTHER_IMAGE)
    with loop(b, *channels) as channel:
        given, out = at(b, x, b.mul(channel, get[Field.X_CHANNEL])), at(b, y, b.mul(channel, get[Field.Y_CHANNEL]))
        second = at(b, other, b.mul(channel, get[Field.OTHER_CHANNEL]))
        with loop(b, const(0), get[Field.POSITIONS], lanes) as position:
            value = load_vector(b, at(b, given, position), lanes)
            if combine is Combine.ADD:
                value = b.fadd(value, load_vector(b, at(b, second, position), lanes))
            value = clamp(b, value, low, high)
            if activation:
                value = ACTIVATIONS[activation](b, module, value, lanes)
            store_vector(b, masked(b, value, at(b, mask, position), lanes), at(b, out, position), lanes)
        border = (get[Field.POSITIONS], get[Field.BORDER], get[Field.BORDER_FIRST])
        clear_border(b, out, b.or_(image, channel), border)
    b.ret_void()
    return module


@kernel
def channel_mean(target: Target) -> ir.Module:
    """Each channel's sum times SCALE to Y, a float a channel. An item is some channels of an image."""
    module = ir.Module()
    b, get, slots, image, channels = _start(module)
    mask = pointer_field(b, get[Field.MASK], INTS)
    x = at(b, address(b, slots, get[Field.X_SLOT], get[Field.X_OFFSET]), b.mul(image, get[Field.X_IMAGE]))
    y = at(b, address(b, slots, get[Field.Y_SLOT], get[Field.Y_OFFSET]), b.mul(image, get[Field.Y_IMAGE]))
    scale = float_field(b, get[Field.SCALE])
    with loop(b, *channels) as channel:
        plane = at(b, x, b.mul(channel, get[Field.X_CHANNEL]))

        def add(position: ir.Value, total: list[ir.Value], plane: ir.Value = plane) -> list[ir.Value]:
            given = masked(b, load_vector(b, at(b, plane, position), PARTS), at(b, mask, position), PARTS)
            return [b.fadd(total[0], given)]

        (total,) = fold(b, const(0), get[Field.POSITIONS], [ir.Constant(vector(PARTS), None)], add, PARTS)
        result = ir.Constant(F32, 0.0)
        for lane in range(PARTS):
            result = b.fadd(result, b.extract_element(total, const(lane)))
        b.store(b.fmul(result, scale), at(b, y, b.mul(channel, get[Field.Y_CHANNEL])))
    b.ret_void()
    return module
