"""The register tile of convolutions, some filters of a group by vectors of positions, and how tiles cover positions.

The sums of a tile stay in registers while it walks the group's kept positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any

import llvmlite.ir as ir

from autoprune.repack.kernels import bf16
from autoprune.repack.kernels.compiler import Target
from autoprune.repack.kernels.fields import Fields
from autoprune.repack.kernels.ir import (
    F32,
    FLOATS,
    I32,
    I64,
    INTS,
    LONGS,
    ZERO,
    at,
    broadcast,
    clamp,
    clear,
    const,
    fma,
    fold,
    gathered,
    inner_function,
    kept_by,
    load_mask,
    load_vector,
    long_at,
    loop,
    masked,
    prefetch,
    prefetch_ahead,
    splat,
    store_vector,
)
from autoprune.repack.kernels.math import ACTIVATIONS

CARRY_IN, CARRY_OUT = 1, 2  # bits: sums go on from a panel before; to a panel after


def tiles(rows: int, target: Target, parts: int = 1, masks: bool = False) -> dict[int, int]:
    """Vectors of positions -> rows of the register tile that computes them, for groups of `rows` filters.

    Args:
        rows: filters in a group.
        target: what the tile is compiled for.
        parts: registers that an input or a weight takes.
        masks: whether inputs are masked.
    """
    tallest, widest = target.tile(rows)
    masks = masks and target.holds_masks

    def height(count: int) -> int:
        taken = parts * (count + 1) + count * masks
        fitting = [each for each in (1, 2, 4, 8, 16) if each * count + taken <= target.registers]
        return min(rows, fitting[-1] if fitting else 1)

    while (masks or parts > 2) and height(widest) < min(rows, tallest):
        widest -= 1
    return {count: height(count) for count in range(1, widest + 1)}


@dataclass(frozen=True)
class Singles:
    """How positions are taken singly.

    Attributes:
        most: so many are cheaper than one more vector.
        count: vectors of the tile that walks one along.
    """

    most: int
    count: int


def singles(rows: int, target: Target, masks: bool = False) -> Singles | None:
    """For groups of `rows` filters, arguments as of `tiles`; None where it is never cheaper."""
    heights = tiles(rows, target, masks=masks)
    more = int(masks and target.holds_masks)
    fitting = [
        count for count, height in heights.items()
        if height >= 4 and (height + 1 + more) * count + 3 + more <= target.registers
    ]  # fmt: skip
    return Singles(heights[fitting[-1]] // 2, fitting[-1]) if fitting else None


class Extra(Flag):
    """What a tile does beside its positions."""

    NOTHING = 0
    SINGLE = auto()
    COLUMNS = auto()
    GATED = auto()
    PAIRS = auto()


_ARGUMENTS: Mapping[Extra, list[ir.Type]] = {
    Extra.SINGLE: [I64, FLOATS],
    Extra.COLUMNS: [I64, INTS, I64, INTS, I64],
    Extra.GATED: [LONGS, FLOATS],
    Extra.PAIRS: [],
}


@dataclass(frozen=True)
class Meeting:
    """How inputs meet weights.

    Attributes:
        offsets: of an entry of the list that is walked.
        read: (builder, places, lanes): what lies at an entry's places.
        add: (builder, sums, inputs, weights, lanes): the sums and the products.
    """

    offsets: int
    read: Callable[[ir.IRBuilder, list[ir.Value], int], ir.Value]
    add: Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value, int], ir.Value]

    def entries(self, b: ir.IRBuilder, k: ir.Value) -> list[ir.Value]:
        """Which offsets entry `k` has."""
        first = b.mul(k, const(self.offsets)) if self.offsets > 1 else k
        return [b.add(first, const(number)) if number else first for number in range(self.offsets)]


def _products(b: ir.IRBuilder, sums: ir.Value, inputs: ir.Value, weights: ir.Value, lanes: int) -> ir.Value:
    return b.call(fma(b.module, lanes), [inputs, weights, sums])


FLOATS_ALONE = Meeting(1, lambda b, places, lanes: load_vector(b, places[0], lanes), _products)
PAIRS = Meeting(2, bf16.pairs_at, bf16.add_products)


# long: one function of LLVM IR, emitted block after block; cut apart, its values would be passed around by the dozen.
def tile(
    module: ir.Module, rows: int, vectors: int, target: Target, activation: str, extra: Extra = Extra.NOTHING
) -> ir.Function:
    """`rows` filters by `vectors` of positions: sums, residual, clamp, mask, store.

    Sums start from the bias, or where `carry` says so from what the panel before left in `partial`; they end in the
    output, or there. More arguments follow, in this order, for

    - SINGLE: how far from the first position the single one lies, and its own partial sums;
    - COLUMNS: runs, their ends, columns, what lies inside by column, and how far it is from a column's to the next;
    - GATED: the `kept` positions to walk, each its offset and, 32 bits up, where its weights lie; a factor a row, which
      its sum is multiplied by.

    With PAIRS `kept` counts pairs: two offsets each, and weights that are two bfloat16 numbers a row.
    """
    lanes = target.lanes
    kinds = [FLOATS, INTS, I64, FLOATS, I64, FLOATS, FLOATS, INTS, FLOATS, INTS, I64, INTS, F32, F32, FLOATS, I64]
    for each in extra:
        kinds += _ARGUMENTS[each]
    name = "_".join([f"tile_{rows}x{vectors}", *(each.name or "" for each in extra)])
    function = inner_function(module, name, kinds)
    (x, offsets, kept, w, pitch, bias, y, y_channel, residual, residual_channel, has_residual, mask, low, high,
     partial, carry, *more) = function.args  # fmt: skip
    alone, partial_alone = _taken(more, Extra.SINGLE, extra) or (None, None)
    runs = _taken(more, Extra.COLUMNS, extra)
    gate = _taken(more, Extra.GATED, extra)
    meeting = PAIRS if Extra.PAIRS in extra else FLOATS_ALONE
    entry, body, add, finish = (function.append_basic_block(name) for name in ("entry", "body", "add", "finish"))
    b = ir.IRBuilder(entry)
    for row in range(rows):  # written long after: no store has to wait for its cache line
        line = at(b, y, long_at(b, y_channel, const(row)))
        for v in range(0, vectors * lanes, 16):
            prefetch(b, module, at(b, line, const(v)), write=True)
    fresh, carried = (function.append_basic_block(name) for name in ("fresh", "carried"))
    b.cbranch(b.icmp_signed("==", b.and_(carry, const(CARRY_IN)), const(0)), fresh, carried)
    b.position_at_end(fresh)
    biases = [splat(b, b.load(at(b, bias, const(row))), lanes) for row in range(rows)]
    start = [each for each in biases for _ in range(vectors)]
    start += [load_vector(b, bias, rows)] if alone is not None else []
    b.branch(body)
    b.position_at_end(carried)

    def places() -> list[tuple[ir.Value, int]]:
        """Where the sums are kept between panels, and how wide they are."""
        own = [(at(b, partial, const(part * lanes)), lanes) for part in range(rows * vectors)]
        return own if alone is None else [*own, (partial_alone, rows)]

    before = [load_vector(b, place, width) for place, width in places()]
    b.branch(body)
    b.position_at_end(body)
    sums = [b.phi(value.type) for value in start]
    for phi, value, left in zip(sums, start, before, strict=True):
        phi.add_incoming(value, fresh)
        phi.add_incoming(left, carried)

    def walk(sums: list[ir.Value], first: ir.Value, last: ir.Value, inside: ir.Value | None) -> list[ir.Value]:
        """The sums and what the kept positions from `first` to `last` add to them."""
        bits = [None] * vectors if inside is None else [
            load_mask(b, at(b, inside, const(v * lanes)), lanes) for v in range(vectors)
        ]  # fmt: skip
        bit = None if inside is None or alone is None else load_mask(b, at(b, inside, alone), 1)

        def turn(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            entry_ = b.load(at(b, gate[0], k)) if gate else None
            if entry_ is None:
                places = [long_at(b, offsets, each) for each in meeting.entries(b, k)]
            else:
                places = [b.sext(b.trunc(entry_, I32), I64)]
            sources = [at(b, x, each) for each in places]
            inputs = [
                kept_by(b, meeting.read(b, [at(b, each, const(lanes * v)) for each in sources], lanes), bits[v])
                for v in range(vectors)
            ]
            weights = at(b, w, b.mul(k, pitch) if entry_ is None else b.ashr(entry_, const(32)))
            if not gate:
                prefetch_ahead(b, module, weights)
            made = []
            for row, weight in enumerate(broadcast(b, weights, rows, lanes, target.by_lane)):
                made += [meeting.add(b, sums[row * vectors + v], inputs[v], weight, lanes) for v in range(vectors)]
            if alone is not None:
                given = splat(b, kept_by(b, meeting.read(b, [at(b, each, alone) for each in sources], 1), bit), rows)
                made.append(meeting.add(b, sums[-1], given, load_vector(b, weights, rows), rows))
            return made

        return fold(b, first, last, sums, turn)

    if runs is None:
        sums = walk(sums, const(0), kept, None)
    else:
        count, ends, columns, inside, length = runs

        def run(number: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
            end, column = long_at(b, ends, number), b.srem(number, columns)
            return [end, *walk(held[1:], held[0], end, at(b, inside, b.mul(column, length)))]

        _, *sums = fold(b, const(0), count, [const(0), *sums], run)
    keep, give = (function.append_basic_block(name) for name in ("keep", "give"))
    b.cbranch(b.icmp_signed("==", b.and_(carry, const(CARRY_OUT)), const(0)), give, keep)
    b.position_at_end(keep)
    for each, (place, width) in zip(sums, places(), strict=True):
        store_vector(b, each, place, width)
    b.ret_void()
    b.position_at_end(give)
    if gate:
        factors = [splat(b, b.load(at(b, gate[1], const(row))), lanes) for row in range(rows)]
        sums = [b.fmul(each, factors[part // vectors]) for part, each in enumerate(sums)]
    b.cbranch(b.icmp_signed("!=", has_residual, const(0)), add, finish)
    b.position_at_end(add)
    lines = [at(b, residual, long_at(b, residual_channel, const(row))) for row in range(rows)]
    addends = [load_vector(b, at(b, line, const(lanes * v)), lanes) for line in lines for v in range(vectors)]
    addends += [gathered(b, [at(b, line, alone) for line in lines])] if alone is not None else []
    added = [b.fadd(each, addend) for each, addend in zip(sums, addends, strict=True)]
    b.branch(finish)
    b.position_at_end(finish)
    results = [b.phi(value.type) for value in sums]
    for phi, value, other in zip(results, sums, added, strict=True):
        phi.add_incoming(value, give)
        phi.add_incoming(other, add)

    def finished(value: ir.Value, width: int) -> ir.Value:
        value = clamp(b, value, splat(b, low, width), splat(b, high, width))
        return ACTIVATIONS[activation](b, module, value, width) if activation else value

    ready = finished(results[-1], rows) if alone is not None else None
    # Rows that stand in for a missing filter repeat the first row's channel: the first row is stored last.
    for row in reversed(range(rows)):
        line = at(b, y, long_at(b, y_channel, const(row)))
        for v in range(vectors):
            value = finished(results[row * vectors + v], lanes)
            value = masked(b, value, at(b, mask, const(lanes * v)), lanes)
            store_vector(b, value, at(b, line, const(lanes * v)), lanes)
        if alone is not None:
            value = b.extract_element(ready, ir.Constant(I32, row))
            b.store(masked(b, value, at(b, mask, alone), 1), at(b, line, alone))
    b.ret_void()
    return function


def _taken(more: list[ir.Value], wanted: Extra, extra: Extra) -> list[ir.Value] | None:
    """The next arguments, where they are those of `wanted`."""
    if wanted not in extra:
        return None
    taken = more[: len(_ARGUMENTS[wanted])]
    del more[: len(taken)]
    return taken


def clear_borders(
    b: ir.IRBuilder, item: ir.Value, block: ir.Value, y: ir.Value, channels: ir.Value,
    rows: tuple[ir.Value, ir.Value], field: type[Fields], get: Mapping[Any, ir.Value], value: ir.Value = ZERO,
) -> None:  # fmt: skip
    """Sets the border of some rows' channels to `value`, once a map: other maps lay in this memory before.

    `field` has the names that `offset_gemm.Field` has.
    """
    begin, behind, before = (get[field[name]] for name in ("POSITIONS", "BORDER", "BORDER_FIRST"))
    begins = b.and_(b.icmp_signed("==", block, const(0)), b.icmp_signed(">", behind, const(0)))
    with b.if_then(begins), loop(b, *rows) as row:
        clear(b, at(b, y, b.add(long_at(b, channels, row), begin)), behind, value)
    with b.if_then(b.icmp_signed("==", item, const(0))):
        clear(b, at(b, y, b.neg(before)), before, value)


def place_of(
    b: ir.IRBuilder, item: ir.Value, field: type[Fields], get: Mapping[Any, ir.Value]
) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value, ir.Value]:
    """An item's chunk of groups, block of positions and image; then where the block begins, and how long it is.

    `field` has the names that `offset_gemm.Field` has; the last block takes what is left.
    """

    def index(stride: str, count: str) -> ir.Value:
        return b.srem(b.sdiv(item, get[field[stride]]), get[field[count]])

    chunk, block = index("CHUNK_STRIDE", "CHUNKS"), index("BLOCK_STRIDE", "BLOCKS")
    image = index("IMAGE_STRIDE", "BATCH")
    size, positions = get[field["BLOCK"]], get[field["POSITIONS"]]
    start = b.mul(block, size)
    last = b.icmp_signed("==", block, b.sub(get[field["BLOCKS"]], const(1)))
    return chunk, block, image, start, b.select(last, b.sub(positions, start), size)


def cover(
    b: ir.IRBuilder, length: ir.Value, lanes: int, widest: int, compute: Callable[..., None],
    single: Singles | None = None,
) -> None:  # fmt: skip
    """Tiles for `length` positions: as many of the widest as leave no single vector over, then narrower ones.

    Positions that fill no vector are one more vector, or are walked along by the first tiles, one each.
    """
    vectors, begin = b.sdiv(b.add(length, const(lanes - 1)), const(lanes)), const(0)
    if single is not None:
        whole, rest = b.sdiv(length, const(lanes)), b.srem(length, const(lanes))
        carried = b.mul(rest, const(single.count))
        few = b.and_(b.icmp_signed("<=", rest, const(single.most)), b.icmp_signed("<=", carried, whole))
        with loop(b, const(0), b.select(few, rest, const(0))) as number:
            alone = b.add(b.mul(whole, const(lanes)), number)
            compute(single.count, b.mul(number, const(single.count * lanes)), alone)
        begin = b.select(few, b.mul(carried, const(lanes)), const(0))
        vectors = b.select(few, b.sub(whole, carried), vectors)
    rest = b.srem(vectors, const(widest))
    wide = b.sub(vectors, rest)
    if widest > 2:  # one vector over: taken with a wide tile's as two narrower ones, both busy
        spare = b.and_(b.icmp_signed("==", rest, const(1)), b.icmp_signed(">", vectors, const(1)))
        wide = b.select(spare, b.sub(wide, const(widest)), wide)
    with loop(b, const(0), wide, widest) as v:
        compute(widest, b.add(begin, b.mul(v, const(lanes))))
    left = b.sub(vectors, wide)
    end = b.append_basic_block("covered")
    counts = [*range(1, widest), widest + 1]
    cases = {count: b.append_basic_block(f"left_{count}") for count in counts}
    switch = b.switch(left, end)
    for count, case in cases.items():
        switch.add_case(const(count), case)
        b.position_at_end(case)
        at_position = b.add(begin, b.mul(wide, const(lanes)))
        parts = [count] if count < widest else [-(-count // 2), count // 2]
        for part in parts:
            compute(part, at_position)
            at_position = b.add(at_position, const(part * lanes))
        b.branch(end)
    b.position_at_end(end)
