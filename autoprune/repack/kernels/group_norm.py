"""Group norm of a feature map, a native op."""

from __future__ import annotations

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import FLOAT, FLOAT32_ARRAY, INT32_ARRAY, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    F32,
    FLOATS,
    INTS,
    address,
    at,
    clear_border,
    const,
    float_field,
    fma,
    fold,
    load_vector,
    loop,
    masked,
    op_function,
    pointer_field,
    splat,
    store_vector,
)
from autoprune.repack.kernels.math import splat_float
from autoprune.repack.kernels.sums import CHAINS, PARTS, pieces, united


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes in floats."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET  # of position (0, 0) in channel 0
    X_IMAGE = NUMBER
    X_CHANNEL = NUMBER
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    Y_IMAGE = NUMBER
    Y_CHANNEL = NUMBER
    GROUPS = NUMBER
    CHANNELS = NUMBER  # of a group
    POSITIONS = NUMBER
    MASK = INT32_ARRAY  # per position: -1 inside the map, 0 on its border
    WEIGHT = FLOAT32_ARRAY  # (channels,)
    BIAS = FLOAT32_ARRAY
    EPSILON = FLOAT
    SHARE = FLOAT  # one over the number of floats in a group
    BORDER = NUMBER  # floats of border behind a channel's positions, which are cleared
    BORDER_FIRST = NUMBER  # and before the first channel


@kernel
def group_norm(target: Target) -> ir.Module:
    """Y = (x - mean) / sqrt(variance + epsilon) * weight + bias, a group at a time; an item is a group of an image."""
    module, lanes = ir.Module(), target.lanes
    wide = CHAINS * PARTS  # what is read beyond a channel lies in the map's buffer, and is masked
    width, places = pieces(wide, lanes)
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    group, image = b.srem(item, get[Field.GROUPS]), b.sdiv(item, get[Field.GROUPS])
    x = at(b, address(b, slots, get[Field.X_SLOT], get[Field.X_OFFSET]), b.mul(image, get[Field.X_IMAGE]))
    y = at(b, address(b, slots, get[Field.Y_SLOT], get[Field.Y_OFFSET]), b.mul(image, get[Field.Y_IMAGE]))
    mask, positions = pointer_field(b, get[Field.MASK], INTS), get[Field.POSITIONS]
    weight, bias = (pointer_field(b, get[field], FLOATS) for field in (Field.WEIGHT, Field.BIAS))
    first = b.mul(group, get[Field.CHANNELS])
    last, share = b.add(first, get[Field.CHANNELS]), float_field(b, get[Field.SHARE])

    def averaged(mean: ir.Value | None) -> ir.Value:
        """The mean, or given that the mean square of what is away from it."""

        def add_channel(channel: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
            plane = at(b, x, b.mul(channel, get[Field.X_CHANNEL]))

            def add(position: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
                made = []
                for total, place in zip(held, places, strict=True):
                    here = b.add(position, const(place))
                    value = load_vector(b, at(b, plane, here), width)
                    value = value if mean is None else b.fsub(value, splat(b, mean, width))
                    value = masked(b, value, at(b, mask, here), width)
                    made.append(
                        b.fadd(total, value) if mean is None else b.call(fma(module, width), [value, value, total])
                    )
                return made

            return fold(b, const(0), positions, held, add, wide)

        totals = fold(b, first, last, [splat_float(0.0, width)] * len(places), add_channel)
        return b.fmul(united(b, totals, b.fadd), share)

    mean = averaged(None)
    root = ir.Function(module, ir.FunctionType(F32, [F32]), "llvm.sqrt.f32")
    deviation = b.call(root, [b.fadd(averaged(mean), float_field(b, get[Field.EPSILON]))])
    with loop(b, first, last) as channel:
        given, out = at(b, x, b.mul(channel, get[Field.X_CHANNEL])), at(b, y, b.mul(channel, get[Field.Y_CHANNEL]))
        scale = b.fdiv(b.load(at(b, weight, channel)), deviation)
        shift = b.load(at(b, bias, channel))
        with loop(b, const(0), positions, lanes) as position:
            away = b.fsub(load_vector(b, at(b, given, position), lanes), splat(b, mean, lanes))
            value = b.call(fma(module, lanes), [away, splat(b, scale, lanes), splat(b, shift, lanes)])
            store_vector(b, masked(b, value, at(b, mask, position), lanes), at(b, out, position), lanes)
        border = (positions, get[Field.BORDER], get[Field.BORDER_FIRST])
        clear_border(b, out, b.or_(image, channel), border)
    b.ret_void()
    return module
