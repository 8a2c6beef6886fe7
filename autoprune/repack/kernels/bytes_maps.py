"""Native ops on whole interleaved maps: the mean of each channel."""

from __future__ import annotations

import llvmlite.ir as ir

from autoprune.repack.kernels.bytes_lanes import int_splat, ints, load_lanes, unpacked
from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import FLOAT, INT32_ARRAY, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    F32,
    I32,
    INTS,
    address,
    at,
    const,
    float_field,
    fold,
    loop,
    op_function,
    pointer_field,
    smaller,
)
from autoprune.repack.weights.quads import QUAD


class MeanField(Fields):
    """Entries of the int64 array that describes one mean; sizes in lanes, which are as long as floats."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET  # of position (0, 0) in lane-channel 0
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    X_IMAGE = NUMBER
    X_QUAD = NUMBER
    Y_IMAGE = NUMBER
    Y_CHANNEL = NUMBER
    POSITIONS = NUMBER  # those on the border between rows counted
    MASK = INT32_ARRAY  # per position: -1 inside the map, 0 on its border
    CHANNELS = NUMBER
    QUADS = NUMBER
    CHUNK = NUMBER  # lane-channels an item
    CHUNKS = NUMBER
    SUM_ZERO = NUMBER  # what the zero points of a channel sum to
    SCALE = FLOAT  # of a channel's sum


@kernel
def byte_means(target: Target) -> ir.Module:
    """Each channel's exact sum, without the zero points, times SCALE: a float a channel.

    An item is some lane-channels of an image.
    """
    module, lanes, f = ir.Module(), target.lanes, MeanField
    b, fields, slots, item, _ = op_function(module)
    get = f.load(b, fields)
    chunk, image = b.srem(item, get[f.CHUNKS]), b.sdiv(item, get[f.CHUNKS])
    x = at(b, address(b, slots, get[f.X_SLOT], get[f.X_OFFSET]), b.mul(image, get[f.X_IMAGE]))
    y = at(b, address(b, slots, get[f.Y_SLOT], get[f.Y_OFFSET]), b.mul(image, get[f.Y_IMAGE]))
    mask, scale = pointer_field(b, get[f.MASK], INTS), float_field(b, get[f.SCALE])
    first = b.mul(chunk, get[f.CHUNK])
    with loop(b, first, smaller(b, b.add(first, get[f.CHUNK]), get[f.QUADS])) as quad:
        plane = at(b, x, b.mul(quad, get[f.X_QUAD]))

        def add(position: ir.Value, totals: list[ir.Value], plane: ir.Value = plane) -> list[ir.Value]:
            inside = load_lanes(b, at(b, mask, position), lanes)
            given = b.and_(load_lanes(b, at(b, plane, position), lanes), inside)
            return [b.add(total, part) for total, part in zip(totals, unpacked(b, given, lanes), strict=True)]

        totals = fold(b, const(0), get[f.POSITIONS], [int_splat(0, lanes)] * QUAD, add, lanes)
        for j, total in enumerate(totals):
            channel = b.add(b.mul(quad, const(QUAD)), const(j))
            with b.if_then(b.icmp_signed("<", channel, get[f.CHANNELS])):
                whole = b.sub(_summed(b, module, total, lanes), b.trunc(get[f.SUM_ZERO], I32))
                b.store(b.fmul(b.sitofp(whole, F32), scale), at(b, y, b.mul(channel, get[f.Y_CHANNEL])))
    b.ret_void()
    return module


def _summed(b: ir.IRBuilder, module: ir.Module, value: ir.Value, lanes: int) -> ir.Value:
    name = f"llvm.vector.reduce.add.v{lanes}i32"
    function = module.globals.get(name) or ir.Function(module, ir.FunctionType(I32, [ints(lanes)]), name)
    return b.call(function, [value])
