"""A native op that takes rows by their numbers: embeddings, and `torch.gather` of whole rows."""

from __future__ import annotations

from enum import IntEnum

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, compile_op, once_a_process
from autoprune.repack.kernels.ir import LONGS, address, at, const, load_vector, loop, op_function, smaller, store_vector
from autoprune.repack.kernels.rows import each


class Field(IntEnum):
    """Entries of the int64 array that describes one op; sizes and strides in entries of the array they belong to."""

    X_SLOT = 0
    X_OFFSET = 1  # bytes
    X_BATCH = 2  # from a batch entry's rows to the next one's
    X_ROW = 3
    INDEX_SLOT = 4  # int64
    INDEX_OFFSET = 5
    INDEX_BATCH = 6
    INDEX_ROW = 7
    Y_SLOT = 8  # row after row
    Y_OFFSET = 9
    WRONG_SLOT = 10  # int64, where numbers are checked: becomes 1 where one is no row's; row 0 is taken then
    WRONG_OFFSET = 11
    LIMIT = 12  # rows of x a batch entry, where numbers are checked
    BATCH = 13
    ROWS = 14  # taken of each batch entry
    FEATURES = 15
    BLOCK = 16  # rows an item


@once_a_process
def gather(checked: bool, target: Target) -> int:
    """Y[entry, row] = X[entry, INDEX[entry, row]]; an item is some rows.

    Args:
        checked: whether numbers are checked here; else somebody must have done so.
        target: what to compile for.
    """
    module = ir.Module()
    b, fields, slots, item, _ = op_function(module)
    get = {field: b.load(at(b, fields, const(field))) for field in Field}

    def place(slot: Field) -> ir.Value:
        return address(b, slots, get[slot], get[Field(slot + 1)])

    x, y, index = place(Field.X_SLOT), place(Field.Y_SLOT), b.bitcast(place(Field.INDEX_SLOT), LONGS)
    first = b.mul(item, get[Field.BLOCK])
    rows = b.mul(get[Field.BATCH], get[Field.ROWS])
    with loop(b, first, smaller(b, b.add(first, get[Field.BLOCK]), rows)) as row:
        entry, number_of = b.sdiv(row, get[Field.ROWS]), b.srem(row, get[Field.ROWS])
        told = b.add(b.mul(entry, get[Field.INDEX_BATCH]), b.mul(number_of, get[Field.INDEX_ROW]))
        number = b.load(at(b, index, told))
        if checked:
            there = b.icmp_unsigned("<", number, get[Field.LIMIT])  # a negative one is a huge one
            with b.if_then(b.not_(there)):
                b.store(const(1), b.bitcast(place(Field.WRONG_SLOT), LONGS))
            number = b.select(there, number, const(0))
        source = at(b, x, b.add(b.mul(entry, get[Field.X_BATCH]), b.mul(number, get[Field.X_ROW])))
        into = at(b, y, b.mul(row, get[Field.FEATURES]))

        def copy(position: ir.Value, count: int, source: ir.Value = source, into: ir.Value = into) -> None:
            store_vector(b, load_vector(b, at(b, source, position), count), at(b, into, position), count)

        each(b, get[Field.FEATURES], target.lanes, copy)
    b.ret_void()
    return compile_op(module, "op", target)
