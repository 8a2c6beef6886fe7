"""LSTM and GRU over a whole sequence, a native op: one direction of one layer, from its input projections.

A row of the projections and of the recurrent weight is one gate of one unit; the gates of a unit are neighbours
(row = unit * gates + gate), so a group of filters holds whole units and the cell reads the gates without a gather.
At each step the packed recurrent weight meets the state before it in one of three ways: group by group, as a Linear;
column by column, the columns of states that are zero left out, which pays where many are; or, of bytes, with the state
rounded to bytes, as in `dot_rows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import llvmlite.ir as ir

from autoprune.model.recurrent.names import GATES
from autoprune.repack.kernels import dot_rows, dot_tile
from autoprune.repack.kernels.bytes_rows import Onto, quantise_row
from autoprune.repack.kernels.compiler import Target, kernel
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
    fma,
    load_vector,
    long_at,
    loop,
    module_of_bytes,
    op_function,
    pointer_field,
    smaller,
    splat,
    store_vector,
)
from autoprune.repack.kernels.math import splat_float
from autoprune.repack.kernels.recurrent_cells import CELLS, gates_of, together
from autoprune.repack.kernels.rows import each
from autoprune.repack.kernels.rows_gemm import PackedArrays, group_product


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes in floats."""

    X_SLOT = SLOT  # input projections, (units * gates) an entry and step
    X_OFFSET = OFFSET
    X_STEP = NUMBER  # from a step to the next
    X_ENTRY = NUMBER  # from an entry of the batch to the next
    Y_SLOT = SLOT  # states, (hidden,) an entry and step
    Y_OFFSET = OFFSET
    Y_STEP = NUMBER
    Y_ENTRY = NUMBER
    Y_CELL = NUMBER  # from a state to its cell's, where there is one
    H_SLOT = SLOT  # the state before the first step
    H_OFFSET = OFFSET
    H_ENTRY = NUMBER
    C_SLOT = SLOT  # the cell's before the first step
    C_OFFSET = OFFSET
    C_ENTRY = NUMBER
    SCRATCH_SLOT = SLOT
    SCRATCH_OFFSET = OFFSET
    SCRATCH = NUMBER  # of one entry, see `scratch`
    STEPS = NUMBER
    BATCH = NUMBER
    BLOCK = NUMBER  # entries an item
    REVERSE = NUMBER  # 1: from the last step to the first
    HIDDEN = NUMBER
    UNITS = NUMBER  # that are computed; the others' states are 0
    UNIT_INDEX = INT32_ARRAY  # per unit: its place in the state
    GROUP_POINTER = INT32_ARRAY  # by group, or by column
    INDEX = INT32_ARRAY.of("floats")  # per kept position: its column, or its group's first row
    VALUES = FLOAT32_ARRAY.of("floats")
    OUT_INDEX = INT32_ARRAY.of("floats")  # per row: its place, -1 for none
    OFFSETS = INT32_ARRAY.of("bytes")  # this and the next ones: see `dot_rows.Field`
    CELLS = INT32_ARRAY.of("bytes")
    FACTOR = FLOAT32_ARRAY.of("bytes")
    Y_CHANNEL = INT32_ARRAY.of("bytes")
    MIXED_POINTER = INT32_ARRAY.of("mixed")
    MIXED_OFFSETS = INT32_ARRAY.of("mixed")
    MIXED_BYTES = INT32_ARRAY.of("mixed")
    MIXED_CELLS = INT32_ARRAY.of("mixed")
    INVERSE = FLOAT.of("bytes")  # the grid of the states that meet bytes, see `bytes_rows.Field`
    LOW = FLOAT.of("bytes")
    HIGH = FLOAT.of("bytes")
    ZERO = NUMBER.of("bytes")
    BIAS = FLOAT32_ARRAY  # by row of the groups, or by row
    FIRST = INT32_ARRAY  # per group: its first row when its rows are neighbours, else -1
    TWIN = INT32_ARRAY.of("twins")  # per group, see `rows_gemm.Twin`; only where twins are computed as one
    GROUPS = NUMBER
    THRESHOLD = FLOAT  # smaller states are 0
    KEEP = NUMBER  # the largest states of a step that are kept
    START = INT32_ARRAY.of("signed")  # see `dot_rows.Field`


@dataclass(frozen=True)
class Form:
    """What a kernel is made for.

    Attributes:
        cell: ``lstm`` or ``gru``.
        rows: filters in a packed group.
        twins: whether groups are computed with their twins, see `rows_gemm.Twin`.
        columns: whether the weight is walked by column, zero states left out.
        prune: how states become zero: ``""``, ``threshold`` or ``top``.
        int8: whether the weight is bytes, and so are the states that it meets.
        mixed: whether it has mixed cells, see `dot_rows`.
    """

    cell: str
    rows: int
    twins: bool = False
    columns: bool = False
    prune: str = ""
    int8: bool = False
    mixed: bool = False


def scratch(cell: str, units: int, hidden: int) -> int:
    """Floats of scratch an entry of the batch needs: projections, cells, states, live columns."""
    return (GATES[cell] + 2) * units + hidden


@kernel
def recurrent(form: Form, target: Target) -> ir.Module:
    """The op; an item is some entries of the batch, all steps of them."""
    module, lanes = module_of_bytes(target.fused or not form.int8), target.lanes
    product = (_by_cell if form.int8 else _by_column if form.columns else _by_group)(module, form, target)
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    x0 = address(b, slots, get[Field.X_SLOT], get[Field.X_OFFSET])
    y0 = address(b, slots, get[Field.Y_SLOT], get[Field.Y_OFFSET])
    h0 = address(b, slots, get[Field.H_SLOT], get[Field.H_OFFSET])
    c0 = address(b, slots, get[Field.C_SLOT], get[Field.C_OFFSET])
    work0 = address(b, slots, get[Field.SCRATCH_SLOT], get[Field.SCRATCH_OFFSET])
    unit_index = pointer_field(b, get[Field.UNIT_INDEX], INTS)
    units, gates = get[Field.UNITS], GATES[form.cell]
    first = b.mul(item, get[Field.BLOCK])
    last = smaller(b, b.add(first, get[Field.BLOCK]), get[Field.BATCH])
    whole = b.icmp_signed("==", units, get[Field.HIDDEN])  # then states and cells are written where they are read
    backwards = b.icmp_signed("!=", get[Field.REVERSE], const(0))
    final = b.sub(get[Field.STEPS], const(1))

    def entry_work(entry: ir.Value) -> _Work:
        projected = at(b, work0, b.mul(entry, get[Field.SCRATCH]))
        cell = at(b, projected, b.mul(units, const(gates)))
        state = at(b, cell, units)
        return _Work(projected, cell, state, b.bitcast(at(b, state, units), INTS))

    with loop(b, first, last) as entry:
        own = entry_work(entry)
        # a GRU carries its state alone; an LSTM its cell
        source, stride = (c0, Field.C_ENTRY) if form.cell == "lstm" else (h0, Field.H_ENTRY)
        start = at(b, source, b.mul(entry, get[stride]))
        with loop(b, const(0), units) as unit:
            b.store(b.load(at(b, start, long_at(b, unit_index, unit))), at(b, own.cell, unit))

    with loop(b, const(0), get[Field.STEPS]) as count:
        step = b.select(backwards, b.sub(final, count), count)
        before = b.select(backwards, b.add(step, const(1)), b.sub(step, const(1)))
        begins = b.icmp_signed("==", count, const(0))
        past = b.select(begins, h0, at(b, y0, b.mul(before, get[Field.Y_STEP])))
        past_entry = b.select(begins, get[Field.H_ENTRY], get[Field.Y_ENTRY])
        product(b, get, past, past_entry, first, last, entry_work)
        with loop(b, first, last) as entry:
            own = entry_work(entry)
            x = at(b, x0, b.add(b.mul(step, get[Field.X_STEP]), b.mul(entry, get[Field.X_ENTRY])))
            y = at(b, y0, b.add(b.mul(step, get[Field.Y_STEP]), b.mul(entry, get[Field.Y_ENTRY])))
            place = b.add(b.mul(entry, past_entry), get[Field.Y_CELL] if form.cell == "lstm" else const(0))
            kept = b.select(b.and_(whole, b.not_(begins)), at(b, past, place), own.cell)
            _advance(b, module, form, lanes, get, own, x, y, kept, whole)
    b.ret_void()
    return module


@dataclass(frozen=True)
class _Work:
    """One entry's scratch.

    Attributes:
        projected: the recurrent weight's product, gates of a unit side by side.
        cell: what the next step starts from, by unit.
        state: by unit.
        live: room for the columns that are not zero, or for the bytes of a state.
    """

    projected: ir.Value
    cell: ir.Value
    state: ir.Value
    live: ir.Value


_Entries = Callable[[ir.Value], _Work]
_Get = Mapping[Field, ir.Value]
_Product = Callable[[ir.IRBuilder, _Get, ir.Value, ir.Value, ir.Value, ir.Value, _Entries], None]


def _by_group(module: ir.Module, form: Form, target: Target) -> _Product:
    """Each group's rows at once, several entries of the batch together."""
    compute = group_product(module, form.rows, target, twins=form.twins)

    def product(
        b: ir.IRBuilder, get: _Get, past: ir.Value, past_entry: ir.Value, first: ir.Value, last: ir.Value,
        entry_work: _Entries,
    ) -> None:  # fmt: skip
        packed = PackedArrays(*(get[Field[name.upper()]] for name in PackedArrays._fields))
        x, y = (past, past_entry), (entry_work(const(0)).projected, get[Field.SCRATCH])
        unbounded = ir.Constant(F32, -math.inf), ir.Constant(F32, math.inf)
        with loop(b, const(0), get[Field.GROUPS]) as group:
            compute(b, packed, group, (first, last, get[Field.BATCH]), x, y, (y[0], const(0)), const(0), unbounded)

    return product


def _by_cell(module: ir.Module, form: Form, target: Target) -> _Product:
    """Each group's rows at once, of bytes: the entries' states become bytes before."""
    compute = dot_rows.group_product(module, form.rows, target, dot_tile.Ending("floats"), form.mixed)
    numbers = dot_tile.Scalars(*(ir.Constant(F32, each) for each in (0.0, -math.inf, math.inf, 1.0, 0.0)))

    def product(
        b: ir.IRBuilder, get: _Get, past: ir.Value, past_entry: ir.Value, first: ir.Value, last: ir.Value,
        entry_work: _Entries,
    ) -> None:  # fmt: skip
        inverse, low, high = (float_field(b, get[each]) for each in (Field.INVERSE, Field.LOW, Field.HIGH))
        grid = Onto(inverse, low, high, get[Field.ZERO])
        with loop(b, first, last) as entry:
            place = b.bitcast(entry_work(entry).live, I8.as_pointer())
            quantise_row(b, at(b, past, b.mul(entry, past_entry)), place, get[Field.HIDDEN], grid, target.lanes)
        cells = dot_rows.PackedCells(
            *(get[each] for each in (
                Field.GROUP_POINTER, Field.OFFSETS, Field.CELLS, Field.FACTOR, Field.BIAS, Field.Y_CHANNEL, Field.FIRST,
                Field.MIXED_POINTER, Field.MIXED_OFFSETS, Field.MIXED_BYTES, Field.MIXED_CELLS, Field.START,
            ))
        )  # fmt: skip
        own = entry_work(const(0))
        x, y = (own.live, get[Field.SCRATCH]), (b.bitcast(own.projected, INTS), get[Field.SCRATCH])
        with loop(b, const(0), get[Field.GROUPS]) as group:
            compute(b, cells, group, (first, last), x, y, None, numbers)

    return product


def _by_column(module: ir.Module, form: Form, target: Target) -> _Product:
    """The columns of an entry's states that are not zero, one after another."""
    wide = min(form.rows, target.lanes)

    def product(
        b: ir.IRBuilder, get: _Get, past: ir.Value, past_entry: ir.Value, first: ir.Value, last: ir.Value,
        entry_work: _Entries,
    ) -> None:  # fmt: skip
        pointer = pointer_field(b, get[Field.GROUP_POINTER], INTS)
        index = pointer_field(b, get[Field.INDEX], INTS)
        values = pointer_field(b, get[Field.VALUES], FLOATS)
        bias = pointer_field(b, get[Field.BIAS], FLOATS)
        size = b.mul(get[Field.UNITS], const(GATES[form.cell]))
        with b.goto_entry_block():
            live_count = b.alloca(I64)
        with loop(b, first, last) as entry:
            own = entry_work(entry)
            x = at(b, past, b.mul(entry, past_entry))
            b.store(const(0), live_count)
            with loop(b, const(0), get[Field.HIDDEN]) as column:  # without a branch: which are zero is no pattern
                count = b.load(live_count)
                b.store(b.trunc(column, I32), at(b, own.live, count))
                lives = b.fcmp_unordered("!=", b.load(at(b, x, column)), ir.Constant(F32, 0.0))
                b.store(b.add(count, b.zext(lives, I64)), live_count)

            def copy(row: ir.Value, lanes: int, own: _Work = own) -> None:
                store_vector(b, load_vector(b, at(b, bias, row), lanes), at(b, own.projected, row), lanes)

            each(b, size, target.lanes, copy)
            with loop(b, const(0), b.load(live_count)) as number:
                column = long_at(b, own.live, number)
                state = splat(b, b.load(at(b, x, column)), wide)
                begin, end = long_at(b, pointer, column), long_at(b, pointer, b.add(column, const(1)))
                with loop(b, begin, end) as place:
                    row = at(b, own.projected, long_at(b, index, place))
                    weights = at(b, values, b.mul(place, const(form.rows)))
                    for part in range(0, form.rows, wide):
                        here = at(b, row, const(part))
                        weight = load_vector(b, at(b, weights, const(part)), wide)
                        total = b.call(fma(module, wide), [weight, state, load_vector(b, here, wide)])
                        store_vector(b, total, here, wide)

    return product


def _advance(
    b: ir.IRBuilder, module: ir.Module, form: Form, lanes: int, get: _Get, own: _Work, x: ir.Value, y: ir.Value,
    kept: ir.Value, whole: ir.Value,
) -> None:  # fmt: skip
    """A step of an entry: its cells and states, from its projections `x` and the cells before, to `y`.

    Where they are the `whole` state they are computed in place, otherwise in `own`.
    """
    units, gates = get[Field.UNITS], GATES[form.cell]
    cells = at(b, y, get[Field.Y_CELL]) if form.cell == "lstm" else y
    own = replace(own, cell=b.select(whole, cells, own.cell), state=b.select(whole, y, own.state))

    def compute(unit: ir.Value, wide: int) -> None:
        given = gates_of(b, at(b, x, b.mul(unit, const(gates))), gates, wide)
        learned = gates_of(b, at(b, own.projected, b.mul(unit, const(gates))), gates, wide)
        cell = load_vector(b, at(b, kept, unit), wide)
        cell, state = CELLS[form.cell](b, module, given, learned, cell, wide)
        if form.prune == "threshold":
            state = _cut(b, module, state, float_field(b, get[Field.THRESHOLD]), wide)
        store_vector(b, cell if form.cell == "lstm" else state, at(b, own.cell, unit), wide)
        store_vector(b, state, at(b, own.state, unit), wide)

    each(b, units, lanes, compute, together(lanes))
    if form.prune == "top":
        _keep_largest(b, module, own, units, get[Field.KEEP], form.cell, lanes)
    with b.if_then(b.not_(whole)):
        _emit(b, own, y, get, form.cell, lanes)


def _size(b: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """|value| as an integer that orders like it."""
    kind: ir.Type = ir.VectorType(I32, lanes) if lanes > 1 else I32
    mask = 0x7FFFFFFF
    return b.and_(b.bitcast(value, kind), ir.Constant(kind, [mask] * lanes if lanes > 1 else mask))


def _cut(b: ir.IRBuilder, module: ir.Module, value: ir.Value, threshold: ir.Value, lanes: int) -> ir.Value:
    """Zero where |value| is below a threshold >= 0; NaN stays."""
    least = b.bitcast(splat(b, threshold, lanes), _size(b, value, lanes).type)
    small = b.icmp_signed("<", _size(b, value, lanes), least)
    return b.select(small, splat_float(0.0, lanes), value)


def _keep_largest(
    b: ir.IRBuilder, module: ir.Module, own: _Work, units: ir.Value, keep: ir.Value, cell: str, lanes: int
) -> None:
    """Zeroes all states but the `keep` largest; of states as large as the last of them, none.

    The last one's size is found bit by bit: floats order like their bits.
    """
    with b.goto_entry_block():
        found, more = b.alloca(I32), b.alloca(I64)
    b.store(ir.Constant(I32, 0), found)
    with loop(b, const(0), const(31)) as number:
        bit = b.shl(ir.Constant(I32, 1), b.trunc(b.sub(const(30), number), I32))
        candidate = b.or_(b.load(found), bit)
        b.store(const(0), more)

        def count(unit: ir.Value, wide: int, candidate: ir.Value = candidate) -> None:
            size = _size(b, load_vector(b, at(b, own.state, unit), wide), wide)
            least = candidate if wide == 1 else _splat_int(b, candidate, wide)
            large = b.icmp_signed(">=", size, least)
            if wide == 1:
                total = b.zext(large, I64)
            else:
                bits = ir.IntType(wide)
                ones = module.globals.get(f"llvm.ctpop.i{wide}") or ir.Function(
                    module, ir.FunctionType(bits, [bits]), f"llvm.ctpop.i{wide}"
                )
                total = b.zext(b.call(ones, [b.bitcast(large, bits)]), I64)
            b.store(b.add(b.load(more), total), more)

        each(b, units, lanes, count)
        enough = b.icmp_signed(">=", b.load(more), keep)
        b.store(b.select(enough, candidate, b.load(found)), found)

    def cut(unit: ir.Value, wide: int) -> None:
        value = load_vector(b, at(b, own.state, unit), wide)
        value = _cut(b, module, value, b.bitcast(b.load(found), F32), wide)
        store_vector(b, value, at(b, own.state, unit), wide)
        if cell == "gru":
            store_vector(b, value, at(b, own.cell, unit), wide)

    each(b, units, lanes, cut)


def _splat_int(b: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    return b.bitcast(splat(b, b.bitcast(scalar, F32), lanes), ir.VectorType(I32, lanes))


def _emit(b: ir.IRBuilder, own: _Work, y: ir.Value, get: _Get, cell: str, lanes: int) -> None:
    """Writes a step's states, and cells, to their places; zeros between them."""
    unit_index = pointer_field(b, get[Field.UNIT_INDEX], INTS)
    for source, place in [(own.state, y)] + ([(own.cell, at(b, y, get[Field.Y_CELL]))] if cell == "lstm" else []):

        def clear(unit: ir.Value, wide: int, place: ir.Value = place) -> None:
            store_vector(b, splat_float(0.0, wide), at(b, place, unit), wide)

        each(b, get[Field.HIDDEN], lanes, clear)
        with loop(b, const(0), get[Field.UNITS]) as unit:
            b.store(b.load(at(b, source, unit)), at(b, place, long_at(b, unit_index, unit)))
