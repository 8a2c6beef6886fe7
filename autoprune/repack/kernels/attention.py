"""softmax(q k^T scale) v, a native op; reads and writes through strides, so heads need not be moved apart.

An item is a head of an image. Its keys (transposed) and its values are stored in the thread's scratch as panels: some
vectors of columns, line after line, as the tiles read them. Then some queries at a time meet all keys, become shares,
and meet all values. Both products are dense tiles in registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, compile_op, once_a_process
from autoprune.repack.kernels.fields import FLOAT, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    F32,
    FLOATS,
    I64,
    address,
    at,
    const,
    float_field,
    fma,
    fold,
    inner_function,
    load_vector,
    loop,
    op_function,
    smaller,
    splat,
    store_vector,
    vector,
)
from autoprune.repack.kernels.math import exp2, splat_float
from autoprune.repack.kernels.rows import each, united

TILES = 2  # of queries that meet a panel while it is near
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
    WIDTH = NUMBER  # of a head
    SCALE = FLOAT


def tile(target: Target) -> tuple[int, int]:
    """Queries by vectors that stay in registers."""
    return (12, 2) if target.lanes == 16 else (6, 2)


def scratch(keys: int, width: int, target: Target) -> int:
    """Floats of scratch a thread needs."""
    rows, vectors = tile(target)
    wide = vectors * target.lanes
    keys_, width_ = (-(-each // wide) * wide for each in (keys, width))
    floats = keys_ + wide + keys_ * width + keys * width_ + TILES * rows * (keys_ + width_ + 1)
    return -(-floats // _LINE) * _LINE


@dataclass(frozen=True)
class _Scratch:
    """Where a thread's scratch holds what; `keys_` and `width_` are padded to whole panels."""

    keys_: ir.Value
    width_: ir.Value
    start: ir.Value  # of a query's scores: 0, minus infinity where a key is padding; then zeros for a panel
    keys: ir.Value  # panels
    values: ir.Value
    shares: ir.Value  # (queries, keys_)
    results: ir.Value  # (queries, width_)
    totals: ir.Value  # of a query's shares


@once_a_process
def attention(target: Target) -> int:
    """The op; an item is a head of an image."""
    module, lanes = ir.Module(), target.lanes
    most, vectors = tile(target)
    b, fields, slots, item, thread = op_function(module)
    get = Field.load(b, fields)
    head, image = b.srem(item, get[Field.HEADS]), b.sdiv(item, get[Field.HEADS])

    def base(name: str) -> ir.Value:
        slot, offset, image_, head_ = (get[Field[f"{name}_{what}"]] for what in ("SLOT", "OFFSET", "IMAGE", "HEAD"))
        start = address(b, slots, slot, offset)
        return at(b, start, b.add(b.mul(image, image_), b.mul(head, head_)))

    q, k, v, y = (base(name) for name in "QKVY")
    place = _place(b, get, slots, thread, target)
    _pack_keys(b, get, k, place, vectors, lanes)
    _pack_values(b, get, v, place, vectors * lanes)
    many = b.icmp_signed(">=", get[Field.QUERIES], const(most))
    with b.if_else(many) as (tiled, single):
        for branch, rows in ((tiled, most), (single, 1)):
            with branch:
                _attend(b, module, get, q, y, place, rows, target)
    b.ret_void()
    return compile_op(module, "op", target)


def _place(b: ir.IRBuilder, get: dict[Field, ir.Value], slots: ir.Value, thread: ir.Value, target: Target) -> _Scratch:
    rows, vectors = tile(target)
    wide = vectors * target.lanes
    keys, width = get[Field.KEYS], get[Field.WIDTH]
    keys_, width_ = (b.mul(b.sdiv(b.add(n, const(wide - 1)), const(wide)), const(wide)) for n in (keys, width))
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


def _pack_keys(
    b: ir.IRBuilder, get: dict[Field, ir.Value], k: ir.Value, place: _Scratch, vectors: int, lanes: int
) -> None:
    """Panels of keys, transposed and times scale log2(e); the last key stands for those that pad a panel."""
    keys, width, wide = get[Field.KEYS], get[Field.WIDTH], vectors * lanes
    factor = b.fmul(float_field(b, get[Field.SCALE]), splat_float(1 / math.log(2), 1))
    zero, last = ir.Constant(F32, 0.0), b.sub(keys, const(1))

    def line(key: ir.Value, offset: int) -> ir.Value:
        return at(b, k, b.mul(smaller(b, b.add(key, const(offset)), last), get[Field.K_TOKEN]))

    with loop(b, const(0), place.keys_, lanes) as key:
        panel = at(b, place.keys, b.mul(b.sdiv(key, const(wide)), b.mul(width, const(wide))))
        panel = at(b, panel, b.srem(key, const(wide)))
        lines = [line(key, lane) for lane in range(lanes)]
        whole = b.icmp_signed(">=", width, const(lanes))
        with b.if_else(whole) as (square, narrow):
            with square, loop(b, const(0), width, lanes) as column:  # the last square is moved back
                column = smaller(b, column, b.sub(width, const(lanes)))
                found = [load_vector(b, at(b, source, column), lanes) for source in lines]
                for lane, value in enumerate(_transposed(b, found)):
                    into = at(b, panel, b.mul(b.add(column, const(lane)), const(wide)))
                    store_vector(b, b.fmul(value, splat(b, factor, lanes)), into, lanes)
            with narrow, loop(b, const(0), width) as column:
                for lane, source in enumerate(lines):
                    into = at(b, panel, b.add(b.mul(column, const(wide)), const(lane)))
                    b.store(b.fmul(b.load(at(b, source, column)), factor), into)
    for first, end, value in (
        (const(0), keys, zero), (keys, place.keys_, ir.Constant(F32, float("-inf"))),
        (place.keys_, b.add(place.keys_, const(wide)), zero),
    ):  # fmt: skip
        with loop(b, first, end) as key:
            b.store(value, at(b, place.start, key))


def _transposed(b: ir.IRBuilder, rows: Sequence[ir.Value]) -> list[ir.Value]:
    """A square of vectors: swaps its quarters, then those of the quarters, down to single floats."""
    lanes, found = len(rows), list(rows)
    kind = ir.VectorType(ir.IntType(32), lanes)
    half = lanes // 2
    while half:
        upper = [lane if not lane & half else lane - half + lanes for lane in range(lanes)]
        lower = [lane + half if not lane & half else lane + lanes for lane in range(lanes)]
        for index in range(lanes):
            if not index & half:
                one, other = found[index], found[index + half]
                found[index] = b.shuffle_vector(one, other, ir.Constant(kind, upper))
                found[index + half] = b.shuffle_vector(one, other, ir.Constant(kind, lower))
        half //= 2
    return found


def _pack_values(b: ir.IRBuilder, get: dict[Field, ir.Value], v: ir.Value, place: _Scratch, wide: int) -> None:
    """Panels of values, zeros where a panel is padded."""
    keys, width = get[Field.KEYS], get[Field.WIDTH]
    with loop(b, const(0), place.width_, wide) as column:
        panel = at(b, place.values, b.mul(column, keys))
        inside = smaller(b, const(wide), b.sub(width, column))
        with loop(b, const(0), keys) as key:
            source = at(b, v, b.add(b.mul(key, get[Field.V_TOKEN]), column))
            into = at(b, panel, b.mul(key, const(wide)))
            with b.if_else(b.icmp_signed("==", inside, const(wide))) as (whole, partial):
                with whole:
                    store_vector(b, load_vector(b, source, wide), into, wide)
                with partial:
                    store_vector(b, ir.Constant(vector(wide), None), into, wide)
                    with loop(b, const(0), inside) as offset:
                        b.store(b.load(at(b, source, offset)), at(b, into, offset))


def _attend(
    b: ir.IRBuilder, module: ir.Module, get: dict[Field, ir.Value], q: ir.Value, y: ir.Value, place: _Scratch,
    rows: int, target: Target,
) -> None:  # fmt: skip
    """All queries, in tiles of `rows`; the last tile is moved back: some queries are computed twice."""
    lanes, wide = target.lanes, tile(target)[1] * target.lanes
    product = _product(module, rows, wide // lanes, lanes)
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
            total = _softmax(b, module, at(b, place.shares, b.mul(row, keys_)), keys, lanes)
            b.store(total, at(b, place.totals, row))
        with loop(b, const(0), width_, wide) as column, loop(b, begin, end) as index:
            row = b.mul(b.sub(index, begin), const(rows))
            b.call(product, [at(b, place.shares, b.mul(row, keys_)), keys_, keys,
                             at(b, place.values, b.mul(column, keys)), at(b, place.start, keys_),
                             at(b, at(b, place.results, b.mul(row, width_)), column), width_])  # fmt: skip
        with loop(b, begin, end) as index, loop(b, const(0), const(rows)) as offset:
            row = b.add(b.mul(b.sub(index, begin), const(rows)), offset)
            share = b.fdiv(ir.Constant(F32, 1.0), b.load(at(b, place.totals, row)))
            line = at(b, place.results, b.mul(row, width_))
            out = at(b, y, b.mul(b.add(first(index), offset), get[Field.Y_TOKEN]))

            def write(position: ir.Value, count: int, line: ir.Value = line, out: ir.Value = out,
                      share: ir.Value = share) -> None:  # fmt: skip
                value = b.fmul(load_vector(b, at(b, line, position), count), splat(b, share, count))
                store_vector(b, value, at(b, out, position), count)

            each(b, width, lanes, write)


def _reduce(
    b: ir.IRBuilder, count: ir.Value, lanes: int, initial: float, step: Callable[[ir.Value, ir.Value], ir.Value],
    join: Callable[[ir.Value, ir.Value], ir.Value],
) -> ir.Value:  # fmt: skip
    """``step(total, position)`` over whole vectors that cover `count` floats; `join` unites the lanes."""
    start = [splat_float(initial, lanes)]
    (total,) = fold(b, const(0), count, start, lambda i, held: [step(held[0], i)], lanes)
    return united(b, total, lanes, join)


def _softmax(b: ir.IRBuilder, module: ir.Module, line: ir.Value, count: ir.Value, lanes: int) -> ir.Value:
    """In place: 2 ** (x - max), whose total is returned; minus infinity where `line` is padded gives 0."""

    def most(x: ir.Value, y: ir.Value) -> ir.Value:
        return b.select(b.fcmp_ordered(">", x, y), x, y)  # may lose a NaN, which is in the total all the same

    top = _reduce(b, count, lanes, float("-inf"), lambda total, i: most(total, load_vector(b, at(b, line, i), lanes)),
                  most)  # fmt: skip

    def add(total: ir.Value, position: ir.Value) -> ir.Value:
        here = at(b, line, position)
        power = exp2(b, module, b.fsub(load_vector(b, here, lanes), splat(b, top, lanes)), lanes)
        store_vector(b, power, here, lanes)
        return b.fadd(total, power)

    return _reduce(b, count, lanes, 0.0, add, b.fadd)


def _product(module: ir.Module, rows: int, vectors: int, lanes: int) -> ir.Function:
    """C = start + A B for `rows` rows and a panel: (a, a's pitch, inner, panel, start, c, c's pitch)."""
    kinds = [FLOATS, I64, I64, FLOATS, FLOATS, FLOATS, I64]
    function = inner_function(module, f"product_{rows}", kinds)
    left, left_pitch, inner, panel, start, out, out_pitch = function.args
    b = ir.IRBuilder(function.append_basic_block("entry"))
    lines = [at(b, left, b.mul(left_pitch, const(row))) for row in range(rows)]
    initial = [load_vector(b, at(b, start, const(lanes * v)), lanes) for v in range(vectors)]

    def add(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        source = at(b, panel, b.mul(k, const(vectors * lanes)))
        inputs = [load_vector(b, at(b, source, const(lanes * v)), lanes) for v in range(vectors)]
        factors = [splat(b, b.load(at(b, line, k)), lanes) for line in lines]
        pairs = [(factor, given) for factor in factors for given in inputs]
        return [b.call(fma(module, lanes), [*pair, total]) for pair, total in zip(pairs, sums, strict=True)]

    sums = fold(b, const(0), inner, initial * rows, add)
    for row in range(rows):
        target_line = at(b, out, b.mul(out_pitch, const(row)))
        for v in range(vectors):
            store_vector(b, sums[row * vectors + v], at(b, target_line, const(lanes * v)), lanes)
    b.ret_void()
    return function
