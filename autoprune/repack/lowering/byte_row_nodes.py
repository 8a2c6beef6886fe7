"""Builds the ops on rows of bytes: tokens too few to fill a vector, whose features lie four to a lane side by side."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from autoprune.quantization.grid import LEVELS, Grid
from autoprune.repack.graph.ops.recurrent import STATES
from autoprune.repack.kernels import bytes_rows, dot_rows, recurrent
from autoprune.repack.kernels.compiler import Target
from autoprune.repack.kernels.dot_products import starts_of
from autoprune.repack.kernels.dot_tile import Form
from autoprune.repack.kernels.fields import Given
from autoprune.repack.lowering.buffers import Buffer, StridedRef
from autoprune.repack.lowering.byte_nodes import step_of
from autoprune.repack.lowering.dot_nodes import Ints, behind_activation, check_sums, form_of, row_steps
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.lowering.token_nodes import Sequences, sequence_fields
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.native.op import NativeOp, op_of
from autoprune.repack.weights.quads import QUAD, Quads


class RowsOn(NamedTuple):
    """Rows of tokens, and the grid of their bytes; rows of floats where there is none."""

    at: StridedRef
    grid: Grid | None


def quantised(
    name: str, tokens: int, features: int, x: StridedRef, y: StridedRef, grid: Grid, target: Target
) -> NativeOp:  # fmt: skip
    """Rows of floats moved onto a grid. NaN becomes the lowest byte.

    Args:
        name: of the value.
        tokens: rows of x and y.
        features: of a row.
        x: ``(tokens, features)``; the features of a token are neighbours.
        y: ``(tokens, ceil(features / 4))``, lanes.
        grid: y's.
        target: what to compile for.
    """
    f = bytes_rows.Field
    given: dict[bytes_rows.Field, Given] = {
        **_between(features, x, y, grid), f.INVERSE: grid.inverse, f.LOW: float(-grid.zero_point),
        f.HIGH: float(LEVELS - grid.zero_point),
    }  # fmt: skip
    return op_of(name, bytes_rows.rows_to_bytes(target), f, given, tokens)


def dequantised(
    name: str, tokens: int, features: int, x: StridedRef, y: StridedRef, grid: Grid, target: Target
) -> NativeOp:  # fmt: skip
    """The floats of rows of bytes; arguments as of `quantised`, x and y in each other's place, the grid x's."""
    given: dict[bytes_rows.Field, Given] = {**_between(features, x, y, grid), bytes_rows.Field.SCALE: step_of(grid)}
    return op_of(name, bytes_rows.bytes_to_rows(target), bytes_rows.Field, given, tokens)


def _between(features: int, x: StridedRef, y: StridedRef, grid: Grid) -> dict[bytes_rows.Field, Given]:
    f = bytes_rows.Field
    return {
        f.X_SLOT: x.slot, f.X_OFFSET: x.offset_bytes, f.X_TOKEN: x.strides[0], f.Y_SLOT: y.slot,
        f.Y_OFFSET: y.offset_bytes, f.Y_TOKEN: y.strides[0], f.FEATURES: features, f.ZERO: grid.zero_point,
    }  # fmt: skip


def linear(
    name: str, weights: Weights, activation: str | None, tiling: Tiling, tokens: int, x: RowsOn, y: RowsOn,
    residual: RowsOn | None, target: Target,
) -> NativeOp:  # fmt: skip
    """A packed Linear of bytes.

    Args:
        name: of what is computed.
        weights: of the layer, bytes.
        activation: a name, see `kernels.math`.
        tiling: how the work is cut.
        tokens: rows of x, y and the residual.
        x: ``(tokens, ceil(in / 4))``, lanes; on a grid.
        y: ``(tokens, out)``, or lanes where it is on a grid.
        residual: like y, added before the activation; None for none.
        target: what to compile for.
    """
    f, packed, cells = dot_rows.Field, weights.packed, weights.quads(tiling.whole)
    assert x.grid is not None
    check_sums(name, weights)
    steps = row_steps(weights, x.grid, y.grid, None if residual is None else residual.grid, activation)
    block, chunk = min(tiling.block, max(1, tokens)), min(tiling.chunk or packed.groups, packed.groups)
    chunks = -(-packed.groups // chunk)
    channel, first = _places(weights, y)
    given: dict[dot_rows.Field, Given] = {
        f.X_SLOT: x.at.slot, f.X_OFFSET: x.at.offset_bytes, f.X_TOKEN: x.at.strides[0], f.Y_SLOT: y.at.slot,
        f.Y_OFFSET: y.at.offset_bytes, f.Y_TOKEN: y.at.strides[0], f.TOKENS: tokens, f.GROUP_POINTER: cells.pointer,
        f.OFFSETS: cells.index, f.VALUES: cells.values, f.FACTOR: steps.factor, f.BIAS: steps.bias,
        f.Y_CHANNEL: channel, f.FIRST: first, f.LOW: steps.low, f.HIGH: steps.high, f.GROUPS: packed.groups,
        f.CHUNK: chunk, f.CHUNKS: chunks, f.BLOCK: block,
    }  # fmt: skip
    if target.signed:
        given[f.START] = starts_of(weights.row_sums)
    if mixed := bool(len(cells.mixed_index)):
        offsets, places = _mixed(cells)
        given |= {
            f.MIXED_POINTER: cells.mixed_pointer, f.MIXED_OFFSETS: offsets, f.MIXED_BYTES: places,
            f.MIXED_VALUES: cells.mixed_values,
        }  # fmt: skip
    if residual is not None:
        channel, first = _places(weights, residual)
        given |= {
            f.RESIDUAL_SLOT: residual.at.slot, f.RESIDUAL_OFFSET: residual.at.offset_bytes,
            f.RESIDUAL_TOKEN: residual.at.strides[0], f.RESIDUAL_CHANNEL: channel, f.RESIDUAL_FIRST: first,
            f.RESIDUAL_SCALE: steps.residual,
        }  # fmt: skip
    given |= {f[key]: value for key, value in behind_activation(steps, y.grid).items()}
    form: Form | Literal[""] = "" if residual is None else form_of(residual.grid)
    kernel = dot_rows.dot_rows(packed.group_size, target, form_of(y.grid), steps.activation, form, mixed)
    return op_of(name, kernel, f, given, -(-tokens // block) * chunks)


def sequence(
    name: str, weights: Weights, tiling: Tiling, size: Sequences, x: StridedRef, y: StridedRef,
    before: tuple[StridedRef, ...], scratch: Buffer, target: Target,
) -> NativeOp:  # fmt: skip
    """One direction of a recurrent layer whose weight is bytes, and meets states on the grid `STATES`.

    Arguments are those of `token_nodes.sequence`: projections and states are floats.
    """
    f, packed, cells = recurrent.Field, weights.packed, weights.quads(tiling.whole)
    check_sums(name, weights)
    steps = row_steps(weights, STATES, None, None, None)
    given, items = sequence_fields(size, tiling, x, y, before, scratch)
    given |= {
        f.GROUPS: packed.groups, f.GROUP_POINTER: cells.pointer, f.OFFSETS: cells.index, f.CELLS: cells.values,
        f.FACTOR: steps.factor, f.BIAS: steps.bias, f.Y_CHANNEL: weights.rows, f.FIRST: weights.first,
        f.INVERSE: STATES.inverse, f.ZERO: STATES.zero_point, f.LOW: float(-STATES.zero_point),
        f.HIGH: float(LEVELS - STATES.zero_point),
    }  # fmt: skip
    if target.signed:
        given[f.START] = starts_of(weights.row_sums)
    if mixed := bool(len(cells.mixed_index)):
        offsets, places = _mixed(cells)
        given |= {
            f.MIXED_POINTER: cells.mixed_pointer, f.MIXED_OFFSETS: offsets, f.MIXED_BYTES: places,
            f.MIXED_CELLS: cells.mixed_values,
        }  # fmt: skip
    form = recurrent.Form(size.cell, packed.group_size, prune=size.prune, int8=True, mixed=mixed)
    return op_of(name, recurrent.recurrent(form, target), f, given, items)


def _mixed(cells: Quads) -> tuple[Ints, Ints]:
    """Of each byte of mixed cells: the lane it lies in, and its place there."""
    lane, place = np.divmod(cells.mixed_index, QUAD)
    return np.ascontiguousarray(lane, np.int32), np.ascontiguousarray(place, np.int32)


def _places(weights: Weights, value: RowsOn) -> tuple[Ints, Ints]:
    """Where each row's result lies, or each four rows' lane; and the first of each group, -1 where they are no row."""
    if value.grid is None:
        return weights.rows, weights.first
    return weights.rows[::QUAD] // QUAD, np.where(weights.first < 0, -1, weights.first // QUAD).astype(np.int32)
