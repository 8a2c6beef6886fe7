"""A native op that takes entries by their numbers along some axes: embeddings, gathering, indexing by tensors."""

from __future__ import annotations

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.entries import Entry
from autoprune.repack.kernels.fields import NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import (
    I64,
    LONGS,
    address,
    at,
    const,
    load_vector,
    loop,
    op_function,
    smaller,
    store_vector,
)
from autoprune.repack.kernels.rows import each

AXES = 4  # of the result
INDICES = 3  # axes of the operand that are told by numbers, at most


class Field(Fields):
    """Entries of the int64 array that describes one op; sizes and strides in entries of the array they belong to."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET
    X_STRIDE_0 = NUMBER  # by axis of the result; 0 where numbers tell
    X_STRIDE_1 = NUMBER
    X_STRIDE_2 = NUMBER
    X_STRIDE_3 = NUMBER
    Y_SLOT = SLOT  # row after row
    Y_OFFSET = OFFSET
    SIZE_0 = NUMBER
    SIZE_1 = NUMBER
    SIZE_2 = NUMBER
    SIZE_3 = NUMBER
    INDEX_0_SLOT = SLOT  # int64 or int32
    INDEX_0_OFFSET = OFFSET
    INDEX_0_STRIDE_0 = NUMBER
    INDEX_0_STRIDE_1 = NUMBER
    INDEX_0_STRIDE_2 = NUMBER
    INDEX_0_STRIDE_3 = NUMBER
    INDEX_0_STEP = NUMBER  # from an entry of the operand's axis to the next
    INDEX_0_LIMIT = NUMBER  # entries of that axis
    INDEX_1_SLOT = SLOT.of("second")
    INDEX_1_OFFSET = OFFSET.of("second")
    INDEX_1_STRIDE_0 = NUMBER.of("second")
    INDEX_1_STRIDE_1 = NUMBER.of("second")
    INDEX_1_STRIDE_2 = NUMBER.of("second")
    INDEX_1_STRIDE_3 = NUMBER.of("second")
    INDEX_1_STEP = NUMBER.of("second")
    INDEX_1_LIMIT = NUMBER.of("second")
    INDEX_2_SLOT = SLOT.of("third")
    INDEX_2_OFFSET = OFFSET.of("third")
    INDEX_2_STRIDE_0 = NUMBER.of("third")
    INDEX_2_STRIDE_1 = NUMBER.of("third")
    INDEX_2_STRIDE_2 = NUMBER.of("third")
    INDEX_2_STRIDE_3 = NUMBER.of("third")
    INDEX_2_STEP = NUMBER.of("third")
    INDEX_2_LIMIT = NUMBER.of("third")
    WRONG_SLOT = SLOT.of("checked")  # int64: becomes 1 where a number is no entry's; entry 0 is taken then
    WRONG_OFFSET = OFFSET.of("checked")
    BLOCK = NUMBER  # rows along the last axis an item


def per_axis(name: str) -> list[Field]:
    """The fields that say something of each axis, such as ``X_STRIDE``, in the axes' order."""
    return [Field[f"{name}_{axis}"] for axis in range(AXES)]


@kernel
def gather(indices: tuple[Entry, ...], size: int, whole: bool, checked: bool, below: bool, target: Target) -> ir.Module:
    """Y[...] = X[..., INDEX_0[...], ..., INDEX_1[...], ...]; an item is some rows along the last axis.

    Args:
        indices: the types of the numbers along each axis that they tell: INT64 or INT32.
        size: bytes of an entry.
        whole: whether no number differs along the last axis, and its entries are neighbours.
        checked: whether numbers are checked here; else somebody must have done so.
        below: whether numbers below 0 count from the end.
        target: what to compile for.
    """
    module, entry = ir.Module(), ir.IntType(8 * size)
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)

    def base(name: str, kind: ir.Type) -> ir.Value:
        return b.bitcast(address(b, slots, get[Field[f"{name}_SLOT"]], get[Field[f"{name}_OFFSET"]]), kind.as_pointer())

    x0, y0 = base("X", entry), base("Y", entry)
    numbers = [base(f"INDEX_{number}", kind.kind) for number, kind in enumerate(indices)]
    names = ["X_STRIDE", *(f"INDEX_{number}_STRIDE" for number in range(len(indices)))]
    strides = [[get[field] for field in per_axis(name)] for name in names]
    sizes = [get[field] for field in per_axis("SIZE")]

    def entry_of(number: int, place: ir.Value) -> ir.Value:
        return _led(b, get, number, b.load(place), b.bitcast(base("WRONG", entry), LONGS) if checked else None, below)

    first = b.mul(item, get[Field.BLOCK])
    rows = b.mul(b.mul(sizes[0], sizes[1]), sizes[2])
    with loop(b, first, smaller(b, b.add(first, get[Field.BLOCK]), rows)) as row:
        rest, places = row, [x0, *numbers]
        for axis in (2, 1, 0):
            index, rest = b.srem(rest, sizes[axis]), b.sdiv(rest, sizes[axis])
            places = [at(b, place, b.mul(index, own[axis])) for place, own in zip(places, strides, strict=True)]
        source, *told = places
        into = at(b, y0, b.mul(row, sizes[3]))
        if whole:
            for number, place in enumerate(told):
                source = at(b, source, entry_of(number, place))

            def copy(position: ir.Value, count: int, source: ir.Value = source, into: ir.Value = into) -> None:
                store_vector(b, load_vector(b, at(b, source, position), count), at(b, into, position), count)

            each(b, sizes[3], target.lanes, copy)
        else:
            with loop(b, const(0), sizes[3]) as position:
                here = at(b, source, b.mul(position, strides[0][3]))
                for number, place in enumerate(told):
                    own = at(b, place, b.mul(position, strides[1 + number][3]))
                    here = at(b, here, entry_of(number, own))
                b.store(b.load(here), at(b, into, position))
    b.ret_void()
    return module


def _led(
    b: ir.IRBuilder, get: dict[Field, ir.Value], number: int, told: ir.Value, wrong: ir.Value | None, below: bool
) -> ir.Value:
    """How far into the operand the number `told` leads along the axis of index `number`."""
    limit = get[Field[f"INDEX_{number}_LIMIT"]]
    told = told if told.type == I64 else b.sext(told, I64)
    if below:
        told = b.select(b.icmp_signed("<", told, const(0)), b.add(told, limit), told)
    if wrong is not None:
        there = b.icmp_unsigned("<", told, limit)  # a negative one is a huge one
        with b.if_then(b.not_(there)):
            b.store(const(1), wrong)
        told = b.select(there, told, const(0))
    return b.mul(told, get[Field[f"INDEX_{number}_STEP"]])
