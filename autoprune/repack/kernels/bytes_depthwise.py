"""Depthwise convolution of an interleaved map, a native op.

Four taps' vectors of lanes are interleaved byte by byte, so that a 32-bit lane holds four taps of one channel: what one
instruction multiplies by four weights and adds. It leaves the channels of a position side by side, and every fourth
position in one of four vectors of sums; within 128 bits all the while, as the instructions that interleave work.
"""

from __future__ import annotations

from collections.abc import Sequence

import llvmlite.ir as ir

from autoprune.repack.kernels.bytes_lanes import bounded, int_splat, ints, kept_bytes, whole_bytes
from autoprune.repack.kernels.bytes_window import RUN_ARGUMENTS, Field, every, fill_lanes, finish, sliding_op
from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.dot_products import dot, ready
from autoprune.repack.kernels.ir import (
    FLOATS,
    I32,
    INTS,
    at,
    clear_border,
    const,
    float_field,
    fma,
    fold,
    inner_function,
    load_vector,
    long_at,
    masked,
    module_of_bytes,
    pointer_field,
    splat,
    store_vector,
    vector,
)
from autoprune.repack.kernels.math import ACTIVATIONS, BYTE_ACTIVATIONS
from autoprune.repack.weights.quads import QUAD

_BLOCK = 128  # bits within which vectors are interleaved


@kernel
def depthwise_bytes(stride: int, rest: int, floats: bool, target: Target, activation: str = "") -> ir.Module:
    """The op; an item is some lane-channels of an image.

    Args:
        stride: from an output's input to the next output's, in columns.
        rest: taps beyond whole fours of them.
        floats: whether Y is a map of floats, not of bytes.
        target: what to compile for.
        activation: a row of ACTIVATIONS that is no clamp.
    """
    module = module_of_bytes(target.fused)

    def build(vectors: int) -> ir.Function:
        return _run(module, stride, rest, vectors, target, floats, activation)

    return sliding_op(module, stride, 2, build, _fill_floats if floats else fill_lanes, target)


def _run(
    module: ir.Module, stride: int, rest: int, vectors: int, target: Target, floats: bool, activation: str
) -> ir.Function:  # fmt: skip
    """`vectors` x lanes neighbouring results of a row, of four channels."""
    lanes = target.lanes
    function = inner_function(module, f"depthwise_{vectors}", RUN_ARGUMENTS)
    x, y, position, quad, fields = function.args
    b = ir.IRBuilder(function.append_basic_block("entry"))
    get = Field.load(b, fields)
    offsets, fours = pointer_field(b, get[Field.OFFSETS], INTS), get[Field.TAPS]
    every_four = b.add(fours, const(int(rest > 0)))
    weights = at(b, pointer_field(b, get[Field.WEIGHTS], INTS), b.mul(b.mul(quad, every_four), const(QUAD)))

    def add_four(four: ir.Value, sums: list[ir.Value], taps: int = QUAD) -> list[ir.Value]:
        first = b.mul(four, const(QUAD))
        sources = [at(b, x, long_at(b, offsets, b.add(first, const(tap)))) for tap in range(taps)]
        weight = repeated(b, load_vector(b, at(b, weights, first), QUAD), lanes)
        made = []
        for v in range(vectors):
            given = [every(b, at(b, source, const(v * lanes * stride)), stride, lanes) for source in sources]
            given = [ready(b, each, target) for each in given]
            given += [int_splat(0, lanes)] * (QUAD - taps)  # which meets no weight
            for part, each in enumerate(_interleaved(b, given, lanes)):
                made.append(dot(b, sums[v * QUAD + part], each, weight, target))
        return made

    start = int_splat(0, lanes)
    if target.signed:
        start = at(b, pointer_field(b, get[Field.START], INTS), b.mul(quad, const(QUAD)))
        start = repeated(b, load_vector(b, start, QUAD), lanes)
    sums = fold(b, const(0), fours, [start] * (QUAD * vectors), add_four)
    sums = add_four(fours, sums, rest) if rest else sums
    kept = splat(b, kept_bytes(b, quad, get[Field.CHANNELS]), lanes)
    for v in range(vectors):
        results = _real(b, module, get, quad, sums[v * QUAD : (v + 1) * QUAD], lanes, floats, activation)
        if not floats:
            finish(b, get, function, _narrowed(b, whole_bytes(b, results, lanes), lanes), v, lanes, kept)
            continue
        mask = at(b, pointer_field(b, get[Field.MASK], INTS), b.add(position, const(v * lanes)))
        for j, value in enumerate(_by_channel(b, results, lanes)):
            with b.if_then(b.icmp_signed("<", b.add(b.mul(quad, const(QUAD)), const(j)), get[Field.CHANNELS])):
                place = at(b, y, b.add(b.mul(get[Field.Y_CHANNEL], const(j)), const(v * lanes)))
                store_vector(b, masked(b, value, mask, lanes), place, lanes)
    b.ret_void()
    return function


def _real(
    b: ir.IRBuilder, module: ir.Module, get: dict[Field, ir.Value], quad: ir.Value, sums: Sequence[ir.Value],
    lanes: int, floats: bool, activation: str,
) -> list[ir.Value]:  # fmt: skip
    """Sums as floats, through the activation, clamped; in steps where they become bytes."""
    low, high = (splat(b, float_field(b, get[each]), lanes) for each in (Field.LOW, Field.HIGH))
    first, multiply = b.mul(quad, const(QUAD)), fma(module, lanes)
    factor, bias = (
        repeated(b, load_vector(b, at(b, pointer_field(b, get[field], FLOATS), first), QUAD), lanes)
        for field in (Field.FACTOR, Field.BIAS)
    )
    made = []
    for total in sums:
        value = b.call(multiply, [b.sitofp(total, vector(lanes)), factor, bias])
        if activation:
            value = (ACTIVATIONS if floats else BYTE_ACTIVATIONS)[activation](b, module, value, lanes)
        if activation and not floats:
            ends = [splat(b, float_field(b, get[each]), lanes) for each in (Field.INVERSE, Field.OUTPUT_ZERO)]
            value = b.call(multiply, [value, *ends])
        made.append(bounded(b, value, low, high))
    return made


def repeated(b: ir.IRBuilder, four: ir.Value, lanes: int) -> ir.Value:
    """Four entries again and again, as many as `lanes`."""
    places = ir.Constant(ir.VectorType(I32, lanes), [lane % QUAD for lane in range(lanes)])
    return b.shuffle_vector(four, ir.Constant(four.type, ir.Undefined), places)


def _chosen(
    b: ir.IRBuilder, pair: Sequence[ir.Value], bits: int, places: Sequence[tuple[int, int]], lanes: int
) -> ir.Value:  # fmt: skip
    """Of each 128 bits of two vectors, entries of `bits`: (which vector, which entry)."""
    kind, block = ir.VectorType(ir.IntType(bits), 32 * lanes // bits), _BLOCK // bits
    every = [side * kind.count + start + entry for start in range(0, kind.count, block) for side, entry in places]
    one, other = (b.bitcast(each, kind) for each in pair)
    return b.bitcast(b.shuffle_vector(one, other, ir.Constant(ir.VectorType(I32, kind.count), every)), ints(lanes))


def _merged(b: ir.IRBuilder, pair: Sequence[ir.Value], bits: int, upper: bool, lanes: int) -> ir.Value:
    """Of each 128 bits, entries of `bits` of the lower or upper half of both, in turn."""
    half = _BLOCK // bits // 2
    places = [(side, half * upper + entry) for entry in range(half) for side in (0, 1)]
    return _chosen(b, pair, bits, places, lanes)


def _interleaved(b: ir.IRBuilder, given: Sequence[ir.Value], lanes: int) -> list[ir.Value]:
    """Four vectors' bytes in turn: vector k holds position 4 i + k of each 128 bits, a lane a channel."""
    made = []
    for upper in (False, True):
        pairs = [_merged(b, given[two : two + 2], 8, upper, lanes) for two in (0, 2)]
        made += [_merged(b, pairs, 16, half, lanes) for half in (False, True)]
    return made


def _narrowed(b: ir.IRBuilder, values: Sequence[ir.Value], lanes: int) -> ir.Value:
    """Four vectors of int32s of one byte each, laid out as sums are, as one of lanes in order."""

    def even(pair: Sequence[ir.Value], bits: int) -> ir.Value:
        places = [(side, entry) for side in (0, 1) for entry in range(0, _BLOCK // bits, 2)]
        return _chosen(b, pair, bits, places, lanes)

    return even([even(values[two : two + 2], 16) for two in (0, 2)], 8)


def _by_channel(b: ir.IRBuilder, values: Sequence[ir.Value], lanes: int) -> list[ir.Value]:
    """Four vectors of floats laid out as sums are, as one a channel, its positions in order."""
    made = []
    for upper in (False, True):
        pairs = [_merged(b, values[k::2], 32, upper, lanes) for k in (0, 1)]
        made += [_merged(b, pairs, 32, half, lanes) for half in (False, True)]
    return [b.bitcast(each, vector(lanes)) for each in made]


def _fill_floats(
    b: ir.IRBuilder, get: dict[Field, ir.Value], out: ir.Value, quad: ir.Value, image: ir.Value
) -> None:  # fmt: skip
    """The border of each channel that there is."""
    border = (get[Field.POSITIONS], get[Field.BORDER], get[Field.BORDER_FIRST])
    for j in range(QUAD):
        channel = b.add(b.mul(quad, const(QUAD)), const(j))
        with b.if_then(b.icmp_signed("<", channel, get[Field.CHANNELS])):
            into = at(b, out, b.mul(get[Field.Y_CHANNEL], const(j)))
            clear_border(b, into, b.or_(image, channel), border, float_field(b, get[Field.BORDER_VALUE]))
