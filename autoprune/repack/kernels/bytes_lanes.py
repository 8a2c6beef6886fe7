"""Words of LLVM IR for interleaved maps: four bytes of neighbouring channels in a 32-bit lane.

A map (C, H, W) is stored as ceil(C / 4) lane-channels; byte j of a lane of lane-channel q, from the lowest bits up, is
channel 4 q + j. Its border holds the zero point in each byte. Vectors of lanes are made of four vectors of floats, and
taken apart again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import llvmlite.ir as ir
import numpy as np

from autoprune.repack.kernels.ir import F32, I8, I32, at, const, loop, masked_load, masked_store, splat, vector
from autoprune.repack.weights.quads import QUAD

_ROUNDER = 12582912.0  # 1.5 * 2**23: adding it rounds half to even, and leaves the integer in the low bits
_ROUNDER_BITS = 0x4B400000
_SPREAD = 0x01010101  # times a byte: that byte in all four places
_WORD = 1 << 32


def ints(lanes: int) -> ir.Type:
    """``lanes`` int32s; a plain one for one lane."""
    return ir.VectorType(I32, lanes) if lanes > 1 else I32


def int_splat(value: int, lanes: int) -> ir.Constant:
    """A constant in every lane; taken modulo 2**32."""
    scalar = ir.Constant(I32, value % _WORD)
    return scalar if lanes == 1 else ir.Constant(ints(lanes), [scalar] * lanes)


def unpacked(b: ir.IRBuilder, value: ir.Value, lanes: int) -> list[ir.Value]:
    """The four bytes of each lane, 0 to 255, as four vectors of int32."""
    low = int_splat(255, lanes)
    parts = [b.lshr(value, int_splat(8 * j, lanes)) if j else value for j in range(QUAD)]
    return [*(b.and_(part, low) for part in parts[:-1]), parts[-1]]


def unpacked_floats(b: ir.IRBuilder, value: ir.Value, lanes: int) -> list[ir.Value]:
    """The four bytes of each lane as four vectors of float32."""
    return [b.sitofp(part, vector(lanes)) for part in unpacked(b, value, lanes)]


def bounded(b: ir.IRBuilder, value: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    """Between `low` and `high`; NaN becomes `low`."""
    value = b.select(b.fcmp_ordered(">", value, low), value, low)
    return b.select(b.fcmp_ordered("<", value, high), value, high)


def rounded(b: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """Floats up to 2**22 from zero as integers, half to even, in the low bits: the bits of `_ROUNDER` are added."""
    scalar = ir.Constant(F32, _ROUNDER)
    rounder = scalar if lanes == 1 else ir.Constant(vector(lanes), [scalar] * lanes)
    return b.bitcast(b.fadd(value, rounder), ints(lanes))


def packed(b: ir.IRBuilder, values: Sequence[ir.Value], zeros: ir.Value | None, lanes: int) -> ir.Value:
    """Lanes of four vectors of float32, each rounded half to even, plus a zero point.

    Args:
        b: builder.
        values: at least -zero point and at most 255 - zero point, so that no byte carries into the next.
        zeros: the zero point in all four places, in every lane; None: 0.
        lanes: of the vectors.
    """
    total, rest = None, 0
    for j, value in enumerate(values):
        bits = rounded(b, value, lanes)
        part = b.shl(bits, int_splat(8 * j, lanes)) if j else bits
        total = part if total is None else b.add(total, part)
        rest += _ROUNDER_BITS << 8 * j
    total = b.add(total, int_splat(-rest, lanes))
    return total if zeros is None else b.add(total, zeros)


def rounded_bytes(b: ir.IRBuilder, values: Sequence[ir.Value], zeros: ir.Value, lanes: int) -> ir.Value:
    """Lanes of four vectors of float32 that follow each other: the first `lanes` bytes are those of the first vector.

    Bounds, rounding and the zero point are those of `packed`.
    """
    narrow = [b.trunc(rounded(b, value, lanes), ir.VectorType(I8, lanes)) for value in values]
    while len(narrow) > 1:
        count = 2 * narrow[0].type.count
        whole = ir.Constant(ir.VectorType(I32, count), list(range(count)))
        narrow = [b.shuffle_vector(one, other, whole) for one, other in zip(narrow[::2], narrow[1::2], strict=True)]
    return b.bitcast(b.add(narrow[0], b.bitcast(zeros, narrow[0].type)), ints(lanes))


def whole_bytes(b: ir.IRBuilder, values: Sequence[ir.Value], lanes: int) -> list[ir.Value]:
    """Vectors of float32 between 0 and 255 as int32s, rounded half to even."""
    return [b.and_(rounded(b, value, lanes), int_splat(255, lanes)) for value in values]


def spread(b: ir.IRBuilder, byte: ir.Value) -> ir.Value:
    """A zero point, an i64 field, as the lane that holds it four times."""
    return b.mul(b.trunc(byte, I32), ir.Constant(I32, _SPREAD))


def lane_of(byte: int) -> int:
    """The lane that holds a byte, 0 to 255, four times; as the int32 it is."""
    return int(np.full(QUAD, byte, np.uint8).view(np.int32)[0])


def steps_from(b: ir.IRBuilder, start: ir.Value, lanes: int) -> ir.Value:
    """``start, start + 1, ...`` as int32s, from an i64."""
    first = splat(b, b.trunc(start, I32), lanes)
    return first if lanes == 1 else b.add(first, ir.Constant(ints(lanes), list(range(lanes))))


def load_lanes(b: ir.IRBuilder, pointer: ir.Value, lanes: int) -> ir.Value:
    """A vector of lanes; `pointer` is to floats."""
    loaded = b.load(b.bitcast(pointer, ints(lanes).as_pointer()))
    loaded.align = 4
    return loaded


def store_lanes(b: ir.IRBuilder, value: ir.Value, pointer: ir.Value, lanes: int) -> None:
    """Stores a vector of lanes; `pointer` is to floats."""
    stored = b.store(value, b.bitcast(pointer, ints(lanes).as_pointer()))
    stored.align = 4


def floats_where(
    b: ir.IRBuilder, module: ir.Module, line: ir.Value, start: ir.Value, width: ir.Value, lanes: int
) -> tuple[ir.Value, ir.Value]:
    """``line[start : start + lanes]``, 0.0 outside of ``range(width)``, which is not touched; and the bits inside.

    `start` is an i64, `width` an int32 in every lane.
    """
    inside = b.icmp_unsigned("<", steps_from(b, start, lanes), width)
    if lanes > 1:
        return masked_load(b, module, at(b, line, start), inside, lanes), inside
    before = b.block
    with b.if_then(inside):
        loaded, within = b.load(at(b, line, start)), b.block
    value = b.phi(F32)
    value.add_incoming(ir.Constant(F32, 0.0), before)
    value.add_incoming(loaded, within)
    return value, inside


def lanes_where(
    b: ir.IRBuilder, module: ir.Module, line: ir.Value, start: ir.Value, width: ir.Value, border: ir.Value, lanes: int
) -> ir.Value:  # fmt: skip
    """Like `floats_where`, lanes, with `border` outside."""
    value, inside = floats_where(b, module, line, start, width, lanes)
    return b.select(inside, b.bitcast(value, ints(lanes)), border)


Store = Callable[[ir.Value, ir.Value], None]
"""Stores a vector of floats, or of lanes, at a pointer to floats."""


def across(
    b: ir.IRBuilder, module: ir.Module, length: ir.Value, lanes: int, body: Callable[[ir.Value, Store], None]
) -> None:
    """``body(position, store)`` for each vector of ``range(length)``; the last one stores no more than is left."""
    whole = b.sub(length, b.srem(length, const(lanes)))

    def plain(value: ir.Value, pointer: ir.Value) -> None:
        store_lanes(b, b.bitcast(value, ints(lanes)), pointer, lanes)

    with loop(b, const(0), whole, lanes) as position:
        body(position, plain)
    if lanes == 1:
        return
    with b.if_then(b.icmp_signed("<", whole, length)):
        few = b.icmp_unsigned("<", steps_from(b, const(0), lanes), splat(b, b.trunc(b.sub(length, whole), I32), lanes))

        def some(value: ir.Value, pointer: ir.Value) -> None:
            masked_store(b, module, b.bitcast(value, vector(lanes)), pointer, few, lanes)

        body(whole, some)


def bordered(b: ir.IRBuilder, value: ir.Value, kept: ir.Value, border: ir.Value) -> ir.Value:
    """The bits of `value` where those of `kept` are set, of `border` elsewhere; vectors of lanes all three."""
    return b.or_(b.and_(value, kept), b.and_(border, b.not_(kept)))


def kept_bytes(b: ir.IRBuilder, quad: ir.Value, channels: ir.Value) -> ir.Value:
    """-1 but for bytes that no channel has, in the last of `channels` / 4 lanes; an int32."""
    missing = b.sub(b.mul(b.add(quad, const(1)), const(QUAD)), channels)
    some = b.lshr(ir.Constant(I32, -1), b.trunc(b.mul(missing, const(8)), I32))
    return b.select(b.icmp_signed(">", missing, const(0)), some, ir.Constant(I32, -1))
