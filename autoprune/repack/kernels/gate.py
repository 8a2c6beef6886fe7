"""The gate of a convolution as one native op: the mean size of each channel, a small Linear, ReLU, the winners."""

from __future__ import annotations

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import FLOAT, FLOAT32_ARRAY, INT32_ARRAY, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    F32,
    FLOATS,
    I32,
    I64,
    INTS,
    address,
    at,
    const,
    float_field,
    fold,
    load_vector,
    loop,
    masked,
    op_function,
    pointer_field,
    vector,
)
from autoprune.repack.kernels.sums import PARTS

TOGETHER = 4  # channels whose sums are in flight at once


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes in floats."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET  # of position (0, 0) in channel 0
    X_IMAGE = NUMBER
    X_CHANNEL = NUMBER
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    SCRATCH_SLOT = SLOT
    SCRATCH_OFFSET = OFFSET
    SCRATCH = NUMBER  # from a thread's scratch to the next: see `scratch`
    POSITIONS = NUMBER
    CHANNELS = NUMBER
    MASK = INT32_ARRAY  # per position: -1 inside the map, 0 on its border
    WEIGHT = FLOAT32_ARRAY  # (groups, CHANNELS up to whole vectors), zeros behind the last channel
    COLUMNS = NUMBER  # of it
    BIAS = FLOAT32_ARRAY
    SCALE = FLOAT  # of a channel's sum
    GROUPS = NUMBER
    THRESHOLD = FLOAT  # the least that wins
    KEEP = NUMBER  # so many of the largest win; GROUPS: all


def columns(channels: int) -> int:
    """Channels up to whole vectors of partial sums."""
    return -(-channels // PARTS) * PARTS


def scratch(channels: int, groups: int) -> int:
    """Floats of scratch a thread needs."""
    return columns(channels) + groups


@kernel
def gate(target: Target) -> ir.Module:
    """The op; an item is an image."""
    module = ir.Module()
    b, fields, slots, image, thread = op_function(module)
    get = Field.load(b, fields)
    x = at(b, address(b, slots, get[Field.X_SLOT], get[Field.X_OFFSET]), b.mul(image, get[Field.X_IMAGE]))
    y = at(b, address(b, slots, get[Field.Y_SLOT], get[Field.Y_OFFSET]), b.mul(image, get[Field.GROUPS]))
    means = address(b, slots, get[Field.SCRATCH_SLOT], get[Field.SCRATCH_OFFSET])
    means = at(b, means, b.mul(thread, get[Field.SCRATCH]))
    scores = at(b, means, get[Field.COLUMNS])
    _means(b, get, x, means)
    _scores(b, get, means, scores)
    _winners(b, get, scores, y)
    b.ret_void()
    return module


def _total(b: ir.IRBuilder, sums: ir.Value) -> ir.Value:
    total = b.extract_element(sums, const(0))
    for lane in range(1, PARTS):
        total = b.fadd(total, b.extract_element(sums, const(lane)))
    return total


def _means(b: ir.IRBuilder, get: dict[Field, ir.Value], x: ir.Value, means: ir.Value) -> None:
    """The mean size of each channel; behind the last one, zeros."""
    mask, scale = pointer_field(b, get[Field.MASK], INTS), float_field(b, get[Field.SCALE])
    sign = ir.Constant(ir.VectorType(I32, PARTS), [0x7FFFFFFF] * PARTS)
    final = b.sub(get[Field.CHANNELS], const(1))
    with loop(b, const(0), get[Field.COLUMNS], TOGETHER) as channel:
        numbers = [b.add(channel, const(each)) for each in range(TOGETHER)]
        real = [b.icmp_signed("<=", number, final) for number in numbers]
        planes = [
            at(b, x, b.mul(b.select(fine, number, final), get[Field.X_CHANNEL]))
            for number, fine in zip(numbers, real, strict=True)
        ]

        def add(position: ir.Value, sums: list[ir.Value], planes: list[ir.Value] = planes) -> list[ir.Value]:
            made = []
            for total, plane in zip(sums, planes, strict=True):
                value = masked(b, load_vector(b, at(b, plane, position), PARTS), at(b, mask, position), PARTS)
                size = b.bitcast(b.and_(b.bitcast(value, ir.VectorType(I32, PARTS)), sign), vector(PARTS))
                made.append(b.fadd(total, size))
            return made

        nothing = [ir.Constant(vector(PARTS), None)] * TOGETHER
        sums = fold(b, const(0), get[Field.POSITIONS], nothing, add, PARTS)
        for number, fine, each in zip(numbers, real, sums, strict=True):
            mean = b.fmul(_total(b, each), scale)
            b.store(b.select(fine, mean, ir.Constant(F32, 0.0)), at(b, means, number))


def _scores(b: ir.IRBuilder, get: dict[Field, ir.Value], means: ir.Value, scores: ir.Value) -> None:
    """relu(weight @ means + bias)."""
    weight, bias = (pointer_field(b, get[field], FLOATS) for field in (Field.WEIGHT, Field.BIAS))
    zero = ir.Constant(F32, 0.0)
    with loop(b, const(0), get[Field.GROUPS]) as group:
        row = at(b, weight, b.mul(group, get[Field.COLUMNS]))

        def add(column: ir.Value, sums: list[ir.Value], row: ir.Value = row) -> list[ir.Value]:
            product = b.fmul(load_vector(b, at(b, row, column), PARTS), load_vector(b, at(b, means, column), PARTS))
            return [b.fadd(sums[0], product)]

        (sums,) = fold(b, const(0), get[Field.COLUMNS], [ir.Constant(vector(PARTS), None)], add, PARTS)
        score = b.fadd(_total(b, sums), b.load(at(b, bias, group)))
        b.store(b.select(b.fcmp_ordered("<", score, zero), zero, score), at(b, scores, group))


def _winners(b: ir.IRBuilder, get: dict[Field, ir.Value], scores: ir.Value, y: ir.Value) -> None:
    """Each score that is at least the threshold and that fewer than KEEP others exceed; zero in place of the rest."""
    threshold = float_field(b, get[Field.THRESHOLD])
    with loop(b, const(0), get[Field.GROUPS]) as group:
        score = b.load(at(b, scores, group))

        def count(other: ir.Value, larger: list[ir.Value], score: ir.Value = score) -> list[ir.Value]:
            exceeds = b.fcmp_ordered(">", b.load(at(b, scores, other)), score)
            return [b.add(larger[0], b.zext(exceeds, I64))]

        (larger,) = fold(b, const(0), get[Field.GROUPS], [const(0)], count)
        wins = b.and_(b.fcmp_ordered(">=", score, threshold), b.icmp_signed("<", larger, get[Field.KEEP]))
        b.store(b.select(wins, score, ir.Constant(F32, 0.0)), at(b, y, group))
