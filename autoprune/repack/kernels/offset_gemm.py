"""Group-wise sparse convolution as an offset-GEMM, a native op.

With the zero border stored around a feature map, the weight at (channel, dy, dx) reads the same flat array at a
constant offset for every output position, so there is no im2col, no gather, and no zero to skip. The rows of a
group by some vectors of positions stay in registers while k walks the group's kept positions. Results lie in an
array of the same pitch as the input's, so that a tile is stored as it is; a mask clears what falls on the border.

An item is some groups by some positions of one image. How many, and which runs fastest, is tuned: few positions by
all groups keep the input in the nearest cache, few groups by all positions the weights.

With panels, a group is led past all positions of an item some inputs at a time: what it reads of a panel stays in the
nearest cache until the last tile is done with it (after Goto & van de Geijn 2008). The sums lie in scratch between one
panel and the next.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, compile_op, once_a_process
from autoprune.repack.kernels.ir import (
    F32,
    FLOATS,
    I32,
    I64,
    INTS,
    LONGS,
    address,
    at,
    clamp,
    const,
    float_field,
    fma,
    inner_function,
    load_vector,
    long_at,
    loop,
    masked,
    op_function,
    pointer_field,
    prefetch,
    smaller,
    splat,
    store_vector,
    vector,
)
from autoprune.repack.kernels.math import ACTIVATIONS

CARRY_IN, CARRY_OUT = 1, 2  # bits: sums go on from a panel before; to a panel after


class Field(IntEnum):
    """Entries of the int64 array that describes one op."""

    X_SLOT = 0
    X_OFFSET = 1  # bytes, of the first image's position (0, 0) in channel 0
    Y_SLOT = 2
    Y_OFFSET = 3
    RESIDUAL_SLOT = 4
    RESIDUAL_OFFSET = 5
    RESIDUAL = 6  # 1 when there is one
    X_IMAGE = 7  # floats from an image to the next
    Y_IMAGE = 8
    RESIDUAL_IMAGE = 9
    MASK = 10  # address of int32 a position: -1 inside the map, 0 on its border
    GROUP_POINTER = 11  # address of int32 a group: its first kept position; with panels, a group and panel
    OFFSETS = 12  # address of int32 a kept position: floats from an output position to what it reads
    VALUES = 13
    BIAS = 14
    Y_CHANNEL = 15  # address of int32 a row: floats from Y to the row's channel
    RESIDUAL_CHANNEL = 16
    LOW = 17  # float bits: results are clamped
    HIGH = 18
    GROUPS = 19
    POSITIONS = 20
    CHUNK = 21  # groups an item
    BLOCK = 22  # positions an item
    CHUNKS = 23
    BLOCKS = 24
    BATCH = 25
    CHUNK_STRIDE = 26  # items from a chunk to the next
    BLOCK_STRIDE = 27
    IMAGE_STRIDE = 28
    SCRATCH_SLOT = 29  # from here on: with panels alone
    SCRATCH_OFFSET = 30
    SCRATCH = 31  # floats from a thread's scratch to the next: see `scratch`
    PANELS = 32


def tiles(rows: int, target: Target) -> dict[int, int]:
    """Vectors of positions -> rows of the register tile that computes them, for groups of `rows` filters."""
    _, widest = target.tile(rows)
    registers = 32 if target.lanes == 16 else 16

    def height(count: int) -> int:
        fitting = [each for each in (1, 2, 4, 8, 16) if each * count + count + 1 <= registers]
        return min(rows, fitting[-1] if fitting else 1)

    return {count: height(count) for count in range(1, widest + 1)}


@once_a_process
def offset_gemm(rows: int, target: Target, activation: str = "", panels: bool = False) -> int:
    """The op for groups of `rows` filters; compiled once a process.

    Args:
        rows: filters in a group.
        target: what to compile for.
        activation: a row of ACTIVATIONS that is no clamp.
        panels: whether a group's inputs are cut into panels.
    """
    return compile_op(offset_gemm_module(rows, target, activation, panels), "op", target)


def offset_gemm_module(rows: int, target: Target, activation: str = "", panels: bool = False) -> ir.Module:
    """The op, not yet compiled."""
    module = ir.Module()
    built = {count: tile(module, each, count, target.lanes, activation) for count, each in tiles(rows, target).items()}
    _op(module, rows, built, tiles(rows, target), target.lanes, panels)
    return module


def tile(module: ir.Module, rows: int, vectors: int, lanes: int, activation: str, gated: bool = False) -> ir.Function:
    """`rows` filters by `vectors` x `lanes` positions: sums, residual, clamp, mask, store.

    Sums start from the bias, or where `carry` says so from what the panel before left in `partial`; they end in the
    output, or there. Where `gated`, two more arguments follow: the `kept` positions to walk, each its offset and, 32
    bits up, where its weights lie; and a factor a row, which its sum is multiplied by.
    """
    kinds = [FLOATS, INTS, I64, FLOATS, I64, FLOATS, FLOATS, INTS, FLOATS, INTS, I64, INTS, F32, F32, FLOATS, I64]
    function = inner_function(module, f"tile_{rows}x{vectors}", [*kinds, LONGS, FLOATS] if gated else kinds)
    (x, offsets, kept, w, pitch, bias, y, y_channel, residual, residual_channel, has_residual, mask, low, high,
     partial, carry, *gate) = function.args  # fmt: skip
    fused = fma(module, lanes)
    entry, head, body, done = (function.append_basic_block(name) for name in ("entry", "head", "body", "done"))
    add, finish = (function.append_basic_block(name) for name in ("add", "finish"))
    b = ir.IRBuilder(entry)
    for row in range(rows):  # written long after: no store has to wait for its cache line
        line = at(b, y, long_at(b, y_channel, const(row)))
        for v in range(0, vectors * lanes, 16):
            prefetch(b, module, at(b, line, const(v)), write=True)
    fresh, carried = (function.append_basic_block(name) for name in ("fresh", "carried"))
    b.cbranch(b.icmp_signed("==", b.and_(carry, const(CARRY_IN)), const(0)), fresh, carried)
    b.position_at_end(fresh)
    start = [splat(b, b.load(at(b, bias, const(row))), lanes) for row in range(rows)]
    b.branch(head)
    b.position_at_end(carried)
    places = [[at(b, partial, const((row * vectors + v) * lanes)) for v in range(vectors)] for row in range(rows)]
    before = [[load_vector(b, place, lanes) for place in line] for line in places]
    b.branch(head)
    b.position_at_end(head)
    k = b.phi(I64)
    k.add_incoming(const(0), fresh)
    k.add_incoming(const(0), carried)
    sums = [[b.phi(vector(lanes)) for _ in range(vectors)] for _ in range(rows)]
    for row, first in enumerate(start):
        for v, each in enumerate(sums[row]):
            each.add_incoming(first, fresh)
            each.add_incoming(before[row][v], carried)
    b.cbranch(b.icmp_signed("<", k, kept), body, done)
    b.position_at_end(body)
    entry_ = b.load(at(b, gate[0], k)) if gated else None
    source = at(b, x, long_at(b, offsets, k) if entry_ is None else b.sext(b.trunc(entry_, I32), I64))
    inputs = [load_vector(b, at(b, source, const(lanes * v)), lanes) for v in range(vectors)]
    weights = at(b, w, b.mul(k, pitch) if entry_ is None else b.ashr(entry_, const(32)))
    for row in range(rows):
        weight = splat(b, b.load(at(b, weights, const(row))), lanes)
        for v in range(vectors):
            sums[row][v].add_incoming(b.call(fused, [inputs[v], weight, sums[row][v]]), body)
    k.add_incoming(b.add(k, const(1)), body)
    b.branch(head)

    b.position_at_end(done)
    keep, give = (function.append_basic_block(name) for name in ("keep", "give"))
    b.cbranch(b.icmp_signed("==", b.and_(carry, const(CARRY_OUT)), const(0)), give, keep)
    b.position_at_end(keep)
    for row in range(rows):
        for v in range(vectors):
            store_vector(b, sums[row][v], at(b, partial, const((row * vectors + v) * lanes)), lanes)
    b.ret_void()
    b.position_at_end(give)
    if gated:
        factors = [splat(b, b.load(at(b, gate[1], const(row))), lanes) for row in range(rows)]
        sums = [[b.fmul(each, factor) for each in line] for line, factor in zip(sums, factors, strict=True)]
    b.cbranch(b.icmp_signed("!=", has_residual, const(0)), add, finish)
    b.position_at_end(add)
    added = []
    for row in range(rows):
        line = at(b, residual, long_at(b, residual_channel, const(row)))
        added.append(
            [b.fadd(sums[row][v], load_vector(b, at(b, line, const(lanes * v)), lanes)) for v in range(vectors)]
        )
    b.branch(finish)
    b.position_at_end(finish)
    results = []
    for row in range(rows):
        for v in range(vectors):
            value = b.phi(vector(lanes))
            value.add_incoming(sums[row][v], give)
            value.add_incoming(added[row][v], add)
            results.append(value)
    lows, highs = splat(b, low, lanes), splat(b, high, lanes)
    # Rows that stand in for a missing filter repeat the first row's channel: the first row is stored last.
    for row in reversed(range(rows)):
        line = at(b, y, long_at(b, y_channel, const(row)))
        for v in range(vectors):
            value = clamp(b, results[row * vectors + v], lows, highs)
            if activation:
                value = ACTIVATIONS[activation](b, module, value, lanes)
            value = masked(b, value, at(b, mask, const(lanes * v)), lanes)
            store_vector(b, value, at(b, line, const(lanes * v)), lanes)
    b.ret_void()
    return function


def _op(
    module: ir.Module, rows: int, built: dict[int, ir.Function], heights: dict[int, int], lanes: int, panels: bool
) -> None:
    b, fields, slots, item, thread = op_function(module)
    get = {field: b.load(at(b, fields, const(field))) for field in Field}

    def index(stride: Field, count: Field) -> ir.Value:
        return b.srem(b.sdiv(item, get[stride]), get[count])

    chunk, block = index(Field.CHUNK_STRIDE, Field.CHUNKS), index(Field.BLOCK_STRIDE, Field.BLOCKS)
    image = index(Field.IMAGE_STRIDE, Field.BATCH)
    start = b.mul(block, get[Field.BLOCK])
    length = smaller(b, get[Field.BLOCK], b.sub(get[Field.POSITIONS], start))

    def base(slot: Field, offset: Field, stride: Field) -> ir.Value:
        return at(b, address(b, slots, get[slot], get[offset]), b.add(b.mul(image, get[stride]), start))

    x = base(Field.X_SLOT, Field.X_OFFSET, Field.X_IMAGE)
    y = base(Field.Y_SLOT, Field.Y_OFFSET, Field.Y_IMAGE)
    residual = base(Field.RESIDUAL_SLOT, Field.RESIDUAL_OFFSET, Field.RESIDUAL_IMAGE)
    mask = at(b, pointer_field(b, get[Field.MASK], INTS), start)
    low, high = float_field(b, get[Field.LOW]), float_field(b, get[Field.HIGH])
    pointer = pointer_field(b, get[Field.GROUP_POINTER], INTS)
    first = b.mul(chunk, get[Field.CHUNK])
    last = smaller(b, b.add(first, get[Field.CHUNK]), get[Field.GROUPS])

    def compute(
        group: ir.Value, list_: ir.Value, position: ir.Value, count: int, partial: ir.Value, carry: ir.Value
    ) -> None:
        """A group's sums over one list of kept positions, for `count` vectors from `position` on."""
        begin = long_at(b, pointer, list_)
        kept = b.sub(long_at(b, pointer, b.add(list_, const(1))), begin)
        row0 = b.mul(group, const(rows))
        offsets = at(b, pointer_field(b, get[Field.OFFSETS], INTS), begin)
        values = at(b, pointer_field(b, get[Field.VALUES], FLOATS), b.mul(begin, const(rows)))
        bias = at(b, pointer_field(b, get[Field.BIAS], FLOATS), row0)
        y_channel = at(b, pointer_field(b, get[Field.Y_CHANNEL], INTS), row0)
        residual_channel = at(b, pointer_field(b, get[Field.RESIDUAL_CHANNEL], INTS), row0)
        for row in reversed(range(0, rows, heights[count])):
            step = const(row)
            b.call(
                built[count],
                [
                    at(b, x, position), offsets, kept, at(b, values, step), const(rows), at(b, bias, step),
                    at(b, y, position), at(b, y_channel, step), at(b, residual, position),
                    at(b, residual_channel, step), get[Field.RESIDUAL], at(b, mask, position), low, high,
                    at(b, partial, const(row * count * lanes)), carry,
                ],
            )  # fmt: skip

    if not panels:
        with loop(b, first, last) as group:
            cover(b, length, lanes, max(built), lambda count, position: compute(
                group, group, position, count, y, const(0)))  # fmt: skip
        b.ret_void()
        return

    partials = address(b, slots, get[Field.SCRATCH_SLOT], get[Field.SCRATCH_OFFSET])
    partials = at(b, partials, b.mul(thread, get[Field.SCRATCH]))
    final = b.sub(get[Field.PANELS], const(1))
    with loop(b, first, last) as group, loop(b, const(0), get[Field.PANELS]) as panel:
        came = b.select(b.icmp_signed(">", panel, const(0)), const(CARRY_IN), const(0))
        goes = b.select(b.icmp_signed("<", panel, final), const(CARRY_OUT), const(0))
        list_, carry = b.add(b.mul(group, get[Field.PANELS]), panel), b.or_(came, goes)
        cover(b, length, lanes, max(built), lambda count, position: compute(
            group, list_, position, count, at(b, partials, b.mul(position, const(rows))), carry))  # fmt: skip
    b.ret_void()


def cover(b: ir.IRBuilder, length: ir.Value, lanes: int, widest: int, compute: Callable[[int, ir.Value], None]) -> None:
    """Tiles for `length` positions: as many of the widest as leave no single vector over, then narrower ones."""
    vectors = b.sdiv(b.add(length, const(lanes - 1)), const(lanes))
    rest = b.srem(vectors, const(widest))
    wide = b.sub(vectors, rest)
    if widest > 2:  # one vector over: taken with a wide tile's as two narrower ones, both busy
        spare = b.and_(b.icmp_signed("==", rest, const(1)), b.icmp_signed(">", vectors, const(1)))
        wide = b.select(spare, b.sub(wide, const(widest)), wide)
    with loop(b, const(0), wide, widest) as v:
        compute(widest, b.mul(v, const(lanes)))
    left = b.sub(vectors, wide)
    end = b.append_basic_block("covered")
    counts = [*range(1, widest), widest + 1]
    cases = {count: b.append_basic_block(f"left_{count}") for count in counts}
    switch = b.switch(left, end)
    for count, case in cases.items():
        switch.add_case(const(count), case)
        b.position_at_end(case)
        at_position = b.mul(wide, const(lanes))
        parts = [count] if count < widest else [-(-count // 2), count // 2]
        for part in parts:
            compute(part, at_position)
            at_position = b.add(at_position, const(part * lanes))
        b.branch(end)
    b.position_at_end(end)
