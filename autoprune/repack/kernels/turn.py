"""Turns rows of features into a plane a feature, native ops: into it, and out again with a residual and an activation.

A Linear over many tokens is a convolution by one position: in planes, a vector holds neighbouring tokens. Blocks of
lanes by lanes are turned in registers (Eklundh 1972): in step s, vectors s apart exchange the halves of every 2s lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import llvmlite.ir as ir

from autoprune.repack.kernels import bf16
from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import FLOAT, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    I32,
    address,
    at,
    clamp,
    const,
    float_field,
    load_vector,
    loop,
    op_function,
    smaller,
    splat,
    store_vector,
)
from autoprune.repack.kernels.math import ACTIVATIONS


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes in floats."""

    ROWS_SLOT = SLOT
    ROWS_OFFSET = OFFSET
    ROWS_TOKEN = NUMBER  # from a token to the next
    PLANES_SLOT = SLOT
    PLANES_OFFSET = OFFSET
    PLANES_FEATURE = NUMBER  # from a feature's plane to the next
    TOKENS = NUMBER
    FEATURES = NUMBER
    RESIDUAL_SLOT = SLOT.of("residual")
    RESIDUAL_OFFSET = OFFSET.of("residual")
    RESIDUAL_TOKEN = NUMBER.of("residual")
    LOW = FLOAT.of("out of planes")  # results are clamped
    HIGH = FLOAT.of("out of planes")


@kernel
def into_planes(target: Target, rounds: bool = False) -> ir.Module:
    """The op; an item is as many tokens as a vector has lanes. A plane is filled to whole vectors.

    Where it `rounds`, to bfloat16 numbers.
    """
    module, lanes = ir.Module(), target.lanes
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    rows = address(b, slots, get[Field.ROWS_SLOT], get[Field.ROWS_OFFSET])
    planes = address(b, slots, get[Field.PLANES_SLOT], get[Field.PLANES_OFFSET])
    first, tokens, features = b.mul(item, const(lanes)), get[Field.TOKENS], get[Field.FEATURES]
    whole = b.sub(features, b.srem(features, const(lanes)))
    lines = []
    for i in range(lanes):  # the last token stands for those behind it
        token = smaller(b, b.add(first, const(i)), b.sub(tokens, const(1)))
        lines.append(at(b, rows, b.mul(token, get[Field.ROWS_TOKEN])))
    with loop(b, const(0), whole, lanes) as feature:
        block = [load_vector(b, at(b, line, feature), lanes) for line in lines]
        for i, turned in enumerate(turned_block(b, block)):
            plane = b.mul(b.add(feature, const(i)), get[Field.PLANES_FEATURE])
            turned = bf16.rounded(b, turned, lanes) if rounds else turned
            store_vector(b, turned, at(b, planes, b.add(plane, first)), lanes)
    end = smaller(b, b.add(first, const(lanes)), tokens)
    with loop(b, whole, features) as feature, loop(b, first, end) as token:
        value = b.load(at(b, rows, b.add(b.mul(token, get[Field.ROWS_TOKEN]), feature)))
        value = bf16.rounded(b, value, 1) if rounds else value
        b.store(value, at(b, planes, b.add(b.mul(feature, get[Field.PLANES_FEATURE]), token)))
    b.ret_void()
    return module


@dataclass(frozen=True)
class Ending:
    """What is done to rows that come out of planes, in this order.

    Attributes:
        residual: whether one is added.
        clamps: whether results are clamped.
        activation: a row of ACTIVATIONS that is no clamp.
    """

    residual: bool = False
    clamps: bool = False
    activation: str = ""


@kernel
def out_of_planes(target: Target, ending: Ending = Ending()) -> ir.Module:
    """The op; an item is as many tokens as a vector has lanes."""
    module, lanes = ir.Module(), target.lanes
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    rows = address(b, slots, get[Field.ROWS_SLOT], get[Field.ROWS_OFFSET])
    planes = address(b, slots, get[Field.PLANES_SLOT], get[Field.PLANES_OFFSET])
    residual = address(b, slots, get[Field.RESIDUAL_SLOT], get[Field.RESIDUAL_OFFSET])
    low, high = float_field(b, get[Field.LOW]), float_field(b, get[Field.HIGH])
    first, features = b.mul(item, const(lanes)), get[Field.FEATURES]
    whole = b.sub(features, b.srem(features, const(lanes)))
    end = smaller(b, b.add(first, const(lanes)), get[Field.TOKENS])

    def finish(value: ir.Value, token: ir.Value, feature: ir.Value, width: int) -> None:
        """Some neighbouring features of a token."""
        if ending.residual:
            line = at(b, residual, b.add(b.mul(token, get[Field.RESIDUAL_TOKEN]), feature))
            value = b.fadd(value, load_vector(b, line, width))
        if ending.clamps:
            value = clamp(b, value, splat(b, low, width), splat(b, high, width))
        if ending.activation:
            value = ACTIVATIONS[ending.activation](b, module, value, width)
        store_vector(b, value, at(b, rows, b.add(b.mul(token, get[Field.ROWS_TOKEN]), feature)), width)

    def turn(all_inside: bool) -> None:
        with loop(b, const(0), whole, lanes) as feature:
            block = []
            for i in range(lanes):
                plane = b.mul(b.add(feature, const(i)), get[Field.PLANES_FEATURE])
                block.append(load_vector(b, at(b, planes, b.add(plane, first)), lanes))
            for i, turned in enumerate(turned_block(b, block)):
                token = b.add(first, const(i))
                if all_inside:
                    finish(turned, token, feature, lanes)
                else:
                    with b.if_then(b.icmp_signed("<", token, end)):
                        finish(turned, token, feature, lanes)

    with b.if_else(b.icmp_signed("==", b.sub(end, first), const(lanes))) as (inside, beyond):
        with inside:
            turn(all_inside=True)
        with beyond:
            turn(all_inside=False)
    with loop(b, whole, features) as feature, loop(b, first, end) as token:
        plane = b.mul(feature, get[Field.PLANES_FEATURE])
        finish(load_vector(b, at(b, planes, b.add(plane, token)), 1), token, feature, 1)
    b.ret_void()
    return module


def turned_block(b: ir.IRBuilder, block: list[ir.Value]) -> list[ir.Value]:
    """Lane j of vector i becomes lane i of vector j."""
    lanes, step = len(block), 1
    while step < lanes:
        low = [lane if not lane & step else lanes + lane - step for lane in range(lanes)]
        high = [lanes + lane if lane & step else lane + step for lane in range(lanes)]
        made = list(block)
        for i in range(lanes):
            if not i & step:
                pair = block[i], block[i + step]
                made[i], made[i + step] = (
                    b.shuffle_vector(*pair, ir.Constant(ir.VectorType(I32, lanes), picked)) for picked in (low, high)
                )
        block, step = made, 2 * step
    return block
