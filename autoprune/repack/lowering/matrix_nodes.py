"""Builds the ops on matrices and rows that hold no packed weight: products, softmax, sums over axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from autoprune.errors import AutopruneError
from autoprune.repack.kernels import along, few_rows, matmul, reduce, softmax
from autoprune.repack.kernels.compiler import Kernel, Target
from autoprune.repack.kernels.fields import Given
from autoprune.repack.kernels.sums import PARTS
from autoprune.repack.lowering.buffers import Buffer, StridedRef
from autoprune.repack.lowering.geometry import CHUNK_FLOATS
from autoprune.repack.lowering.strided_nodes import ENTRIES, coalesced, merged_axes
from autoprune.repack.native.op import NativeOp, op_of


class Matrices(NamedTuple):
    """Sizes of many products.

    Attributes:
        images: how often there are `heads` products.
        heads: products of an image.
        rows: of the left matrix.
        inner: columns of the left matrix, rows of the right one.
        columns: of the right matrix.
    """

    images: int
    heads: int
    rows: int
    inner: int
    columns: int


def product(
    name: str, size: Matrices, x: StridedRef, other: StridedRef, turned: bool, y: StridedRef, scratch: Buffer | None,
    target: Target,
) -> NativeOp:  # fmt: skip
    """Products of pairs of matrices.

    Args:
        name: of what is computed.
        size: of the matrices.
        x: strides are from an image to the next, from a matrix and from a row; the floats of a row are neighbours.
        other: likewise; with `turned` the last is from a column, and the floats of a column are neighbours.
        turned: see `other`.
        y: as x.
        scratch: `matmul.scratch` floats for each thread; None where the rows are `few_rows.few`.
        target: what to compile for.
    """
    f = matmul.Field
    given: dict[matmul.Field, Given] = {
        f.X_SLOT: x.slot, f.X_OFFSET: x.offset_bytes, f.OTHER_SLOT: other.slot, f.OTHER_OFFSET: other.offset_bytes,
        f.Y_SLOT: y.slot, f.Y_OFFSET: y.offset_bytes,
        f.X_IMAGE: x.strides[0], f.X_HEAD: x.strides[1], f.X_ROW: x.strides[2],
        f.OTHER_IMAGE: other.strides[0], f.OTHER_HEAD: other.strides[1], f.OTHER_LINE: other.strides[2],
        f.Y_IMAGE: y.strides[0], f.Y_HEAD: y.strides[1], f.Y_ROW: y.strides[2],
        f.HEADS: size.heads, f.ROWS: size.rows, f.INNER: size.inner, f.COLUMNS: size.columns,
    }  # fmt: skip
    if scratch is None:
        return op_of(name, few_rows.product(target, turned), f, given, size.images * size.heads)
    given |= {
        f.SCRATCH_SLOT: scratch.slot, f.SCRATCH_OFFSET: scratch.offset,
        f.SCRATCH: matmul.scratch(size.inner, size.columns, target),
    }  # fmt: skip
    return op_of(name, matmul.matmul(target, turned), f, given, size.images * size.heads)


def shares(
    name: str, rows: int, features: int, x: StridedRef, y: StridedRef, logarithm: bool, target: Target
) -> NativeOp:
    """Softmax of each row, or its logarithm; x and y are (rows, features), contiguous."""
    f = softmax.Field
    block = max(1, min(rows, CHUNK_FLOATS // (4 * features)))
    given: dict[softmax.Field, Given] = {
        f.X_SLOT: x.slot, f.X_OFFSET: x.offset_bytes, f.Y_SLOT: y.slot, f.Y_OFFSET: y.offset_bytes, f.ROWS: rows,
        f.FEATURES: features, f.BLOCK: block,
    }  # fmt: skip
    return op_of(name, softmax.softmax(logarithm, features <= PARTS, target), f, given, -(-rows // block))


Axis = tuple[int, int]  # extent, stride


def joined(
    name: str, kept: list[Axis], summed: list[Axis], join: reduce.Join, scale: float, x: StridedRef, y: StridedRef,
    target: Target,
) -> NativeOp:  # fmt: skip
    """Sums over axes, or the largest or least entries.

    Args:
        name: of what is computed.
        kept: the axes of y, in their order, as they lie in x.
        summed: the others.
        join: what their entries become.
        scale: of each result, where they are floats.
        x: where it begins.
        y: contiguous.
        target: what to compile for.

    Raises:
        AutopruneError: more axes than the kernel has.
    """
    f = reduce.Field
    kept, summed = _joined(kept), _joined(sorted(summed, key=lambda axis: -axis[1]))
    if len(kept) > reduce.KEPT or len(summed) > reduce.SUMMED:
        raise AutopruneError(f"{name!r} sums more axes than lie apart in the kernel: {kept}, {summed}.")
    run = reduce.Run.NEITHER
    if kept and kept[-1][1] == 1:
        run = reduce.Run.KEPT
    elif summed and summed[-1][1] == 1:
        run = reduce.Run.SUMMED
    kept = [(1, 0)] * (reduce.KEPT - len(kept)) + kept
    summed = [(1, 0)] * (reduce.SUMMED - len(summed)) + summed
    rows, work = kept[0][0] * kept[1][0], kept[2][0] * math.prod(size for size, _ in summed)
    block = max(1, min(rows, CHUNK_FLOATS // max(1, work)))
    given: dict[reduce.Field, Given] = {
        f.X_SLOT: x.slot, f.X_OFFSET: x.offset_bytes, f.Y_SLOT: y.slot, f.Y_OFFSET: y.offset_bytes,
        f.BLOCK: block, f.SCALE: scale,
    }  # fmt: skip
    for axes, kind in ((kept, ""), (summed, "SUMMED_")):
        for number, (size, stride) in enumerate(axes):
            given |= {f[f"{kind}SIZE_{number}"]: size, f[f"{kind}STRIDE_{number}"]: stride}
    kernel = reduce.reduce(run, join, ENTRIES[x.dtype], ENTRIES[y.dtype], target)
    return op_of(name, kernel, f, given, -(-rows // block))


class Lines(NamedTuple):
    """Lines that lie beside each other, each along one axis.

    Attributes:
        shape: of the axes beside it.
        x: their strides in what is read.
        y: likewise in the result.
        length: entries of a line.
        x_step: from an entry to the next in what is read.
        y_step: likewise in the result.
    """

    shape: tuple[int, ...]
    x: tuple[int, ...]
    y: tuple[int, ...]
    length: int
    x_step: int
    y_step: int


def goes(shape: tuple[int, ...], x: tuple[int, ...], y: tuple[int, ...]) -> bool:
    """Whether the kernels along an axis have enough axes beside it."""
    return len(coalesced(shape, [x, y])[0]) <= along.AXES


def sums_so_far(name: str, lines: Lines, x: StridedRef, y: StridedRef, target: Target) -> NativeOp:
    """The sum of each entry of a line and those before it."""
    return _along(name, along.sums_so_far(ENTRIES[x.dtype], ENTRIES[y.dtype], target), lines, x, y)


def place_of(largest: bool) -> Callable[[str, Lines, StridedRef, StridedRef, Target], NativeOp]:
    """Where in each line the first of the largest, or the least, entries is."""

    def build(name: str, lines: Lines, x: StridedRef, y: StridedRef, target: Target) -> NativeOp:
        return _along(name, along.place_of(largest, ENTRIES[x.dtype], target), lines, x, y)

    return build


def _along(name: str, kernel: Kernel, lines: Lines, x: StridedRef, y: StridedRef) -> NativeOp:
    f = along.Field
    sizes, (over_x, over_y) = merged_axes(lines.shape, [lines.x, lines.y], along.AXES)
    rows = math.prod(sizes)
    block = max(1, min(rows, CHUNK_FLOATS // (4 * max(1, lines.length))))
    given: dict[along.Field, Given] = {
        f.X_SLOT: x.slot, f.X_OFFSET: x.offset_bytes, f.X_STEP: lines.x_step, f.Y_SLOT: y.slot,
        f.Y_OFFSET: y.offset_bytes, f.Y_STEP: lines.y_step, f.LENGTH: lines.length, f.BLOCK: block,
        **dict(zip(along.per_axis("SIZE"), sizes, strict=True)),
        **dict(zip(along.per_axis("X_STRIDE"), over_x, strict=True)),
        **dict(zip(along.per_axis("Y_STRIDE"), over_y, strict=True)),
    }  # fmt: skip
    return op_of(name, kernel, f, given, -(-rows // block))


def _joined(axes: list[Axis]) -> list[Axis]:
    """The same entries in as few axes as can be."""
    found: list[Axis] = []
    for size, stride in axes:
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return found


def fits(kept: list[Axis], summed: list[Axis]) -> bool:
    """Whether `sums` has enough axes."""
    joined = _joined(sorted(summed, key=lambda axis: -axis[1]))
    return len(_joined(kept)) <= reduce.KEPT and len(joined) <= reduce.SUMMED
