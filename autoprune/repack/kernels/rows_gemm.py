"""Group-wise sparse Linear over rows of features, a native op.

The filters of a group share their inputs, so a vector holds the filters of a group: k walks the group's kept features,
one broadcast of each token's feature meets the group's weights. Two groups that keep the same features, as all do where
little is pruned, are computed as one, so that each broadcast meets twice the weights. Several tokens stay in registers
together; where there is but one, it is summed in several independent chains, so that the last bits of its result are
others than if there were more.

Weights may be pairs of bfloat16 numbers, of two kept features, which are multiplied as floats: half as much to read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

import llvmlite.ir as ir

from autoprune.repack.kernels import bf16
from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import FLOAT, FLOAT32_ARRAY, INT32_ARRAY, NUMBER, OFFSET, PRESENCE, SLOT, Fields
from autoprune.repack.kernels.ir import (
    F32,
    FLOATS,
    I64,
    INTS,
    address,
    at,
    clamp,
    const,
    float_field,
    fma,
    fold,
    inner_function,
    load_vector,
    long_at,
    loop,
    op_function,
    pointer_field,
    prefetch_ahead,
    smaller,
    splat,
    store_vector,
)
from autoprune.repack.kernels.math import ACTIVATIONS, splat_float


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes in floats."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    RESIDUAL_SLOT = SLOT.of("residual")
    RESIDUAL_OFFSET = OFFSET.of("residual")
    RESIDUAL = PRESENCE.of("residual")
    TOKENS = NUMBER
    X_TOKEN = NUMBER  # from a token to the next
    Y_TOKEN = NUMBER
    RESIDUAL_TOKEN = NUMBER.of("residual")
    GROUP_POINTER = INT32_ARRAY
    INDEX = INT32_ARRAY  # per kept position, two a pair: the feature
    VALUES = FLOAT32_ARRAY  # of pairs: the bits of two bfloat16 numbers each
    BIAS = FLOAT32_ARRAY
    OUT_INDEX = INT32_ARRAY  # per row: the filter, -1 for none
    FIRST = INT32_ARRAY  # per group: its first filter when its filters are neighbours, else -1
    TWIN = INT32_ARRAY.of("twins")  # per group, see `Twin`; only where twins are computed as one
    LOW = FLOAT  # results are clamped
    HIGH = FLOAT
    GROUPS = NUMBER
    CHUNK = NUMBER  # groups an item
    CHUNKS = NUMBER
    BLOCK = NUMBER  # tokens an item


PAIRS = INTS  # to weights, by which the kernels tell what they are
FEATURES = {FLOATS: 1, PAIRS: 2}  # of an entry of a list
CHAINS = 6  # of a single token: enough to hide how long a sum takes, and few enough for 16 registers


class Twin(IntEnum):
    """Whether a group keeps the same features as a neighbour whose filters are the next ones."""

    NONE = 0
    FIRST = 1  # the group after it is its twin
    SECOND = 2  # the group before it is


def joins_twins(rows: int, target: Target) -> bool:
    """Whether twins are computed as one: where a vector holds the filters of one group."""
    return rows == target.lanes


def tokens_together(rows: int, target: Target) -> int:
    """Tokens whose sums stay in registers."""
    registers = -(-rows // target.lanes)
    return max(1, (24 if target.lanes == 16 else 12) // registers)


def token_counts(rows: int, target: Target) -> list[int]:
    """How many tokens a pass over a group's weights may take, falling.

    The last pass is the least that takes what is left: it computes the last token several times. 1 is for an op of a
    single token.
    """
    most = max(2, tokens_together(rows, target))
    return [most, *(count for count in (16, 8, 4, 2, 1) if count < most)]


@kernel
def rows_gemm(rows: int, target: Target, activation: str = "", twins: bool = False, pairs: bool = False) -> ir.Module:
    """The op for groups of `rows` filters, with `twins` computed as one; an item is some groups by some tokens.

    Where weights are `pairs`, lists are of pairs of kept features.
    """
    module = ir.Module()
    compute = group_product(module, rows, target, activation, twins, pairs)
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    chunk, block = b.srem(item, get[Field.CHUNKS]), b.sdiv(item, get[Field.CHUNKS])
    first_token = b.mul(block, get[Field.BLOCK])
    last_token = smaller(b, b.add(first_token, get[Field.BLOCK]), get[Field.TOKENS])
    x = address(b, slots, get[Field.X_SLOT], get[Field.X_OFFSET])
    y = address(b, slots, get[Field.Y_SLOT], get[Field.Y_OFFSET])
    residual = address(b, slots, get[Field.RESIDUAL_SLOT], get[Field.RESIDUAL_OFFSET])
    low, high = float_field(b, get[Field.LOW]), float_field(b, get[Field.HIGH])
    packed = PackedArrays(*(get[Field[name.upper()]] for name in PackedArrays._fields))
    lines = (x, get[Field.X_TOKEN]), (y, get[Field.Y_TOKEN]), (residual, get[Field.RESIDUAL_TOKEN])
    tokens = first_token, last_token, get[Field.TOKENS]
    first = b.mul(chunk, get[Field.CHUNK])
    with loop(b, first, smaller(b, b.add(first, get[Field.CHUNK]), get[Field.GROUPS])) as group:
        compute(b, packed, group, tokens, *lines, get[Field.RESIDUAL], (low, high))
    b.ret_void()
    return module


class PackedArrays(NamedTuple):
    """Fields that hold a packed weight: addresses, see `Field`."""

    group_pointer: ir.Value
    index: ir.Value
    values: ir.Value
    bias: ir.Value
    out_index: ir.Value
    first: ir.Value
    twin: ir.Value


Lines = tuple[ir.Value, ir.Value]
"""The first token's floats, and how many there are from a token to the next."""

Tokens = tuple[ir.Value, ir.Value, ir.Value]
"""The first one that is computed, the end, and how many there are in all."""

GroupProduct = Callable[
    [
        ir.IRBuilder, PackedArrays, ir.Value, Tokens, Lines, Lines, Lines, ir.Value, tuple[ir.Value, ir.Value],
    ],
    None,
]  # fmt: skip
"""(builder, weight, group, tokens, x, y, residual, whether there is one, bounds): one group's results."""


def group_product(
    module: ir.Module, rows: int, target: Target, activation: str = "", twins: bool = False, pairs: bool = False
) -> GroupProduct:
    """What emits the product of one group of `rows` filters, or of twins, several tokens together."""
    sizes = (1, 2) if twins else (1,)
    counts = {groups: token_counts(groups * rows, target) for groups in sizes}
    kind = PAIRS if pairs else FLOATS
    built = {
        (groups, count): _tile(module, rows, groups, count, target, activation, kind)
        for groups in sizes
        for count in counts[groups]
    }

    def compute(
        b: ir.IRBuilder, packed: PackedArrays, group: ir.Value, tokens: Tokens, x: Lines, y: Lines, residual: Lines,
        has_residual: ir.Value, bounds: tuple[ir.Value, ir.Value],
    ) -> None:  # fmt: skip
        pointer = pointer_field(b, packed.group_pointer, INTS)
        begin = long_at(b, pointer, group)
        kept = b.sub(long_at(b, pointer, b.add(group, const(1))), begin)
        index = at(b, pointer_field(b, packed.index, INTS), b.mul(begin, const(FEATURES[kind])))
        values = at(b, pointer_field(b, packed.values, kind), b.mul(begin, const(rows)))
        row0 = b.mul(group, const(rows))
        bias = at(b, pointer_field(b, packed.bias, FLOATS), row0)
        out_index = at(b, pointer_field(b, packed.out_index, INTS), row0)
        neighbours = long_at(b, pointer_field(b, packed.first, INTS), group)

        def whole(groups: int) -> None:
            def some(token: ir.Value, count: int, inside: ir.Value) -> None:
                x_at, y_at, residual_at = (at(b, base, b.mul(token, step)) for base, step in (x, y, residual))
                b.call(
                    built[groups, count],
                    [
                        inside, x_at, x[1], index, kept, values, bias, y_at, y[1], residual_at, residual[1],
                        has_residual, out_index, neighbours, *bounds,
                    ],
                )  # fmt: skip

            _passes(b, tokens, counts[groups], some)

        if not twins:
            whole(1)
            return
        twin = long_at(b, pointer_field(b, packed.twin, INTS), group)
        with b.if_then(b.icmp_signed("==", twin, const(Twin.NONE))):
            whole(1)
        with b.if_then(b.icmp_signed("==", twin, const(Twin.FIRST))):
            whole(2)

    return compute


def _passes(
    b: ir.IRBuilder, tokens: Tokens, counts: Sequence[int], some: Callable[[ir.Value, int, ir.Value], None]
) -> None:
    """``some(token, count, inside)`` over all tokens: a pass of `count`, of which so many are there."""
    most, *fewer, single = counts
    first, last, number = tokens
    with b.if_else(b.icmp_signed("==", number, const(1))) as (alone, several):
        with alone:
            some(first, single, const(1))
        with several:
            end = b.add(first, b.mul(b.sdiv(b.sub(last, first), const(most)), const(most)))
            with loop(b, first, end, most) as token:
                some(token, most, const(most))
            rest = b.sub(last, end)
            for count, less in zip((most, *fewer), (*fewer, 0), strict=True):
                fits = b.icmp_signed("<=", rest, const(count))
                with b.if_then(b.and_(fits, b.icmp_signed(">", rest, const(less)))):
                    some(end, count, rest)


def _tile(
    module: ir.Module, size: int, groups: int, tokens: int, target: Target, activation: str, kind: ir.Type
) -> ir.Function:
    """All filters of a group of `size`, or of as many as keep the same, for `tokens` tokens.

    Where fewer are `inside`, the last of them stands for the others, too. `kind`: of a pointer to weights.
    """
    rows = groups * size
    kinds = [
        I64, FLOATS, I64, INTS, I64, kind, FLOATS, FLOATS, I64, FLOATS, I64, I64, INTS, I64, F32, F32,
    ]  # fmt: skip
    function = inner_function(module, f"tile_{rows}x{tokens}", kinds)
    (inside, x, x_token, index, kept, values, bias, y, y_token, residual, residual_token, has_residual, out_index,
     neighbours, low, high) = function.args  # fmt: skip
    b = ir.IRBuilder(function.append_basic_block("entry"))
    wide = min(rows, target.lanes)  # filters in a register
    parts = range(0, rows, wide)
    chains = CHAINS if tokens == 1 else 1
    final = b.sub(inside, const(1))
    numbers = [const(0), *(smaller(b, const(t), final) for t in range(1, tokens))]
    sources = [at(b, x, b.mul(x_token, number)) for number in numbers]
    zero = splat_float(-0.0, wide)  # what changes no sum, be it zero itself
    initial = [load_vector(b, at(b, bias, const(part)), wide) for part in parts]
    whole = b.mul(b.sdiv(kept, const(chains)), const(chains))
    ahead = b.mul(kept, const(size))  # from a group's values to those of the next
    weights = [at(b, values, b.add(b.mul(ahead, const(part // size)), const(part % size))) for part in parts]
    if chains == 1:
        sums = _walk(b, module, [initial] * tokens, sources, index, weights, size, wide, const(0), kept, 1)
    else:
        total = _chained(b, module, initial, sources[0], index, weights, size, wide, whole)
        sums = _walk(b, module, [total], sources, index, weights, size, wide, whole, kept, 1)

    together = b.icmp_signed(">=", neighbours, const(0))
    added = b.icmp_signed("!=", has_residual, const(0))
    lows, highs = splat(b, low, wide), splat(b, high, wide)
    with b.if_else(together) as (side_by_side, scattered):
        with side_by_side:
            for t, number in enumerate(numbers):
                place = b.add(b.mul(y_token, number), neighbours)
                other = at(b, residual, b.add(b.mul(residual_token, number), neighbours))
                for part, value in zip(parts, sums[t], strict=True):
                    addition = _if_added(b, added, zero, at(b, other, const(part)), wide)
                    value = _finish(b, module, b.fadd(value, addition), lows, highs, activation, wide)
                    store_vector(b, value, at(b, y, b.add(place, const(part))), wide)
        with scattered:
            _scatter(b, module, sums, rows, wide, inside, y, y_token, residual, residual_token, added, out_index,
                     (low, high), activation)  # fmt: skip
    b.ret_void()
    return function


def _if_added(b: ir.IRBuilder, added: ir.Value, zero: ir.Value, pointer: ir.Value, lanes: int) -> ir.Value:
    """The residual, or zero where there is none and nothing may be read."""
    before = b.block
    with b.if_then(added):
        value = load_vector(b, pointer, lanes)
        inside = b.block
    result = b.phi(value.type)
    result.add_incoming(zero, before)
    result.add_incoming(value, inside)
    return result


def _finish(
    b: ir.IRBuilder, module: ir.Module, value: ir.Value, low: ir.Value, high: ir.Value, activation: str, lanes: int
) -> ir.Value:
    value = clamp(b, value, low, high)
    return ACTIVATIONS[activation](b, module, value, lanes) if activation else value


def _scatter(
    b: ir.IRBuilder, module: ir.Module, sums: Sequence[Sequence[ir.Value]], rows: int, wide: int, inside: ir.Value,
    y: ir.Value, y_token: ir.Value, residual: ir.Value, residual_token: ir.Value, added: ir.Value, out_index: ir.Value,
    bounds: tuple[ir.Value, ir.Value], activation: str,
) -> None:  # fmt: skip
    """Each filter's result to its place; a row of a padded group has none."""
    tokens = len(sums)
    with b.goto_entry_block():
        kept = b.alloca(F32, size=tokens * rows)
    for t, values in enumerate(sums):
        for part, value in enumerate(values):
            store_vector(b, value, at(b, kept, const(t * rows + part * wide)), wide)
    zero = splat_float(-0.0, 1)
    with loop(b, const(0), const(rows)) as row:
        filter_ = long_at(b, out_index, row)
        with b.if_then(b.icmp_signed(">=", filter_, const(0))), loop(b, const(0), inside) as t:
            value = b.load(at(b, kept, b.add(b.mul(t, const(rows)), row)))
            line = at(b, residual, b.add(b.mul(residual_token, t), filter_))
            value = b.fadd(value, _if_added(b, added, zero, line, 1))
            value = _finish(b, module, value, *bounds, activation, 1)
            b.store(value, at(b, y, b.add(b.mul(y_token, t), filter_)))


def _chained(
    b: ir.IRBuilder, module: ir.Module, initial: Sequence[ir.Value], source: ir.Value, index: ir.Value,
    values: Sequence[ir.Value], size: int, wide: int, whole: ir.Value,
) -> list[ir.Value]:  # fmt: skip
    """`initial` and the products of the first `whole` kept features, in chains that begin with a product."""
    zero = splat_float(-0.0, wide)  # what changes no product, be it zero itself
    start = [initial, *([zero] * len(initial) for _ in range(CHAINS - 1))]
    before = b.block
    with b.if_then(b.icmp_signed(">", whole, const(0))):
        sources = [source] * CHAINS
        sums = _step(b, module, start, sources, index, values, size, wide, const(0), CHAINS)
        sums = _walk(b, module, sums, sources, index, values, size, wide, const(CHAINS), whole, CHAINS)
        made = list(sums[0])
        for chain in sums[1:]:
            made = [b.fadd(one, other) for one, other in zip(made, chain, strict=True)]
        inside = b.block
    total = [b.phi(value.type) for value in made]
    for phi, none, some in zip(total, initial, made, strict=True):
        phi.add_incoming(none, before)
        phi.add_incoming(some, inside)
    return total


def _walk(
    b: ir.IRBuilder, module: ir.Module, start: Sequence[Sequence[ir.Value]], sources: Sequence[ir.Value],
    index: ir.Value, values: Sequence[ir.Value], size: int, wide: int, first: ir.Value, last: ir.Value, step: int,
) -> list[list[ir.Value]]:  # fmt: skip
    """``start[t] + sum_k values[k] * sources[t][index[k]]``; with ``step > 1``, chain t takes every step-th k + t.

    `values`: a pointer to each vector of k = 0; the next k's lie `size` floats further.
    """
    parts = len(start[0])

    def split(sums: Sequence[ir.Value]) -> list[list[ir.Value]]:
        return [list(sums[t * parts : (t + 1) * parts]) for t in range(len(start))]

    def add(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        made = _step(b, module, split(sums), sources, index, values, size, wide, k, step)
        return [value for each in made for value in each]

    return split(fold(b, first, last, [value for each in start for value in each], add, step))


def _step(
    b: ir.IRBuilder, module: ir.Module, sums: Sequence[Sequence[ir.Value]], sources: Sequence[ir.Value],
    index: ir.Value, values: Sequence[ir.Value], size: int, wide: int, k: ir.Value, step: int,
) -> list[list[ir.Value]]:  # fmt: skip
    """What `_walk` does at k."""
    count = FEATURES[values[0].type]
    terms: list[list[ir.Value]] = []
    made, features = [], [k]
    for t, own in enumerate(sums):
        if t == 0 or step > 1:
            here = b.add(k, const(t)) if step > 1 else k
            lines = [at(b, part, b.mul(here, const(size))) for part in values]
            if len(sums) > 1 and step == 1:  # a single token leaves the processor room to load ahead by itself
                for line in lines:
                    prefetch_ahead(b, module, line)
            read = [load_vector(b, line, wide) for line in lines]
            terms = [read] if count == 1 else bf16.halves(b, read, wide)
            first = here if count == 1 else b.mul(here, const(count))
            features = [long_at(b, index, b.add(first, const(n)) if n else first) for n in range(count)]
        added = list(own)
        for feature, weights in zip(features, terms, strict=True):
            given = splat(b, b.load(at(b, sources[t], feature)), wide)
            products = zip(weights, added, strict=True)
            added = [b.call(fma(module, wide), [weight, given, total]) for weight, total in products]
        made.append(added)
    return made
