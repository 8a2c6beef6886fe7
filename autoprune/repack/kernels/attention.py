"""softmax(q k^T scale) v, a native op; reads and writes through strides, so heads need not be moved apart.

An item is a head of an image. Its keys are stored transposed and its values side by side in the thread's scratch; then
some queries at a time meet all keys, become shares, and meet all values. Both products are dense tiles in registers.
"""

from __future__ import annotations

from enum import IntEnum

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, compile_op, once_a_process
from autoprune.repack.kernels.ir import (
    F32,
    FLOATS,
    I64,
    address,
    at,
    const,
    float_field,
    fma,
    inner_function,
    load_vector,
    loop,
    op_function,
    splat,
    store_vector,
    vector,
)
from autoprune.repack.kernels.math import exp
from autoprune.repack.kernels.rows import each, fold


class Field(IntEnum):
    """Entries of the int64 array that describes one op; sizes in floats."""

    Q_SLOT = 0
    Q_OFFSET = 1  # bytes
    Q_IMAGE = 2  # from an image to the next; then from a head, and from a token
    Q_HEAD = 3
    Q_TOKEN = 4
    K_SLOT = 5
    K_OFFSET = 6
    K_IMAGE = 7
    K_HEAD = 8
    K_TOKEN = 9
    V_SLOT = 10
    V_OFFSET = 11
    V_IMAGE = 12
    V_HEAD = 13
    V_TOKEN = 14
    Y_SLOT = 15
    Y_OFFSET = 16
    Y_IMAGE = 17
    Y_HEAD = 18
    Y_TOKEN = 19
    SCRATCH_SLOT = 20
    SCRATCH_OFFSET = 21
    SCRATCH = 22  # from a thread's scratch to the next: see `scratch`
    HEADS = 23
    QUERIES = 24
    KEYS = 25
    WIDTH = 26  # of a head
    SCALE = 27  # float bits


def tile(target: Target) -> tuple[int, int]:
    """Queries by vectors that stay in registers."""
    return (12, 2) if target.lanes == 16 else (6, 2)


def scratch(keys: int, width: int, target: Target) -> int:
    """Floats of scratch a thread needs."""
    wide = tile(target)[1] * target.lanes
    keys_, width_ = (-(-each // wide) * wide for each in (keys, width))
    return width * keys_ + keys * width_ + tile(target)[0] * (keys_ + width_) + 16


@once_a_process
def attention(target: Target) -> int:
    """The op; an item is a head of an image."""
    module, lanes = ir.Module(), target.lanes
    most, vectors = tile(target)
    wide = vectors * lanes
    products = {rows: _product(module, rows, vectors, lanes) for rows in (most, 1)}
    b, fields, slots, item, thread = op_function(module)
    get = {field: b.load(at(b, fields, const(field))) for field in Field}
    head, image = b.srem(item, get[Field.HEADS]), b.sdiv(item, get[Field.HEADS])

    def base(first: Field) -> ir.Value:
        start = address(b, slots, get[first], get[Field(first + 1)])
        return at(b, start, b.add(b.mul(image, get[Field(first + 2)]), b.mul(head, get[Field(first + 3)])))

    q, k, v, y = (base(first) for first in (Field.Q_SLOT, Field.K_SLOT, Field.V_SLOT, Field.Y_SLOT))
    keys, width = get[Field.KEYS], get[Field.WIDTH]

    def padded(count: ir.Value) -> ir.Value:
        return b.mul(b.sdiv(b.add(count, const(wide - 1)), const(wide)), const(wide))

    keys_, width_ = padded(keys), padded(width)
    transposed = address(b, slots, get[Field.SCRATCH_SLOT], get[Field.SCRATCH_OFFSET])
    transposed = at(b, transposed, b.mul(thread, get[Field.SCRATCH]))
    values = at(b, transposed, b.mul(width, keys_))
    shares = at(b, values, b.mul(keys, width_))
    result = at(b, shares, b.mul(const(most), keys_))
    _pack(b, get, (k, v), (transposed, values), (keys_, width_))

    def queries(rows: int, query: ir.Value) -> None:
        """`rows` queries from `query` on."""
        source = at(b, q, b.mul(query, get[Field.Q_TOKEN]))
        with loop(b, const(0), keys_, wide) as key:
            b.call(products[rows], [source, get[Field.Q_TOKEN], at(b, transposed, key), keys_, width,
                                    at(b, shares, key), keys_])  # fmt: skip
        with loop(b, const(0), const(rows)) as row:
            _softmax(b, module, at(b, shares, b.mul(row, keys_)), keys, float_field(b, get[Field.SCALE]), lanes)
        with loop(b, const(0), width_, wide) as column:
            b.call(products[rows], [shares, keys_, at(b, values, column), width_, keys, at(b, result, column), width_])
        with loop(b, const(0), const(rows)) as row:
            line = at(b, result, b.mul(row, width_))
            out = at(b, y, b.mul(b.add(query, row), get[Field.Y_TOKEN]))
            each(b, width, lanes, lambda at_, wide_: store_vector(
                b, load_vector(b, at(b, line, at_), wide_), at(b, out, at_), wide_))  # fmt: skip

    many = b.icmp_signed(">=", get[Field.QUERIES], const(most))
    with b.if_else(many) as (tiled, single):
        with tiled:
            steps = b.sdiv(b.add(get[Field.QUERIES], const(most - 1)), const(most))
            with loop(b, const(0), steps) as step:  # the last is moved back: some queries are computed twice
                first = b.mul(step, const(most))
                end = b.sub(get[Field.QUERIES], const(most))
                queries(most, b.select(b.icmp_signed("<", first, end), first, end))
        with single, loop(b, const(0), get[Field.QUERIES]) as query:
            queries(1, query)
    b.ret_void()
    return compile_op(module, "op", target)


def _pack(
    b: ir.IRBuilder, get: dict[Field, ir.Value], given: tuple[ir.Value, ir.Value], into: tuple[ir.Value, ir.Value],
    pitch: tuple[ir.Value, ir.Value],
) -> None:  # fmt: skip
    """Keys transposed, values side by side, zeros where a row is padded."""
    (k, v), (transposed, values), (keys_, width_) = given, into, pitch
    zero = ir.Constant(F32, 0.0)
    with loop(b, const(0), get[Field.WIDTH]) as column:
        line = at(b, transposed, b.mul(column, keys_))
        with loop(b, const(0), get[Field.KEYS]) as key:
            b.store(b.load(at(b, k, b.add(b.mul(key, get[Field.K_TOKEN]), column))), at(b, line, key))
        with loop(b, get[Field.KEYS], keys_) as key:
            b.store(zero, at(b, line, key))
    with loop(b, const(0), get[Field.KEYS]) as key:
        source, line = at(b, v, b.mul(key, get[Field.V_TOKEN])), at(b, values, b.mul(key, width_))
        with loop(b, const(0), get[Field.WIDTH]) as column:
            b.store(b.load(at(b, source, column)), at(b, line, column))
        with loop(b, get[Field.WIDTH], width_) as column:
            b.store(zero, at(b, line, column))


def _softmax(b: ir.IRBuilder, module: ir.Module, line: ir.Value, count: ir.Value, scale: ir.Value, lanes: int) -> None:
    """In place: exp(scale (x - max)) over its sum."""

    def most(total: ir.Value, position: ir.Value, wide: int) -> ir.Value:
        value = b.fmul(load_vector(b, at(b, line, position), wide), splat(b, scale, wide))
        return b.select(b.fcmp_unordered(">", value, total), value, total)  # NaN wins

    def join(x: ir.Value, y: ir.Value) -> ir.Value:
        return b.select(b.fcmp_unordered(">", y, x), y, x)

    top = fold(b, count, lanes, float("-inf"), most, join)

    def add(total: ir.Value, position: ir.Value, wide: int) -> ir.Value:
        value = b.fmul(load_vector(b, at(b, line, position), wide), splat(b, scale, wide))
        power = exp(b, module, b.fsub(value, splat(b, top, wide)), wide)
        store_vector(b, power, at(b, line, position), wide)
        return b.fadd(total, power)

    share = b.fdiv(ir.Constant(F32, 1.0), fold(b, count, lanes, 0.0, add, b.fadd))

    def divide(position: ir.Value, wide: int) -> None:
        value = load_vector(b, at(b, line, position), wide)
        store_vector(b, b.fmul(value, splat(b, share, wide)), at(b, line, position), wide)

    each(b, count, lanes, divide)


def _product(module: ir.Module, rows: int, vectors: int, lanes: int) -> ir.Function:
    """C = A B for `rows` rows and `vectors` vectors of columns: (a, a's pitch, b, b's pitch, inner, c, c's pitch)."""
    kinds = [FLOATS, I64, FLOATS, I64, I64, FLOATS, I64]
    function = inner_function(module, f"product_{rows}", kinds)
    left, left_pitch, right, right_pitch, inner, out, out_pitch = function.args
    entry, head, body, done = (function.append_basic_block(name) for name in ("entry", "head", "body", "done"))
    b = ir.IRBuilder(entry)
    lines = [at(b, left, b.mul(left_pitch, const(row))) for row in range(rows)]
    b.branch(head)
    b.position_at_end(head)
    k = b.phi(I64)
    k.add_incoming(const(0), entry)
    sums = [[b.phi(vector(lanes)) for _ in range(vectors)] for _ in range(rows)]
    for row in sums:
        for total in row:
            total.add_incoming(ir.Constant(vector(lanes), None), entry)
    b.cbranch(b.icmp_signed("<", k, inner), body, done)
    b.position_at_end(body)
    source = at(b, right, b.mul(k, right_pitch))
    inputs = [load_vector(b, at(b, source, const(lanes * v)), lanes) for v in range(vectors)]
    for row, line in zip(sums, lines, strict=True):
        factor = splat(b, b.load(at(b, line, k)), lanes)
        for total, given in zip(row, inputs, strict=True):
            total.add_incoming(b.call(fma(module, lanes), [factor, given, total]), body)
    k.add_incoming(b.add(k, const(1)), body)
    b.branch(head)
    b.position_at_end(done)
    for index, row in enumerate(sums):
        target_line = at(b, out, b.mul(out_pitch, const(index)))
        for v, total in enumerate(row):
            store_vector(b, total, at(b, target_line, const(lanes * v)), lanes)
    b.ret_void()
    return function
