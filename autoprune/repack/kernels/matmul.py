"""Products of many pairs of matrices, a native op; the operands are read through strides.

An item is one pair. Its right matrix is stored in the thread's scratch as panels; then some rows of the left one at a
time meet each panel. Where the rows fill no tile, `few_rows` is faster.
"""

from __future__ import annotations

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.fields import NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import F32, address, at, const, load_vector, loop, op_function, smaller, store_vector
from autoprune.repack.kernels.panels import Lines, pack, pack_turned, panel_product, tile
from autoprune.repack.kernels.rows import each

_LINE = 16  # floats in a cache line


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes and strides in floats."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET
    X_IMAGE = NUMBER  # from an image's matrices to the next one's; then from a matrix to the next, and from a row
    X_HEAD = NUMBER
    X_ROW = NUMBER
    OTHER_SLOT = SLOT
    OTHER_OFFSET = OFFSET
    OTHER_IMAGE = NUMBER
    OTHER_HEAD = NUMBER
    OTHER_LINE = NUMBER  # from a row to the next, or from a column where rows are read as columns
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    Y_IMAGE = NUMBER
    Y_HEAD = NUMBER
    Y_ROW = NUMBER
    SCRATCH_SLOT = SLOT.of("panels")
    SCRATCH_OFFSET = OFFSET.of("panels")
    SCRATCH = NUMBER.of("panels")  # from a thread's scratch to the next: see `scratch`
    HEADS = NUMBER  # matrices of an image
    ROWS = NUMBER
    INNER = NUMBER
    COLUMNS = NUMBER


def scratch(inner: int, columns: int, target: Target) -> int:
    """Floats of scratch a thread needs."""
    rows, vectors = tile(target)
    wide = vectors * target.lanes
    return -(-(wide * (1 + rows) + -(-columns // wide) * wide * inner) // _LINE) * _LINE


@kernel
def matmul(target: Target, turned: bool) -> ir.Module:
    """Y = x other, of at least a tile's rows; an item is one product.

    `turned`: a column of the right matrix lies together, not a row.
    """
    module, lanes = ir.Module(), target.lanes
    most, vectors = tile(target)
    wide = vectors * lanes
    b, fields, slots, item, thread = op_function(module)
    get = Field.load(b, fields)
    x, other, y = matrices(b, get, slots, item)
    zeros = address(b, slots, get[Field.SCRATCH_SLOT], get[Field.SCRATCH_OFFSET])
    zeros = at(b, zeros, b.mul(thread, get[Field.SCRATCH]))
    rest = at(b, zeros, const(wide))  # results in columns that fill no panel
    panels = at(b, rest, const(wide * most))
    with loop(b, const(0), const(wide)) as column:
        b.store(ir.Constant(F32, 0.0), at(b, zeros, column))
    inner, columns, step = get[Field.INNER], get[Field.COLUMNS], get[Field.OTHER_LINE]
    if turned:
        end = b.mul(b.sdiv(b.add(columns, const(wide - 1)), const(wide)), const(wide))
        pack_turned(b, Lines(other, step, columns, inner), panels, vectors, lanes, end)
    else:
        pack(b, Lines(other, step, inner, columns), panels, wide)
    _multiply(b, module, get, (x, panels, zeros, rest, y), target)
    b.ret_void()
    return module


def matrices(b: ir.IRBuilder, get: dict[Field, ir.Value], slots: ir.Value, item: ir.Value) -> tuple[ir.Value, ...]:
    """Where the left, the right and the resulting matrix of an item begin."""
    head, image = b.srem(item, get[Field.HEADS]), b.sdiv(item, get[Field.HEADS])

    def base(name: str) -> ir.Value:
        slot, offset, image_, head_ = (get[Field[f"{name}_{what}"]] for what in ("SLOT", "OFFSET", "IMAGE", "HEAD"))
        return at(b, address(b, slots, slot, offset), b.add(b.mul(image, image_), b.mul(head, head_)))

    return base("X"), base("OTHER"), base("Y")


def _multiply(
    b: ir.IRBuilder, module: ir.Module, get: dict[Field, ir.Value], places: tuple[ir.Value, ...], target: Target
) -> None:
    """All rows, in tiles; the last tile is moved back: some rows are computed twice."""
    x, panels, zeros, rest, y = places
    rows, vectors = tile(target)
    lanes, wide = target.lanes, vectors * target.lanes
    product = panel_product(module, rows, wide // lanes, lanes)
    inner, columns, pitch = get[Field.INNER], get[Field.COLUMNS], get[Field.Y_ROW]
    with loop(b, const(0), get[Field.ROWS], rows) as row:
        row = smaller(b, row, b.sub(get[Field.ROWS], const(rows)))
        left = [at(b, x, b.mul(row, get[Field.X_ROW])), get[Field.X_ROW], inner]
        with loop(b, const(0), columns, wide) as column:
            panel, into = at(b, panels, b.mul(column, inner)), at(b, y, b.add(b.mul(row, pitch), column))
            inside = b.sub(columns, column)
            with b.if_else(b.icmp_signed(">=", inside, const(wide))) as (whole, partial):
                with whole:
                    b.call(product, [*left, panel, zeros, into, pitch])
                with partial:
                    b.call(product, [*left, panel, zeros, rest, const(wide)])
                    with loop(b, const(0), const(rows)) as number:
                        line, out = at(b, rest, b.mul(number, const(wide))), at(b, into, b.mul(number, pitch))

                        def write(at_: ir.Value, count: int, line: ir.Value = line, out: ir.Value = out) -> None:
                            store_vector(b, load_vector(b, at(b, line, at_), count), at(b, out, at_), count)

                        each(b, inside, lanes, write)
