"""A native op that takes rows by their numbers: embeddings, and `torch.gather` of whole rows."""

from __future__ import annotations

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import LONGS, address, at, const, load_vector, loop, op_function, smaller, store_vector
from autoprune.repack.kernels.rows import each


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes and strides in entries of the array they belong to."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET
    X_BATCH = NUMBER  # from a batch entry's rows to the next one's
    X_ROW = NUMBER
    INDEX_SLOT = SLOT  # int64
    INDEX_OFFSET = OFFSET
    INDEX_BATCH = NUMBER
    INDEX_ROW = NUMBER
    Y_SLOT = SLOT  # row after row
    Y_OFFSET = OFFSET
    WRONG_SLOT = SLOT.of("checked")  # int64: becomes 1 where a number is no row's; row 0 is taken then
    WRONG_OFFSET = OFFSET.of("checked")
    LIMIT = NUMBER.of("checked")  # rows of x a batch entry
    BATCH = NUMBER
    ROWS = NUMBER  # taken of each batch entry
    FEATURES = NUMBER
    BLOCK = NUMBER  # rows an item


@kernel
def gather(checked: bool, target: Target) -> ir.Module:
    """Y[entry, row] = X[entry, INDEX[entry, row]]; an item is some rows.

    Args:
        checked: whether numbers are checked here; else somebody must have done so.
        target: what to compile for.
    """
    module = ir.Module()
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)

    x = address(b, slots, get[Field.X_SLOT], get[Field.X_OFFSET])
    y = address(b, slots, get[Field.Y_SLOT], get[Field.Y_OFFSET])
    index = b.bitcast(address(b, slots, get[Field.INDEX_SLOT], get[Field.INDEX_OFFSET]), LONGS)
    first = b.mul(item, get[Field.BLOCK])
    rows = b.mul(get[Field.BATCH], get[Field.ROWS])
    with loop(b, first, smaller(b, b.add(first, get[Field.BLOCK]), rows)) as row:
        entry, number_of = b.sdiv(row, get[Field.ROWS]), b.srem(row, get[Field.ROWS])
        told = b.add(b.mul(entry, get[Field.INDEX_BATCH]), b.mul(number_of, get[Field.INDEX_ROW]))
        number = b.load(at(b, index, told))
        if checked:
            there = b.icmp_unsigned("<", number, get[Field.LIMIT])  # a negative one is a huge one
            with b.if_then(b.not_(there)):
                wrong = address(b, slots, get[Field.WRONG_SLOT], get[Field.WRONG_OFFSET])
                b.store(const(1), b.bitcast(wrong, LONGS))
            number = b.select(there, number, const(0))
        source = at(b, x, b.add(b.mul(entry, get[Field.X_BATCH]), b.mul(number, get[Field.X_ROW])))
        into = at(b, y, b.mul(row, get[Field.FEATURES]))

        def copy(position: ir.Value, count: int, source: ir.Value = source, into: ir.Value = into) -> None:
            store_vector(b, load_vector(b, at(b, source, position), count), at(b, into, position), count)

        each(b, get[Field.FEATURES], target.lanes, copy)
    b.ret_void()
    return module
