"""Builds the ops that read values wherever they lie, by their strides: element by element, or rows by their numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

from autoprune.errors import AutopruneError
from autoprune.repack.kernels import (
    gather,
    strided,
)
from autoprune.repack.kernels.compiler import Target
from autoprune.repack.lowering.geometry import CHUNK_FLOATS, Place, clamped, op_of
from autoprune.repack.native.op import NativeOp


def pointwise(
    name: str, shape: tuple[int, ...], x: Place, other: Place | None, y: Place, operation: str, activation: str | None,
    target: Target,
) -> NativeOp:  # fmt: skip
    """One value, or two combined, written in rows; strides of 0 repeat a value."""
    f = strided.Field
    places = [place for place in (x, other, y) if place is not None]
    sizes, strides = merged_axes(shape, [place[2] for place in places])
    if len(sizes) > strided.AXES:
        raise AutopruneError(f"{name!r} of shape {shape} has more than {strided.AXES} axes that lie apart.")
    slots = (f.X_SLOT, f.OTHER_SLOT, f.Y_SLOT) if other else (f.X_SLOT, f.Y_SLOT)
    given: dict[IntEnum, Any] = {f(f.SIZE + axis): size for axis, size in enumerate(sizes)}
    for slot, place, steps in zip(slots, places, strides, strict=True):
        given |= {f(slot + index): number for index, number in enumerate((*place[:2], *steps))}
    rows = math.prod(sizes[:-1])
    block = max(1, min(rows, CHUNK_FLOATS // (4 * max(1, sizes[-1]))))
    low, high, function = clamped(activation)
    given |= {f.BLOCK: block, f.LOW: low, f.HIGH: high}
    lie = [strided.Along.RUN if steps[-1] == 1 else strided.Along.APART if steps[-1] else strided.Along.SAME
           for steps in strides[:-1]]  # fmt: skip
    kernel = strided.strided(lie[0], lie[1] if other else None, operation, function, target)
    return op_of(name, kernel, f, given, -(-rows // block) if sizes[-1] else 0)


def taken(
    name: str, x: Place, index: Place, y: Place, size: tuple[int, int, int], checked: tuple[int, int, int] | None,
    target: Target,
) -> NativeOp:  # fmt: skip
    """Rows by their int64 numbers, batch entry by batch entry.

    Args:
        name: of what is computed.
        x: strides are from a batch entry to the next and from a row to the next.
        index: likewise.
        y: contiguous.
        size: batch entries, rows taken of each, features.
        checked: slot and bytes of the int64 that tells of a number which is no row's, and how many rows x has for each
            batch entry; None where the numbers are known to be right.
        target: what to compile for.
    """
    f = gather.Field
    batch, rows, features = size
    block = max(1, min(batch * rows, CHUNK_FLOATS // (4 * max(1, features))))
    given: dict[IntEnum, Any] = {
        f.X_SLOT: x[0], f.X_OFFSET: x[1], f.X_BATCH: x[2][0], f.X_ROW: x[2][1], f.INDEX_SLOT: index[0],
        f.INDEX_OFFSET: index[1], f.INDEX_BATCH: index[2][0], f.INDEX_ROW: index[2][1], f.Y_SLOT: y[0],
        f.Y_OFFSET: y[1], f.BATCH: batch, f.ROWS: rows, f.FEATURES: features, f.BLOCK: block,
    }  # fmt: skip
    if checked is not None:
        given |= dict(zip((f.WRONG_SLOT, f.WRONG_OFFSET, f.LIMIT), checked, strict=True))
    return op_of(name, gather.gather(checked is not None, target), f, given, -(-batch * rows // block))


def merged_axes(
    shape: tuple[int, ...], strides: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The same entries in as few axes as can be, at least `strided.AXES`, the last of stride 1 in the last operand."""
    sizes, steps = list[int](), [list[int]() for _ in strides]
    for size, *apart in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if sizes and all(each[-1] == step * size for each, step in zip(steps, apart, strict=True)):
            sizes[-1] *= size
            for each, step in zip(steps, apart, strict=True):
                each[-1] = step
        else:
            sizes.append(size)
            for each, step in zip(steps, apart, strict=True):
                each.append(step)
    if not sizes or steps[-1][-1] != 1:
        sizes.append(1)
        for each in steps:
            each.append(1)
    missing = strided.AXES - len(sizes)
    return (1,) * missing + tuple(sizes), [(0,) * missing + tuple(each) for each in steps]
