"""softmax(q k^T scale + bias) v, a native op; reads and writes through strides, so heads need not be moved apart.

An item is a head of an image. Its keys (transposed) and its values are stored in the thread's scratch as panels: some
vectors of columns, line after line, as the tiles read them. Then some queries at a time meet all keys, become shares,
and meet all values. Both products are dense tiles in registers. Where the queries fill no tile, `few_attention` is
faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import llvmlite.ir as ir
import numpy as np

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import FLOAT, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    F32,
    I32,
    address,
    at,
    const,
    float_field,
    fold,
    load_vector,
    loop,
    masked_load,
    op_function,
    smaller,
    splat,
    store_vector,
)
from autoprune.repack.kernels.math import exp, exp2, splat_float
from autoprune.repack.kernels.panels import Lines, pack, pack_turned, panel_product, tile
from autoprune.repack.kernels.rows import each
from autoprune.repack.kernels.sums import PARTS, united

TILES = 2  # of queries that meet a panel while it is near
LOWEST = float(np.finfo(np.float32).min)
_LINE = 16  # floats in a cache line


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes in floats."""

    Q_SLOT = SLOT
    Q_OFFSET = OFFSET
    Q_IMAGE = NUMBER  # from an image to the next; then from a head, and from a token
    Q_HEAD = NUMBER
    Q_TOKEN = NUMBER
    K_SLOT = SLOT
    K_OFFSET = OFFSET
    K_IMAGE = NUMBER
    K_HEAD = NUMBER
    K_TOKEN = NUMBER
    V_SLOT = SLOT
    V_OFFSET = OFFSET
    V_IMAGE = NUMBER
    V_HEAD = NUMBER
    V_TOKEN = NUMBER
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    Y_IMAGE = NUMBER
    Y_HEAD = NUMBER
    Y_TOKEN = NUMBER
    SCRATCH_SLOT = SLOT
    SCRATCH_OFFSET = OFFSET
    SCRATCH = NUMBER  # from a thread's scratch to the next: see `scratch`
    HEADS = NUMBER
    QUERIES = NUMBER
    KEYS = NUMBER
    WIDTH = NUMBER  # of a query and a key
    VALUE_WIDTH = NUMBER
    SCALE = FLOAT
    BIAS_SLOT = SLOT.of("bias")
    BIAS_OFFSET = OFFSET.of("bias")
    BIAS_IMAGE = NUMBER.of("bias")
    BIAS_HEAD = NUMBER.of("bias")
    BIAS_TOKEN = NUMBER.of("bias")  # from a query to the next; keys are neighbours


def scratch(keys: int, width: int, value_width: int, target: Target) -> int:
    """Floats of scratch a thread needs."""
    rows, vectors = tile(target)
    wide = vectors * target.lanes
    keys_, width_ = -(-keys // _padding(target)) * _padding(target), -(-value_width // wide) * wide
    floats = keys_ + wide + keys_ * width + keys * width_ + TILES * rows * (keys_ + width_ + 1)
    return -(-floats // _LINE) * _LINE


def _padding(target: Target) -> int:
    """What keys are padded to multiples of: whole panels, and whole vectors of partial sums."""
    return max(tile(target)[1] * target.lanes, PARTS)


@dataclass(frozen=True)
class _Scratch:
    """Where a thread's scratch holds what; `keys_` and `width_`, of values, are padded."""

    keys_: ir.Value
    width_: ir.Value
    start: ir.Value  # of a query's scores: 0, minus infinity where a key is padding; then zeros for a panel
    keys: ir.Value  # panels
    values: ir.Value
    shares: ir.Value  # (queries, keys_)
    results: ir.Value  # (queries, width_)
    totals: ir.Value  # of a query's shares


@kernel
def attention(target: Target, biased: bool = False) -> ir.Module:
    """The op for at least a tile's queries, with a bias or without; an item is a head of an image.

    A query for which every key has a bias of minus infinity gets zeros.
    """
    module, lanes = ir.Module(), target.lanes
    vectors = tile(target)[1]
    b, fields, slots, item, thread = op_function(module)
    get = Field.load(b, fields)
    base = heads(b, get, slots, item)
    q, k, v, y = (base(name) for name in "QKVY")
    place = _place(b, get, slots, thread, target)
    factor = float_field(b, get[Field.SCALE])
    factor = factor if biased else b.fmul(factor, splat_float(1 / math.log(2), 1))  # scores as powers of 2
    lines = Lines(k, get[Field.K_TOKEN], get[Field.KEYS], get[Field.WIDTH])
    pack_turned(b, lines, place.keys, vectors, lanes, place.keys_, factor)
    pack(b, Lines(v, get[Field.V_TOKEN], get[Field.KEYS], get[Field.VALUE_WIDTH]), place.values, vectors * lanes)
    _begin_scores(b, get, place, vectors * lanes)
    _attend(b, module, get, q, y, base("BIAS") if biased else None, place, target)
    b.ret_void()
    return module


def heads(
    b: ir.IRBuilder, get: dict[Field, ir.Value], slots: ir.Value, item: ir.Value
) -> Callable[[str], ir.Value]:  # fmt: skip
    """Where an item's head of the operand with this name in `Field` begins."""
    head, image = b.srem(item, get[Field.HEADS]), b.sdiv(item, get[Field.HEADS])

    def base(name: str) -> ir.Value:
        slot, offset, image_, head_ = (get[Field[f"{name}_{what}"]] for what in ("SLOT", "OFFSET", "IMAGE", "HEAD"))
        start = address(b, slots, slot, offset)
        return at(b, start, b.add(b.mul(image, image_), b.mul(head, head_)))

    return base


def _place(b: ir.IRBuilder, get: dict[Field, ir.Value], slots: ir.Value, thread: ir.Value, target: Target) -> _Scratch:
    rows, vectors = tile(target)
    wide = vectors * target.lanes
    keys, width = get[Field.KEYS], get[Field.WIDTH]
    keys_, width_ = (
        b.mul(b.sdiv(b.add(n, const(to - 1)), const(to)), const(to))
        for n, to in ((keys, _padding(target)), (get[Field.VALUE_WIDTH], wide))
    )
    pointer = address(b, slots, get[Field.SCRATCH_SLOT], get[Field.SCRATCH_OFFSET])
    pointer = at(b, pointer, b.mul(thread, get[Field.SCRATCH]))
    many = const(TILES * rows)
    parts = []
    for size in (
        b.mul(keys_, width), b.mul(keys, width_), b.mul(many, keys_), b.mul(many, width_), b.add(keys_, const(wide))
    ):  # fmt: skip
        parts.append(pointer)
        pointer = at(b, pointer, size)
    panels, values, shares, results, start = parts
    return _Scratch(keys_, width_, start, panels, values, shares, results, pointer)


def _begin_scores(b: ir.IRBuilder, get: dict[Field, ir.Value], place: _Scratch, wide: int) -> None:
    """What products begin with: 0, minus infinity where a key is padding, and zeros for a panel behind them."""
    keys, zero = get[Field.KEYS], ir.Constant(F32, 0.0)
    for first, end, value in (
        (const(0), keys, zero), (keys, place.keys_, ir.Constant(F32, float("-inf"))),
        (place.keys_, b.add(place.keys_, const(wide)), zero),
    ):  # fmt: skip
        with loop(b, first, end) as key:
            b.store(value, at(b, place.start, key))


def _attend(
    b: ir.IRBuilder, module: ir.Module, get: dict[Field, ir.Value], q: ir.Value, y: ir.Value, bias: ir.Value | None,
    place: _Scratch, target: Target,
) -> None:  # fmt: skip
    """All queries, in tiles; the last tile is moved back: some queries are computed twice."""
    rows, vectors = tile(target)
    lanes, wide = target.lanes, vectors * target.lanes
    product = panel_product(module, rows, wide // lanes, lanes)
    keys, width, keys_, width_ = get[Field.KEYS], get[Field.WIDTH], place.keys_, place.width_
    tiles = b.sdiv(b.add(get[Field.QUERIES], const(rows - 1)), const(rows))

    def first(index: ir.Value) -> ir.Value:
        return smaller(b, b.mul(index, const(rows)), b.sub(get[Field.QUERIES], const(rows)))

    with loop(b, const(0), tiles, TILES) as begin:
        end = smaller(b, b.add(begin, const(TILES)), tiles)
        with loop(b, const(0), keys_, wide) as key, loop(b, begin, end) as index:
            shares = at(b, place.shares, b.mul(b.mul(b.sub(index, begin), const(rows)), keys_))
            b.call(product, [at(b, q, b.mul(first(index), get[Field.Q_TOKEN])), get[Field.Q_TOKEN], width,
                             at(b, place.keys, b.mul(key, width)), at(b, place.start, key),
                             at(b, shares, key), keys_])  # fmt: skip
        with loop(b, const(0), b.mul(b.sub(end, begin), const(rows))) as row:
            line = at(b, place.shares, b.mul(row, keys_))
            if bias is None:
                total = softmax_in_place(b, module, line, keys)
            else:
                query = b.add(first(b.add(begin, b.sdiv(row, const(rows)))), b.srem(row, const(rows)))
                added = at(b, bias, b.mul(query, get[Field.BIAS_TOKEN]))
                total = softmax_in_place(b, module, line, keys, added)
            b.store(total, at(b, place.totals, row))
        with loop(b, const(0), width_, wide) as column, loop(b, begin, end) as index:
            row = b.mul(b.sub(index, begin), const(rows))
            b.call(product, [at(b, place.shares, b.mul(row, keys_)), keys_, keys,
                             at(b, place.values, b.mul(column, keys)), at(b, place.start, keys_),
                             at(b, at(b, place.results, b.mul(row, width_)), column), width_])  # fmt: skip
        with loop(b, begin, end) as index, loop(b, const(0), const(rows)) as offset:
            row = b.add(b.mul(b.sub(index, begin), const(rows)), offset)
            factor = share(b, b.load(at(b, place.totals, row)), bias is not None)
            line = at(b, place.results, b.mul(row, width_))
            out = at(b, y, b.mul(b.add(first(index), offset), get[Field.Y_TOKEN]))

            def write(position: ir.Value, count: int, line: ir.Value = line, out: ir.Value = out,
                      factor: ir.Value = factor) -> None:  # fmt: skip
                value = b.fmul(load_vector(b, at(b, line, position), count), splat(b, factor, count))
                store_vector(b, value, at(b, out, position), count)

            each(b, get[Field.VALUE_WIDTH], lanes, write)


def share(b: ir.IRBuilder, total: ir.Value, biased: bool) -> ir.Value:
    """What results are multiplied by for shares to sum to 1; 0 where a bias leaves no key."""
    zero, one = (ir.Constant(F32, value) for value in (0.0, 1.0))
    given = b.fdiv(one, total)
    return b.select(b.fcmp_ordered("==", total, zero), zero, given) if biased else given


def _reduce(
    b: ir.IRBuilder, count: ir.Value, initial: float, step: Callable[[ir.Value, ir.Value], ir.Value],
    join: Callable[[ir.Value, ir.Value], ir.Value],
) -> ir.Value:  # fmt: skip
    """``step(total, position)`` over vectors of `PARTS` that cover `count` floats; `join` unites the lanes."""
    start = [splat_float(initial, PARTS)]
    return united(b, fold(b, const(0), count, start, lambda i, held: [step(held[0], i)], PARTS), join)


def softmax_in_place(
    b: ir.IRBuilder, module: ir.Module, line: ir.Value, count: ir.Value, bias: ir.Value | None = None
) -> ir.Value:
    """In place: 2 ** (x - max), whose total is returned; minus infinity where `line` is padded gives 0.

    With a bias, which is added first: e ** (x - max), all zeros where every x is minus infinity. Its scores are not
    in powers of 2, so that the lowest float, by which many models mask, does not become minus infinity.
    """

    def most(x: ir.Value, y: ir.Value) -> ir.Value:
        return b.select(b.fcmp_ordered(">", x, y), x, y)  # may lose a NaN, which is in the total all the same

    def score(position: ir.Value) -> ir.Value:
        value = load_vector(b, at(b, line, position), PARTS)
        if bias is None:
            return value
        index = b.add(splat(b, b.trunc(position, I32), PARTS),
                      ir.Constant(ir.VectorType(I32, PARTS), list(range(PARTS))))  # fmt: skip
        inside = b.icmp_signed("<", index, splat(b, b.trunc(count, I32), PARTS))
        value = b.fadd(value, masked_load(b, module, at(b, bias, position), inside, PARTS))
        store_vector(b, value, at(b, line, position), PARTS)
        return value

    top = _reduce(b, count, float("-inf"), lambda total, i: most(total, score(i)), most)
    if bias is not None:
        top = most(top, ir.Constant(F32, LOWEST))

    def add(total: ir.Value, position: ir.Value) -> ir.Value:
        here = at(b, line, position)
        away = b.fsub(load_vector(b, here, PARTS), splat(b, top, PARTS))
        power = exp2(b, module, away, PARTS) if bias is None else exp(b, module, away, PARTS)
        store_vector(b, power, here, PARTS)
        return b.fadd(total, power)

    return _reduce(b, count, 0.0, add, b.fadd)
