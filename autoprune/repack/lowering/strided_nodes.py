"""Builds the ops that read values wherever they lie, by their strides: elements, turned rows, rows by their numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from autoprune.errors import AutopruneError
from autoprune.repack.kernels import gather, rotary, strided
from autoprune.repack.kernels.compiler import Target
from autoprune.repack.kernels.fields import Given
from autoprune.repack.kernels.math import clamped
from autoprune.repack.lowering.buffers import StridedRef
from autoprune.repack.lowering.geometry import CHUNK_FLOATS
from autoprune.repack.native.op import NativeOp, op_of


def pointwise(
    name: str, shape: tuple[int, ...], x: StridedRef, other: StridedRef | None, y: StridedRef, operation: str,
    activation: str | None, target: Target, choice: StridedRef | None = None,
) -> NativeOp:  # fmt: skip
    """One value, or two combined.

    Args:
        name: of what is computed.
        shape: of y.
        x: strided as `shape`; strides of 0 repeat a value.
        other: likewise; None where there is one value.
        y: likewise.
        operation: a row of `strided.OPERATIONS`; empty where there is one value, or `choice`.
        activation: a name, see `kernels.math`.
        target: what to compile for.
        choice: booleans, likewise: x where they are true, else `other`.

    Raises:
        AutopruneError: more axes than the kernel has.
    """
    f = strided.Field
    operands = {"X": x, "OTHER": other, "CHOICE": choice, "Y": y}
    refs = {name: ref for name, ref in operands.items() if ref is not None}
    sizes, strides = merged_axes(shape, [ref.strides for ref in refs.values()])
    if len(sizes) > strided.AXES:
        raise AutopruneError(f"{name!r} of shape {shape} has more than {strided.AXES} axes that lie apart.")
    rows = math.prod(sizes[:-1])
    block = max(1, min(rows, CHUNK_FLOATS // (4 * max(1, sizes[-1]))))
    low, high, function = clamped(activation)
    given: dict[strided.Field, Given] = {
        **dict(zip(strided.per_axis("SIZE"), sizes, strict=True)), f.BLOCK: block,
    }  # fmt: skip
    bounded = (low, high) != (-math.inf, math.inf)
    if bounded:
        given |= {f.LOW: low, f.HIGH: high}
    for (operand, ref), steps in zip(refs.items(), strides, strict=True):
        given |= {f[f"{operand}_SLOT"]: ref.slot, f[f"{operand}_OFFSET"]: ref.offset_bytes}
        given |= dict(zip(strided.per_axis(f"{operand}_STRIDE"), steps, strict=True))
    along = {
        name: strided.Along.RUN if steps[-1] == 1 else strided.Along.APART if steps[-1] else strided.Along.SAME
        for name, steps in zip(refs, strides, strict=True)
    }
    together = strides[-1][-1] == 1
    kernel = strided.strided(
        along["X"], along.get("OTHER"), operation, function, target, together, bounded, along.get("CHOICE")
    )
    return op_of(name, kernel, f, given, -(-rows // block) if sizes[-1] else 0)


class IndexCheck(NamedTuple):
    """How numbers of rows are checked in a call.

    Attributes:
        flag: an int64 that becomes 1 where a number is no row's.
        limit: rows that x has for each batch entry.
    """

    flag: StridedRef
    limit: int


def taken(
    name: str, size: tuple[int, int, int], x: StridedRef, index: StridedRef, y: StridedRef, check: IndexCheck | None,
    target: Target,
) -> NativeOp:  # fmt: skip
    """Rows by their int64 numbers, batch entry by batch entry.

    Args:
        name: of what is computed.
        size: batch entries, rows taken of each, features.
        x: strides are from a batch entry to the next and from a row to the next.
        index: likewise, in int64.
        y: contiguous, of shape `size`.
        check: None where the numbers are known to be right.
        target: what to compile for.
    """
    f = gather.Field
    batch, rows, features = size
    block = max(1, min(batch * rows, CHUNK_FLOATS // (4 * max(1, features))))
    given: dict[gather.Field, Given] = {
        f.X_SLOT: x.slot, f.X_OFFSET: x.offset_bytes, f.X_BATCH: x.strides[0], f.X_ROW: x.strides[1],
        f.INDEX_SLOT: index.slot, f.INDEX_OFFSET: index.offset_bytes, f.INDEX_BATCH: index.strides[0],
        f.INDEX_ROW: index.strides[1], f.Y_SLOT: y.slot, f.Y_OFFSET: y.offset_bytes, f.BATCH: batch, f.ROWS: rows,
        f.FEATURES: features, f.BLOCK: block,
    }  # fmt: skip
    if check is not None:
        given |= {f.WRONG_SLOT: check.flag.slot, f.WRONG_OFFSET: check.flag.offset_bytes, f.LIMIT: check.limit}
    return op_of(name, gather.gather(check is not None, target), f, given, -(-batch * rows // block))


def turned(
    name: str, size: tuple[int, ...], x: StridedRef, cos: StridedRef, sin: StridedRef, y: StridedRef, target: Target
) -> NativeOp:
    """Rotary position embedding.

    Args:
        name: of what is computed.
        size: three axes and the features, an even number, which are neighbours in every operand.
        x: strides are those of the three axes.
        cos: likewise.
        sin: likewise.
        y: contiguous, of shape `size`.
        target: what to compile for.
    """
    f = rotary.Field
    rows, features = math.prod(size[:-1]), size[-1]
    block = max(1, min(rows, CHUNK_FLOATS // (4 * features)))
    given: dict[rotary.Field, Given] = {
        f.Y_SLOT: y.slot, f.Y_OFFSET: y.offset_bytes, f.SIZE_0: size[0], f.SIZE_1: size[1], f.SIZE_2: size[2],
        f.HALF: features // 2, f.BLOCK: block,
    }  # fmt: skip
    for operand, ref in (("X", x), ("COS", cos), ("SIN", sin)):
        given |= {f[f"{operand}_SLOT"]: ref.slot, f[f"{operand}_OFFSET"]: ref.offset_bytes}
        given |= {f[f"{operand}_STRIDE_{axis}"]: step for axis, step in enumerate(ref.strides)}
    return op_of(name, rotary.rotary(target), f, given, -(-rows // block))


def coalesced(shape: Sequence[int], strides: Sequence[tuple[int, ...]]) -> tuple[list[int], list[list[int]]]:
    """Sizes and strides, operand by operand, of the same entries in as few axes as can be; none for a single entry."""
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
    return sizes, steps


def merged_axes(
    shape: Sequence[int], strides: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Sizes and strides of the same entries in as few axes as can be, at least `strided.AXES`."""
    sizes, steps = coalesced(shape, strides)
    if not sizes:
        sizes.append(1)
        for each in steps:
            each.append(1)
    missing = strided.AXES - len(sizes)
    return (1,) * missing + tuple(sizes), [(0,) * missing + tuple(each) for each in steps]
