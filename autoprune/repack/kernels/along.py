"""Native ops that go along one axis from its begin to its end: sums so far, and where the largest or least entry is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import llvmlite.ir as ir

from autoprune.repack.kernels.compiler import Target, kernel
from autoprune.repack.kernels.entries import OPERATIONS, Entry, converted
from autoprune.repack.kernels.fields import NUMBER, OFFSET, SLOT, Fields
from autoprune.repack.kernels.ir import address, at, const, fold, loop, op_function, smaller

AXES = 3  # beside the one they go along


class Field(Fields):
    """Entries of the int64 array that describes one op; strides in entries."""

    X_SLOT = SLOT
    X_OFFSET = OFFSET
    X_STRIDE_0 = NUMBER  # by axis
    X_STRIDE_1 = NUMBER
    X_STRIDE_2 = NUMBER
    X_STEP = NUMBER  # along the axis
    Y_SLOT = SLOT
    Y_OFFSET = OFFSET
    Y_STRIDE_0 = NUMBER
    Y_STRIDE_1 = NUMBER
    Y_STRIDE_2 = NUMBER
    Y_STEP = NUMBER
    SIZE_0 = NUMBER
    SIZE_1 = NUMBER
    SIZE_2 = NUMBER
    LENGTH = NUMBER  # of the axis
    BLOCK = NUMBER  # lines along the axis an item


def per_axis(name: str) -> list[Field]:
    """The fields that say something of each axis beside, such as ``X_STRIDE``, in the axes' order."""
    return [Field[f"{name}_{axis}"] for axis in range(AXES)]


@kernel
def sums_so_far(given: Entry, computed: Entry, target: Target) -> ir.Module:
    """Y[n] = X[0] + ... + X[n] along the axis, of the type `computed`; an item is some lines."""
    module = ir.Module()
    b, fields, slots, item, _ = op_function(module)
    get = Field.load(b, fields)
    with _lines(b, get, slots, item, (given, computed)) as (x, y):

        def add(n: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
            value = converted(b, b.load(at(b, x, b.mul(n, get[Field.X_STEP]))), given, computed, 1)
            total = OPERATIONS[computed]["add"](b, held[0], value)
            b.store(total, at(b, y, b.mul(n, get[Field.Y_STEP])))
            return [total]

        fold(b, const(0), get[Field.LENGTH], [computed.constant(0, 1)], add)
    b.ret_void()
    return module


@kernel
def place_of(largest: bool, given: Entry, target: Target) -> ir.Module:
    """Y = the int64 that tells where the first of the largest entries is along the axis, or of the least ones.

    NaN is before all. An item is some lines.
    """
    module = ir.Module()
    b, fields, slots, item, _ = op_function(module)
    get, sign = Field.load(b, fields), ">" if largest else "<"
    with _lines(b, get, slots, item, (given, Entry.INT64)) as (x, y):

        def meet(n: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
            value = b.load(at(b, x, b.mul(n, get[Field.X_STEP])))
            if given is Entry.FLOAT32:
                better = b.and_(b.fcmp_unordered(sign, value, held[0]), b.fcmp_ordered("ord", held[0], held[0]))
            else:
                better = (b.icmp_signed if given.signed else b.icmp_unsigned)(sign, value, held[0])
            return [b.select(better, value, held[0]), b.select(better, n, held[1])]

        found = fold(b, const(1), get[Field.LENGTH], [b.load(x), const(0)], meet)
        b.store(found[1], y)
    b.ret_void()
    return module


@contextmanager
def _lines(
    b: ir.IRBuilder, get: dict[Field, ir.Value], slots: ir.Value, item: ir.Value, kinds: tuple[Entry, Entry]
) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Where each of an item's lines begins, in X and in Y; the block is the body of the loop over them."""
    bases = []
    for name, entry in zip("XY", kinds, strict=True):
        place = address(b, slots, get[Field[f"{name}_SLOT"]], get[Field[f"{name}_OFFSET"]])
        bases.append(b.bitcast(place, entry.kind.as_pointer()))
    sizes, first = [get[field] for field in per_axis("SIZE")], b.mul(item, get[Field.BLOCK])
    lines = b.mul(b.mul(sizes[0], sizes[1]), sizes[2])
    with loop(b, first, smaller(b, b.add(first, get[Field.BLOCK]), lines)) as line:
        rest: ir.Value = line
        for axis in (2, 1, 0):
            index, rest = b.srem(rest, sizes[axis]), b.sdiv(rest, sizes[axis])
            strides = [get[Field[f"{name}_STRIDE_{axis}"]] for name in "XY"]
            bases = [at(b, base, b.mul(index, stride)) for base, stride in zip(bases, strides, strict=True)]
        yield bases[0], bases[1]
