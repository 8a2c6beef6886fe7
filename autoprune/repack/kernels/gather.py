"""A native op that looks rows up in a table: embeddings."""

from __future__ import annotations

from enum import IntEnum

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, compile_op, once_a_process
from autoprune.repack.kernels.ir import LONGS, address, at, const, load_vector, loop, op_function, smaller, store_vector
from autoprune.repack.kernels.rows import each


class Field(IntEnum):
    """Entries of the int64 array that describes one op; sizes in floats."""

    TABLE_SLOT = 0
    TABLE_OFFSET = 1  # bytes
    INDEX_SLOT = 2  # int64, which nobody checks here
    INDEX_OFFSET = 3
    Y_SLOT = 4
    Y_OFFSET = 5
    ROWS = 6
    FEATURES = 7
    BLOCK = 8  # rows an item


@once_a_process
def gather(target: Target) -> int:
    """Y[row] = TABLE[INDEX[row]]; an item is some rows."""
    module = ir.Module()
    b, fields, slots, item, _ = op_function(module)
    get = {field: b.load(at(b, fields, const(field))) for field in Field}
    table, y = (address(b, slots, get[slot], get[Field(slot + 1)]) for slot in (Field.TABLE_SLOT, Field.Y_SLOT))
    index = b.bitcast(address(b, slots, get[Field.INDEX_SLOT], get[Field.INDEX_OFFSET]), LONGS)
    first = b.mul(item, get[Field.BLOCK])
    with loop(b, first, smaller(b, b.add(first, get[Field.BLOCK]), get[Field.ROWS])) as row:
        source = at(b, table, b.mul(b.load(at(b, index, row)), get[Field.FEATURES]))
        into = at(b, y, b.mul(row, get[Field.FEATURES]))

        def copy(position: ir.Value, count: int, source: ir.Value = source, into: ir.Value = into) -> None:
            store_vector(b, load_vector(b, at(b, source, position), count), at(b, into, position), count)

        each(b, get[Field.FEATURES], target.lanes, copy)
    b.ret_void()
    return compile_op(module, "op", target)
