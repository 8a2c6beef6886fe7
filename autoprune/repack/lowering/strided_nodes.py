"""Builds the ops that read values wherever they lie, by their strides: elements, turned rows, rows by their numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from autoprune.errors import AutopruneError
from autoprune.repack.kernels import gather, rotary, strided
from autoprune.repack.kernels.compiler import Target
from autoprune.repack.kernels.entries import Entry
from autoprune.repack.kernels.fields import Given
from autoprune.repack.kernels.math import clamped
from autoprune.repack.lowering.buffers import StridedRef
from autoprune.repack.lowering.geometry import CHUNK_FLOATS
from autoprune.repack.native.op import NativeOp, op_of

ENTRIES: Mapping[torch.dtype, Entry] = {getattr(torch, entry.value): entry for entry in Entry}
"""The types of values that native steps read and write."""


class Function(NamedTuple):
    """What is computed of one value, or of two.

    Attributes:
        operation: a row of `entries.OPERATIONS` or `entries.COMPARISONS`; empty for one value, or a choice of two.
        activation: a name, see `kernels.math`; None without one.
        computed: the type in which it is computed.
        bounds: what the result is clamped to; None: what the activation says.
    """

    operation: str
    activation: str | None
    computed: torch.dtype
    bounds: tuple[float, float] | None = None


def pointwise(
    name: str, shape: tuple[int, ...], operands: Sequence[StridedRef], y: StridedRef, find: Function, target: Target,
    choice: StridedRef | None = None,
) -> NativeOp:  # fmt: skip
    """One value, or two combined.

    Args:
        name: of what is computed.
        shape: of y.
        operands: one or two, strided as `shape`; strides of 0 repeat a value.
        y: likewise.
        find: what is computed.
        target: what to compile for.
        choice: booleans, likewise: the first operand where they are true, else the second.

    Raises:
        AutopruneError: more axes than the kernel has.
    """
    f = strided.Field
    given_refs = {"X": operands[0], "OTHER": operands[1] if len(operands) > 1 else None, "CHOICE": choice, "Y": y}
    refs = {name: ref for name, ref in given_refs.items() if ref is not None}
    lie = [ref.strides for ref in refs.values()]
    apart = len(coalesced(shape, lie)[0])
    if apart > strided.AXES:
        raise AutopruneError(f"{name!r} of shape {shape} has more than {strided.AXES} axes that lie apart.")
    sizes, strides = merged_axes(shape, lie, strided.AXES)
    rows = math.prod(sizes[:-1])
    block = max(1, min(rows, CHUNK_FLOATS // (4 * max(1, sizes[-1]))))
    low, high, function = clamped(find.activation)
    low, high = find.bounds or (low, high)
    given: dict[strided.Field, Given] = {
        **dict(zip(strided.per_axis("SIZE"), sizes, strict=True)), f.BLOCK: block,
    }  # fmt: skip
    bounded = (low, high) != (-math.inf, math.inf)
    if bounded:
        given |= {f.LOW: low, f.HIGH: high}
    reads = dict[str, strided.Read]()
    for (operand, ref), steps in zip(refs.items(), strides, strict=True):
        given |= {f[f"{operand}_SLOT"]: ref.slot, f[f"{operand}_OFFSET"]: ref.offset_bytes}
        given |= dict(zip(strided.per_axis(f"{operand}_STRIDE"), steps, strict=True))
        reads[operand] = strided.Read(_along(steps[-1]), ENTRIES[ref.dtype])
    made = strided.Made(ENTRIES[find.computed], ENTRIES[y.dtype], strides[-1][-1] == 1)
    kernel = strided.strided(
        reads["X"], reads.get("OTHER"), reads.get("CHOICE"), find.operation, function, made,
        next(axes for axes in strided.COUNTS if axes >= apart), target, bounded,
    )  # fmt: skip
    return op_of(name, kernel, f, given, -(-rows // block) if sizes[-1] else 0)


def _along(step: int) -> strided.Along:
    return strided.Along.RUN if step == 1 else strided.Along.APART if step else strided.Along.SAME


class Index(NamedTuple):
    """Integers that tell which entries along one axis of a value are taken.

    Attributes:
        ref: where they lie, strided as the result.
        step: from one entry of the axis to the next.
        limit: how many entries it has.
    """

    ref: StridedRef
    step: int
    limit: int


def taken(
    name: str, shape: tuple[int, ...], x: StridedRef, indices: Sequence[Index], y: StridedRef,
    wrong: StridedRef | None, below: bool, target: Target,
) -> NativeOp:  # fmt: skip
    """Entries by their numbers along some axes.

    Args:
        name: of what is computed.
        shape: of y.
        x: strided as `shape`, with strides of 0 along the axes of the numbers.
        indices: one for each axis that is told by numbers.
        y: contiguous.
        wrong: an int64 that becomes 1 where a number is no entry's; None where all are known to be right.
        below: whether numbers below 0 count from the end.
        target: what to compile for.
    """
    f = gather.Field
    sizes, strides = merged_axes(shape, [y.strides, x.strides, *(each.ref.strides for each in indices)], gather.AXES)
    rows = math.prod(sizes[:-1])
    block = max(1, min(rows, CHUNK_FLOATS // (4 * max(1, sizes[-1]))))
    given: dict[gather.Field, Given] = {
        f.X_SLOT: x.slot, f.X_OFFSET: x.offset_bytes, f.Y_SLOT: y.slot, f.Y_OFFSET: y.offset_bytes, f.BLOCK: block,
        **dict(zip(gather.per_axis("SIZE"), sizes, strict=True)),
        **dict(zip(gather.per_axis("X_STRIDE"), strides[1], strict=True)),
    }  # fmt: skip
    for number, (each, steps) in enumerate(zip(indices, strides[2:], strict=True)):
        about = {"SLOT": each.ref.slot, "OFFSET": each.ref.offset_bytes, "STEP": each.step, "LIMIT": each.limit}
        given |= {f[f"INDEX_{number}_{key}"]: value for key, value in about.items()}
        given |= dict(zip(gather.per_axis(f"INDEX_{number}_STRIDE"), steps, strict=True))
    if wrong is not None:
        given |= {f.WRONG_SLOT: wrong.slot, f.WRONG_OFFSET: wrong.offset_bytes}
    whole = sizes[-1] == 1 or (strides[1][-1] == 1 and not any(steps[-1] for steps in strides[2:]))
    kernel = gather.gather(
        tuple(ENTRIES[each.ref.dtype] for each in indices), x.dtype.itemsize, whole, wrong is not None, below, target
    )
    return op_of(name, kernel, f, given, -(-rows // block) if sizes[-1] else 0)


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
    shape: Sequence[int], strides: Sequence[tuple[int, ...]], axes: int
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Sizes and strides of the same entries in as few axes as can be, at least `axes`."""
    sizes, steps = coalesced(shape, strides)
    if not sizes:
        sizes.append(1)
        for each in steps:
            each.append(1)
    missing = axes - len(sizes)
    return (1,) * missing + tuple(sizes), [(0,) * missing + tuple(each) for each in steps]
