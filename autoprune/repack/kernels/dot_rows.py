"""Group-wise sparse Linear of bytes over a few tokens, a native op: fewer than fill a vector of `dot_gemm`.

A vector holds the rows of a group: one broadcast of each token's lane, four features, meets the weights of all rows.
Sums of integers have no order, so that a few tokens are summed in several independent parts. The arrays of cells, the
factors and the epilogue are those of `dot_gemm`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Literal, NamedTuple

import llvmlite.ir as ir

from autoprune.errors import AutopruneError
from autoprune.repack.kernels.bytes_lanes import int_splat, rounded
from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.dot_products import dot, ready
from autoprune.repack.kernels.dot_tile import (
    Ending,
    Form,
    Scalars,
    entries,
    finished,
    lines_of,
)
from autoprune.repack.kernels.fields import FLOAT, FLOAT32_ARRAY, INT32_ARRAY, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    F32,
    FLOATS,
    I8,
    I32,
    I64,
    INTS,
    address,
    at,
    const,
    float_field,
    fold,
    gathered,
    inner_function,
    load_vector,
    long_at,
    loop,
    module_of_bytes,
    op_function,
    pointer_field,
    smaller,
    spans,
    splat,
    store_vector,
    vector,
)
from autoprune.repack.weights.quads import QUAD

PARTS = 4  # independent sums at least, so that none waits for the one before it


class Field(Fields):
    """Entries of the int64 array that describes one op; distances in lanes, which are as long as floats."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET  # of the first token's first lane
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    RESIDUAL_SLOT = SLOT.of("residual")
    RESIDUAL_OFFSET = OFFSET.of("residual")
    RESIDUAL_TOKEN = NUMBER.of("residual")
    RESIDUAL_CHANNEL = INT32_ARRAY.of("residual")  # as Y_CHANNEL and FIRST, by the residual's form
    RESIDUAL_FIRST = INT32_ARRAY.of("residual")
    RESIDUAL_SCALE = FLOAT.of("residual")
    TOKENS = NUMBER
    X_TOKEN = NUMBER  # from a token to the next
    Y_TOKEN = NUMBER
    GROUP_POINTER = INT32_ARRAY  # per group: its first whole cell
    OFFSETS = INT32_ARRAY  # per whole cell: from a token's first lane to the one it reads
    VALUES = INT32_ARRAY  # (whole cells, rows): four weights each
    MIXED_POINTER = INT32_ARRAY.of("mixed")  # per group: its first mixed cell
    MIXED_OFFSETS = INT32_ARRAY.of("mixed")  # (mixed cells, 4): from a token's first lane to each one it reads
    MIXED_BYTES = INT32_ARRAY.of("mixed")  # (mixed cells, 4): which byte of it, 0 to 3
    MIXED_VALUES = INT32_ARRAY.of("mixed")  # (mixed cells, rows)
    FACTOR = FLOAT32_ARRAY  # per row
    BIAS = FLOAT32_ARRAY
    Y_CHANNEL = INT32_ARRAY  # per row, or for bytes per four rows: from a token's first result to theirs
    FIRST = INT32_ARRAY  # per group: its first entry of Y_CHANNEL where the others follow it one by one, else -1
    LOW = FLOAT  # results are clamped
    HIGH = FLOAT
    INVERSE = FLOAT.of("activation")
    ZERO = FLOAT.of("activation")
    GROUPS = NUMBER
    CHUNK = NUMBER  # groups an item
    CHUNKS = NUMBER
    BLOCK = NUMBER  # tokens an item
    START = INT32_ARRAY.of("signed")  # per row: 128 times the sum of its weights; for a target that is `signed`


@kernel
def dot_rows(
    rows: int, target: Target, output: Form, activation: str = "", residual: Form | Literal[""] = "",
    mixed: bool = False,
) -> ir.Module:  # fmt: skip
    """The op for groups of `rows` filters, a multiple of 4; an item is some groups by some tokens.

    Args:
        rows: filters in a group.
        target: what to compile for.
        output: bytes, or floats.
        activation: a row of ACTIVATIONS that is no clamp.
        residual: bytes, floats, or none.
        mixed: whether there are mixed cells.

    Raises:
        AutopruneError: rows that fill no vector.
    """
    if rows % QUAD:
        raise AutopruneError(f"int8 rows need groups of a multiple of {QUAD} filters, not of {rows}.")
    module, ending = module_of_bytes(target.fused), Ending(output, activation, residual)
    _op(module, rows, target, ending, mixed)
    return module


def token_counts(rows: int, target: Target) -> list[int]:
    """How many tokens a pass over a group's weights may take, falling: any number of them takes few passes."""
    registers = 24 if target.lanes == 16 else 12 if target.dot == "vnni" else 8  # for sums
    return [count for count in (16, 8, 4, 2, 1) if count * -(-rows // target.lanes) <= registers]


def _op(module: ir.Module, rows: int, target: Target, ending: Ending, mixed: bool) -> None:
    compute = group_product(module, rows, target, ending, mixed)
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    chunk, block = b.srem(item, get[Field.CHUNKS]), b.sdiv(item, get[Field.CHUNKS])
    first_token = b.mul(block, get[Field.BLOCK])
    last_token = smaller(b, b.add(first_token, get[Field.BLOCK]), get[Field.TOKENS])

    def lines(slot: Field, offset: Field, token: Field) -> Lines:
        return b.bitcast(address(b, slots, get[slot], get[offset]), INTS), get[token]

    x = lines(Field.X_SLOT, Field.X_OFFSET, Field.X_TOKEN)
    y = lines(Field.Y_SLOT, Field.Y_OFFSET, Field.Y_TOKEN)
    other = lines(Field.RESIDUAL_SLOT, Field.RESIDUAL_OFFSET, Field.RESIDUAL_TOKEN)
    residual = Residual(*other, get[Field.RESIDUAL_CHANNEL], get[Field.RESIDUAL_FIRST])
    cells = PackedCells(*(get[Field[name.upper()]] for name in PackedCells._fields))
    scalars = Scalars(*(float_field(b, get[Field[name.upper()]]) for name in Scalars._fields))
    first = b.mul(chunk, get[Field.CHUNK])
    with loop(b, first, smaller(b, b.add(first, get[Field.CHUNK]), get[Field.GROUPS])) as group:
        compute(b, cells, group, (first_token, last_token), x, y, residual, scalars)
    b.ret_void()


class PackedCells(NamedTuple):
    """Fields that hold a packed weight of bytes: addresses, see `Field`; those of mixed cells are not always read."""

    group_pointer: ir.Value
    offsets: ir.Value
    values: ir.Value
    factor: ir.Value
    bias: ir.Value
    y_channel: ir.Value
    first: ir.Value
    mixed_pointer: ir.Value
    mixed_offsets: ir.Value
    mixed_bytes: ir.Value
    mixed_values: ir.Value
    start: ir.Value


Lines = tuple[ir.Value, ir.Value]
"""The first token's lanes, and how many there are from a token to the next."""


class Residual(NamedTuple):
    """What is added: its first token's lanes, lanes from a token to the next, and its fields, see `Field`."""

    start: ir.Value
    token: ir.Value
    channel: ir.Value
    first: ir.Value


GroupProduct = Callable[
    [
        ir.IRBuilder, PackedCells, ir.Value, tuple[ir.Value, ir.Value], Lines, Lines, Residual | None, Scalars
    ],
    None,
]  # fmt: skip
"""(builder, weight, group, first and last token, x, y, residual, the epilogue's numbers): one group's results."""


def group_product(module: ir.Module, rows: int, target: Target, ending: Ending, mixed: bool) -> GroupProduct:
    """What emits the product of one group of `rows` filters, several tokens together."""
    built = {tokens: _tile(module, rows, tokens, target, ending, mixed) for tokens in token_counts(rows, target)}
    lines, other_lines = (const(lines_of(rows, form)) for form in (ending.output, ending.residual))

    def compute(
        b: ir.IRBuilder, cells: PackedCells, group: ir.Value, tokens: tuple[ir.Value, ir.Value], x: Lines, y: Lines,
        residual: Residual | None, scalars: Scalars,
    ) -> None:  # fmt: skip
        def ints(field: ir.Value, first: ir.Value) -> ir.Value:
            return at(b, pointer_field(b, field, INTS), first)

        begin, kept = entries(b, pointer_field(b, cells.group_pointer, INTS), group)
        row0 = b.mul(group, const(rows))
        weights = [ints(cells.offsets, begin), kept, ints(cells.values, b.mul(begin, const(rows)))]
        weights += [at(b, pointer_field(b, each, FLOATS), row0) for each in (cells.factor, cells.bias)]
        where = [ints(cells.y_channel, b.mul(group, lines)), b.load(ints(cells.first, group))]
        other, other_where = y, where  # not read
        if ending.residual:
            assert residual is not None
            other = residual.start, residual.token
            other_where = [ints(residual.channel, b.mul(group, other_lines)), b.load(ints(residual.first, group))]
        more = []
        if mixed:
            begin, kept = entries(b, pointer_field(b, cells.mixed_pointer, INTS), group)
            more = [ints(each, b.mul(begin, const(QUAD))) for each in (cells.mixed_offsets, cells.mixed_bytes)]
            more += [kept, ints(cells.mixed_values, b.mul(begin, const(rows)))]
        more += [ints(cells.start, row0)] if target.signed else []

        def some(token: ir.Value, count: int) -> None:
            given, into, added = ([at(b, start, b.mul(token, step)), step] for start, step in (x, y, other))
            b.call(built[count], [*given, *weights, *into, *where, *added, *other_where, *scalars, *more])

        spans(b, *tokens, built, some)

    return compute


# long: one function of LLVM IR, emitted block after block; cut apart, its values would be passed around by the dozen.
def _tile(module: ir.Module, rows: int, tokens: int, target: Target, ending: Ending, mixed: bool) -> ir.Function:
    """All rows of a group for `tokens` tokens."""
    wide = min(rows, target.lanes)  # rows in a register
    own = replace(target, lanes=wide)
    kinds = [INTS, I64, INTS, I64, INTS, FLOATS, FLOATS, INTS, I64, INTS, I32, INTS, I64, INTS, I32]
    kinds += [F32] * len(Scalars._fields) + ([INTS, INTS, I64, INTS] if mixed else [])
    kinds += [INTS] if target.signed else []
    function = inner_function(module, f"tile_{rows}x{tokens}", kinds)
    if tokens == 1:  # then the work of a group may be less than that of calling a function with so many arguments
        function.attributes.discard("noinline")
    (x, x_token, offsets, kept, weights, factor, bias, y, y_token, y_channel, y_first, residual, residual_token,
     residual_channel, residual_first, *more) = function.args  # fmt: skip
    scalars, more = Scalars(*more[: len(Scalars._fields)]), more[len(Scalars._fields) :]
    b = ir.IRBuilder(function.append_basic_block("entry"))
    parts = range(0, rows, wide)
    sources = [at(b, x, b.mul(x_token, const(t))) for t in range(tokens)]

    def added(sums: list[ir.Value], given: list[ir.Value], values: ir.Value) -> list[ir.Value]:
        """The sums of each token and part, and what a cell adds to them; `given`: each token's lane."""
        cell = [load_vector(b, at(b, values, const(part)), wide) for part in parts]
        lanes = [splat(b, ready(b, each, own), wide) for each in given for _ in parts]
        return [dot(b, total, lane, cell[n % len(cell)], own)
                for n, (total, lane) in enumerate(zip(sums, lanes, strict=True))]  # fmt: skip

    def whole(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        lane = long_at(b, offsets, k)
        return added(sums, [b.load(at(b, each, lane)) for each in sources], at(b, weights, b.mul(k, const(rows))))

    count = tokens * len(parts)
    chains = max(1, PARTS // count)

    def several(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        made = [whole(b.add(k, const(n)), sums[n * count : (n + 1) * count]) for n in range(chains)]
        return [total for each in made for total in each]

    end = b.mul(b.sdiv(kept, const(chains)), const(chains))
    start = [int_splat(0, wide)] * (chains * count)
    if target.signed:
        start[:count] = [load_vector(b, at(b, more[-1], const(part)), wide) for part in parts] * tokens
    sums = fold(b, const(0), end, start, several, chains)
    sums = [reduce(b.add, sums[n::count]) for n in range(count)]
    sums = fold(b, end, kept, sums, whole)
    if mixed:
        mixed_offsets, mixed_bytes, mixed_kept, mixed_weights, *_ = more

        def mix(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            numbers = [b.add(b.mul(k, const(QUAD)), const(place)) for place in range(QUAD)]
            places = [
                b.add(b.mul(long_at(b, mixed_offsets, each), const(QUAD)), long_at(b, mixed_bytes, each))
                for each in numbers
            ]
            given = [_lane(b, b.bitcast(each, I8.as_pointer()), places) for each in sources]
            return added(sums, given, at(b, mixed_weights, b.mul(k, const(rows))))

        sums = fold(b, const(0), mixed_kept, sums, mix)
    for t in range(tokens):
        into, other = at(b, y, b.mul(y_token, const(t))), at(b, residual, b.mul(residual_token, const(t)))
        for part in reversed(parts):  # rows that stand in for a missing filter repeat the first row's place: it is last
            addend = None
            if ending.residual:
                addend = _read(b, _Places(other, residual_channel, residual_first, ending.residual), part, wide)
            total = sums[t * len(parts) + part // wide]
            factors, biases = (load_vector(b, at(b, each, const(part)), wide) for each in (factor, bias))
            value = finished(b, total, factors, biases, addend, ending, scalars, wide)
            _write(b, value, _Places(into, y_channel, y_first, ending.output), part, wide)
    b.ret_void()
    return function


class _Places(NamedTuple):
    """Where a token's results lie, see `Field.Y_CHANNEL` and `Field.FIRST`."""

    start: ir.Value
    channels: ir.Value
    first: ir.Value
    form: Form

    def side_by_side(self, b: ir.IRBuilder) -> ir.Value:
        return b.icmp_signed(">=", self.first, ir.Constant(I32, 0))

    def together(self, b: ir.IRBuilder, row: int) -> ir.Value:
        """Where those from `row` on lie side by side."""
        return at(b, self.start, b.add(b.sext(self.first, I64), const(lines_of(row, self.form))))

    def apart(self, b: ir.IRBuilder, row: int, rows: int) -> list[ir.Value]:
        """Where each entry of `rows` rows from `row` on lies."""
        first = lines_of(row, self.form)
        numbers = range(first, first + lines_of(rows, self.form))
        return [at(b, self.start, long_at(b, self.channels, const(number))) for number in numbers]


def _read(b: ir.IRBuilder, places: _Places, row: int, rows: int) -> ir.Value:
    """Floats of what lies at the places of `rows` rows from `row` on."""
    kind = ir.VectorType(I32, lines_of(rows, places.form))
    with b.if_else(places.side_by_side(b)) as (side_by_side, scattered):
        with side_by_side:
            near = b.load(b.bitcast(places.together(b, row), kind.as_pointer()), align=4)
            near_block = b.block
        with scattered:
            far = gathered(b, places.apart(b, row, rows))
            far_block = b.block
    read = b.phi(kind)
    read.add_incoming(near, near_block)
    read.add_incoming(far, far_block)
    if places.form == "floats":
        return b.bitcast(read, vector(rows))
    return b.sitofp(b.zext(b.bitcast(read, ir.VectorType(I8, rows)), ir.VectorType(I32, rows)), vector(rows))


def _write(b: ir.IRBuilder, value: ir.Value, places: _Places, row: int, rows: int) -> None:
    """Floats of `rows` rows from `row` on to their places; as bytes, from 0 to 255, rounded half to even."""
    kind = ir.VectorType(I32, lines_of(rows, places.form))
    if places.form == "bytes":
        value = b.trunc(rounded(b, value, rows), ir.VectorType(I8, rows))
    entries_ = b.bitcast(value, kind)
    with b.if_else(places.side_by_side(b)) as (side_by_side, scattered):
        with side_by_side:
            store_vector(b, entries_, places.together(b, row), lines_of(rows, places.form))
        with scattered:
            for number, place in reversed(list(enumerate(places.apart(b, row, rows)))):
                b.store(b.extract_element(entries_, ir.Constant(I32, number)), place)


def _lane(b: ir.IRBuilder, source: ir.Value, places: list[ir.Value]) -> ir.Value:
    """The bytes at four places, as one lane."""
    read = [b.zext(b.load(at(b, source, place)), I32) for place in places]
    return reduce(b.or_, [b.shl(byte, ir.Constant(I32, 8 * number)) for number, byte in enumerate(read)])
