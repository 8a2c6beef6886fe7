"""The register tile of int8 convolutions: some rows of a group by vectors of positions, in 32-bit lanes.

A lane of the input holds four unsigned bytes, neighbouring channels of one position; a cell's weight for a row holds
four signed ones. Their products are added to a 32-bit sum a row and position, which never wraps: who builds an op
checks that. An epilogue makes floats of the sums, or the bytes of four rows one lane of the next map.

A cell is whole where its four channels are a lane of the input, and mixed where they lie anywhere: a lane is put
together from four then, once for all rows of the tile. What is read from `j` bytes before another byte has that byte at
place `j`, so nothing is shuffled, and reads begin up to three bytes before a map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import llvmlite.ir as ir

from autoprune.repack.kernels.bytes_lanes import bounded, int_splat, packed
from autoprune.repack.kernels.compiler import Target
from autoprune.repack.kernels.dot_products import byte_of, dot, intrinsic, ready, row_weights
from autoprune.repack.kernels.ir import (
    F32,
    FLOATS,
    I8,
    I32,
    I64,
    INTS,
    at,
    broadcast,
    clamp,
    const,
    fma,
    fold,
    inner_function,
    load_mask,
    load_vector,
    long_at,
    prefetch,
    splat,
    store_vector,
    vector,
)
from autoprune.repack.kernels.math import ACTIVATIONS, BYTE_ACTIVATIONS
from autoprune.repack.weights.quads import QUAD

Form = Literal["bytes", "floats"]


@dataclass(frozen=True)
class Ending:
    """What becomes of sums.

    Attributes:
        output: bytes, four rows a lane, or floats.
        activation: a row of ACTIVATIONS that is no clamp.
        residual: what is added before the activation; none where empty.
    """

    output: Form
    activation: str = ""
    residual: Form | Literal[""] = ""

    def fits(self, rows: int) -> bool:
        """Whether so many rows fill whole lanes, where there are any."""
        return rows % QUAD == 0 or "bytes" not in (self.output, self.residual)


class Scalars(NamedTuple):
    """An epilogue's numbers, floats: the residual's factor, bounds, and what follows an activation that is no clamp."""

    residual_scale: ir.Value
    low: ir.Value
    high: ir.Value
    inverse: ir.Value
    zero: ir.Value


def entries(b: ir.IRBuilder, pointer: ir.Value, number: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The first entry of list `number`, and how many it has; `pointer`: where each list begins, and the last ends."""
    begin = long_at(b, pointer, number)
    return begin, b.sub(long_at(b, pointer, b.add(number, const(1))), begin)


def mixed_lanes(b: ir.IRBuilder, sources: list[ir.Value], target: Target) -> ir.Value:
    """Lanes whose byte `j` is that of the lanes at ``sources[j]``, a pointer to bytes of any alignment."""
    kind = ir.VectorType(I32, target.lanes)
    read = [b.bitcast(load_vector(b, each, QUAD * target.lanes), kind) for each in sources]
    low, high = (_selected(b, read[place], read[place + 1], 0x00FF00FF, target) for place in (0, 2))
    return _selected(b, low, high, 0x0000FFFF, target)


def _selected(b: ir.IRBuilder, one: ir.Value, other: ir.Value, bits: int, target: Target) -> ir.Value:
    """Of each lane the `bits` of one, the others of the other."""
    of_one, of_other = (int_splat(each, target.lanes) for each in (bits, ~bits))
    if target.lanes == 16 and target.dot != "plain":  # said outright: LLVM makes four instructions of two selections
        ternary = intrinsic(b, "llvm.x86.avx512.pternlog.d.512", one.type, [one.type] * 3 + [I32])
        return b.call(ternary, [one, other, of_one, ir.Constant(I32, 0b11100100)])  # third ? first : second
    return b.or_(b.and_(one, of_one), b.and_(other, of_other))


def finished(
    b: ir.IRBuilder, sums: ir.Value, factor: ir.Value, bias: ir.Value, residual: ir.Value | None, ending: Ending,
    scalars: Scalars, lanes: int,
) -> ir.Value:  # fmt: skip
    """Floats of sums; for bytes they are clamped to what bytes hold, and NaN is the lowest."""
    module = b.module
    multiply = fma(module, lanes)
    scale, low, high, inverse, zero = (splat(b, each, lanes) for each in scalars)
    value = b.call(multiply, [b.sitofp(sums, vector(lanes)), factor, bias])
    if residual is not None:
        value = b.call(multiply, [residual, scale, value])
    if ending.activation:
        table = BYTE_ACTIVATIONS if ending.output == "bytes" else ACTIVATIONS
        value = table[ending.activation](b, module, value, lanes)
        value = b.call(multiply, [value, inverse, zero])
    if ending.output == "floats":
        return clamp(b, value, low, high)
    return bounded(b, value, low, high)


class Arguments(NamedTuple):
    """What a tile is given; distances in lanes."""

    x: ir.Value  # from here on all is of the tile's first position
    y: ir.Value
    residual: ir.Value
    mask: ir.Value
    offsets: ir.Value  # of the group's whole cells, and how many there are
    kept: ir.Value
    weights: ir.Value  # of the tile's first row, as what follows
    mixed_offsets: ir.Value  # of the group's mixed cells: as many bytes each as a lane has
    mixed_bytes: ir.Value
    mixed_kept: ir.Value
    mixed_weights: ir.Value
    factor: ir.Value
    bias: ir.Value
    y_channel: ir.Value  # an entry a row, or for bytes one for each four rows
    residual_channel: ir.Value
    border: ir.Value
    residual_scale: ir.Value
    low: ir.Value
    high: ir.Value
    inverse: ir.Value
    zero: ir.Value
    start: ir.Value | None = None  # an entry a row: what its sums start from; on targets that are `signed`

    @property
    def scalars(self) -> Scalars:
        return Scalars(*(getattr(self, name) for name in Scalars._fields))


def tile_function(module: ir.Module, name: str, signed: bool = False) -> tuple[ir.IRBuilder, Arguments]:
    """Starts the function of a tile; `signed`: its last argument is `Arguments.start`."""
    kinds = [*[INTS] * 5, I64, *[INTS] * 3, I64, INTS, FLOATS, FLOATS, INTS, INTS, I32, *[F32] * len(Scalars._fields)]
    kinds += [INTS] if signed else []
    function = inner_function(module, name, kinds)
    return ir.IRBuilder(function.append_basic_block("entry")), Arguments(*function.args)


def whole_cell(b: ir.IRBuilder, given: Arguments, k: ir.Value, vectors: int, target: Target) -> list[ir.Value]:
    """The lanes of whole cell `k`, a vector of positions each."""
    source = at(b, given.x, long_at(b, given.offsets, k))
    return [load_vector(b, at(b, source, const(v * target.lanes)), target.lanes) for v in range(vectors)]


def mixed_cell(b: ir.IRBuilder, given: Arguments, k: ir.Value, vectors: int, target: Target) -> list[ir.Value]:
    """The lanes of mixed cell `k`, a vector of positions each."""
    sources, step = [], QUAD * target.lanes
    for place in range(QUAD):
        number = b.add(b.mul(k, const(QUAD)), const(place))
        lane = b.bitcast(at(b, given.x, long_at(b, given.mixed_offsets, number)), I8.as_pointer())
        sources.append(at(b, lane, b.sub(long_at(b, given.mixed_bytes, number), const(place))))
    return [mixed_lanes(b, [at(b, each, const(v * step)) for each in sources], target) for v in range(vectors)]


def lines_of(rows: int, form: Form | Literal[""]) -> int:
    """32-bit entries of so many rows."""
    return rows // QUAD if form == "bytes" else rows


def prefetch_lines(b: ir.IRBuilder, given: Arguments, rows: int, vectors: int, ending: Ending, lanes: int) -> None:
    """Asks for what is written long after, so that no store has to wait for its cache line."""
    for line in range(lines_of(rows, ending.output)):
        place = at(b, given.y, long_at(b, given.y_channel, const(line)))
        for v in range(0, vectors * lanes, 16):
            prefetch(b, b.module, at(b, place, const(v)), write=True)


def store_lines(
    b: ir.IRBuilder, sums: list[ir.Value], given: Arguments, rows: int, vectors: int, ending: Ending, lanes: int
) -> None:
    """Epilogue, mask and store of a tile's sums, row by row."""

    def addend(row: int, v: int) -> ir.Value | None:
        """What the residual adds to a row's sums."""
        if not ending.residual:
            return None
        line = long_at(b, given.residual_channel, const(lines_of(row, ending.residual)))
        read = load_vector(b, at(b, given.residual, b.add(line, const(v * lanes))), lanes)
        if ending.residual == "floats":
            return b.bitcast(read, vector(lanes))
        return b.sitofp(byte_of(b, read, row % QUAD, lanes), vector(lanes))

    def result(row: int, v: int) -> ir.Value:
        factor, bias = (splat(b, b.load(at(b, each, const(row))), lanes) for each in (given.factor, given.bias))
        return finished(b, sums[row * vectors + v], factor, bias, addend(row, v), ending, given.scalars, lanes)

    # Rows that stand in for a missing filter repeat the first row's channel: the first row is stored last.
    per_line = QUAD if ending.output == "bytes" else 1
    for line in reversed(range(rows // per_line)):
        place = at(b, given.y, long_at(b, given.y_channel, const(line)))
        for v in range(vectors):
            values = [result(row, v) for row in range(line * per_line, (line + 1) * per_line)]
            word = packed(b, values, None, lanes) if per_line == QUAD else b.bitcast(values[0], sums[0].type)
            inside = load_mask(b, at(b, given.mask, const(v * lanes)), lanes)
            word = b.select(inside, word, splat(b, given.border, lanes))
            store_vector(b, word, at(b, place, const(v * lanes)), lanes)


def tile(
    module: ir.Module, rows: int, vectors: int, pitch: int, target: Target, ending: Ending, mixed: bool
) -> ir.Function:
    """`rows` of a group of `pitch` rows by `vectors` of positions; the group has mixed cells, too, where `mixed`."""
    lanes = target.lanes
    b, given = tile_function(module, f"tile_{rows}x{vectors}", target.signed)
    prefetch_lines(b, given, rows, vectors, ending, lanes)

    def walk(sums: list[ir.Value], kept: ir.Value, weights: ir.Value, read: Cell) -> list[ir.Value]:
        """The sums and what `kept` cells add to them."""

        def add(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            cell, values = read(b, given, k, vectors, target), at(b, weights, b.mul(k, const(pitch)))
            made = []
            cell = [ready(b, each, target) for each in cell]
            for row, weight in enumerate(row_weights(b, values, rows, target)):
                made += [dot(b, sums[row * vectors + v], cell[v], weight, target) for v in range(vectors)]
            return made

        return fold(b, const(0), kept, sums, add)

    starts = [int_splat(0, lanes)] * rows
    if given.start is not None:
        starts = list(broadcast(b, given.start, rows, lanes, target.by_lane))
    sums = walk([each for each in starts for _ in range(vectors)], given.kept, given.weights, whole_cell)
    if mixed:
        sums = walk(sums, given.mixed_kept, given.mixed_weights, mixed_cell)
    store_lines(b, sums, given, rows, vectors, ending, lanes)
    b.ret_void()
    return b.function


Cell = Callable[[ir.IRBuilder, Arguments, ir.Value, int, Target], list[ir.Value]]
"""(builder, arguments, cell, vectors, target): the lanes that a cell reads."""
