"""Sums over any axes, or the largest or least of them, a native op; the operand is read through strides."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.entries import OPERATIONS, Entry, converted
from autoprune.repack.kernels.fields import FLOAT, NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    address,
    at,
    const,
    float_field,
    fold,
    load_vector,
    loop,
    op_function,
    smaller,
    spans,
    splat,
    store_vector,
)
from autoprune.repack.kernels.math import FUNCTIONS
from autoprune.repack.kernels.sums import CHAINS, PARTS, pieces, united

KEPT, SUMMED = 3, 2  # axes at most


class Run(Enum):
    """What lies together in the operand: the last axis that is kept, the last that is summed, or neither."""

    KEPT = "kept"
    SUMMED = "summed"
    NEITHER = "neither"


class Join(Enum):
    """What many entries become."""

    SUM = "sum"
    ROOT = "root"  # of the sum of their squares
    LARGEST = "largest"
    LEAST = "least"

    def start(self, entry: Entry, wide: int) -> ir.Constant:
        """What changes nothing."""
        if self in (Join.SUM, Join.ROOT):
            return entry.constant(0, wide)
        return entry.constant(entry.least if self is Join.LARGEST else entry.largest, wide)

    def step(self, b: ir.IRBuilder, held: ir.Value, value: ir.Value, entry: Entry) -> ir.Value:
        """What an entry more makes of what was held."""
        if self is Join.ROOT:
            value = b.fmul(value, value)
        return self.unite(b, held, value, entry)

    def unite(self, b: ir.IRBuilder, one: ir.Value, other: ir.Value, entry: Entry) -> ir.Value:
        """Two that were held as one."""
        names = {Join.LARGEST: "maximum", Join.LEAST: "minimum"}
        return OPERATIONS[entry][names.get(self, "add")](b, one, other)


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes and strides in entries."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    STRIDE_0 = NUMBER  # of the operand, by axis that is kept
    STRIDE_1 = NUMBER
    STRIDE_2 = NUMBER
    SUMMED_STRIDE_0 = NUMBER  # by axis that is summed
    SUMMED_STRIDE_1 = NUMBER
    SIZE_0 = NUMBER
    SIZE_1 = NUMBER
    SIZE_2 = NUMBER
    SUMMED_SIZE_0 = NUMBER
    SUMMED_SIZE_1 = NUMBER
    BLOCK = NUMBER  # rows along the last kept axis an item
    SCALE = FLOAT  # of each sum


@kernel
def reduce(run: Run, join: Join, given: Entry, computed: Entry, target: Target) -> ir.Module:
    """Y = what the entries become, in rows, of floats times SCALE; an item is some rows along the last kept axis.

    Args:
        run: what lies together.
        join: what they become.
        given: the operand's entries.
        computed: the result's.
        target: what to compile for.
    """
    module, lanes = ir.Module(), target.lanes
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    x0 = b.bitcast(address(b, slots, get[Field.X_SLOT], get[Field.X_OFFSET]), given.kind.as_pointer())
    y0 = b.bitcast(address(b, slots, get[Field.Y_SLOT], get[Field.Y_OFFSET]), computed.kind.as_pointer())
    scale = float_field(b, get[Field.SCALE])
    rows, first = b.mul(get[Field.SIZE_0], get[Field.SIZE_1]), b.mul(item, get[Field.BLOCK])
    outer, inner = get[Field.SUMMED_SIZE_0], get[Field.SUMMED_SIZE_1]

    def joined(held: ir.Value, place: ir.Value, wide: int) -> ir.Value:
        return join.step(b, held, converted(b, load_vector(b, place, wide), given, computed, wide), computed)

    with loop(b, first, smaller(b, b.add(first, get[Field.BLOCK]), rows)) as row:
        x = at(b, x0, b.mul(b.sdiv(row, get[Field.SIZE_1]), get[Field.STRIDE_0]))
        x = at(b, x, b.mul(b.srem(row, get[Field.SIZE_1]), get[Field.STRIDE_1]))
        y = at(b, y0, b.mul(row, get[Field.SIZE_2]))

        def compute(position: ir.Value, wide: int, x: ir.Value = x, y: ir.Value = y) -> None:
            source = at(b, x, b.mul(position, get[Field.STRIDE_2]))

            def add_line(index: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
                line = at(b, source, b.mul(index, get[Field.SUMMED_STRIDE_0]))
                if run is Run.SUMMED:
                    total = _neighbours(b, line, inner, lanes, joined, join, computed)
                    return [join.unite(b, held[0], total, computed)]

                def add(i: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
                    return [joined(held[0], at(b, line, b.mul(i, get[Field.SUMMED_STRIDE_1])), wide)]

                return fold(b, const(0), inner, held, add)

            (total,) = fold(b, const(0), outer, [join.start(computed, wide)], add_line)
            if join is Join.ROOT:
                total = FUNCTIONS["sqrt"](b, module, total, wide)
            elif computed is Entry.FLOAT32:
                total = b.fmul(total, splat(b, scale, wide))
            store_vector(b, total, at(b, y, position), wide)

        spans(b, const(0), get[Field.SIZE_2], (CHAINS * lanes, lanes, 1) if run is Run.KEPT else (1,), compute)
    b.ret_void()
    return module


def _neighbours(
    b: ir.IRBuilder, line: ir.Value, count: ir.Value, lanes: int,
    joined: Callable[[ir.Value, ir.Value, int], ir.Value], join: Join, entry: Entry,
) -> ir.Value:  # fmt: skip
    """What `count` entries from `line` on become: some vectors at a time, one vector, one entry."""

    def unite(one: ir.Value, other: ir.Value) -> ir.Value:
        return join.unite(b, one, other, entry)

    start, found = const(0), list[ir.Value]()
    for wide in (CHAINS * PARTS, PARTS, 1):
        stop = b.mul(b.sdiv(count, const(wide)), const(wide))
        width, places = pieces(wide, lanes)

        def step(i: ir.Value, held: list[ir.Value], width: int = width, places: range = places) -> list[ir.Value]:
            there = [at(b, line, b.add(i, const(place))) for place in places]
            return [joined(one, place, width) for one, place in zip(held, there, strict=True)]

        held = fold(b, start, stop, [join.start(entry, width)] * len(places), step, wide)
        found.append(united(b, held, unite))
        start = stop
    return unite(unite(found[0], found[1]), found[2])
