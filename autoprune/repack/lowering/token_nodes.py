"""Builds the ops on rows of tokens: Linears, recurrences, layer norms, attention; and between rows and maps."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoprune.model.recurrent.names import GATES
from autoprune.repack.kernels import (
    attention,
    recurrent,
    rows,
    rows_gemm,
    turn,
)
from autoprune.repack.kernels.compiler import Target
from autoprune.repack.lowering.buffers import Buffer, float_bits
from autoprune.repack.lowering.geometry import CHUNK_FLOATS, MapAt, Place, Tiling, clamped, op_of
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.native.op import NativeOp


def linear(
    name: str, weights: Weights, activation: str | None, tiling: Tiling, tokens: int,
    x: tuple[int, int, int], y: tuple[int, int, int], residual: tuple[int, int, int] | None, target: Target,
) -> NativeOp:  # fmt: skip
    """A packed Linear; x, y and residual are (slot, bytes, floats from a token to the next)."""
    f = rows_gemm.Field
    packed = weights.packed
    low, high, other = clamped(activation)
    together = rows_gemm.tokens_together(packed.group_size, target)
    block = min(-(-tiling.block // together) * together, max(1, tokens))
    chunk = min(tiling.chunk or packed.groups, packed.groups)
    chunks = -(-packed.groups // chunk)
    given: dict[IntEnum, Any] = {
        f.X_SLOT: x[0], f.X_OFFSET: x[1], f.X_TOKEN: x[2], f.Y_SLOT: y[0], f.Y_OFFSET: y[1], f.Y_TOKEN: y[2],
        f.TOKENS: tokens, f.GROUP_POINTER: packed.group_pointer, f.INDEX: packed.index, f.VALUES: packed.values,
        f.BIAS: weights.bias_rows, f.OUT_INDEX: np.ascontiguousarray(packed.out_index), f.FIRST: weights.first,
        f.LOW: low, f.HIGH: high, f.GROUPS: packed.groups, f.CHUNK: chunk, f.CHUNKS: chunks, f.BLOCK: block,
    }  # fmt: skip
    if twins := _joins_twins(weights, target):
        given[f.TWIN] = weights.twin
    if residual is not None:
        given |= {
            f.RESIDUAL: 1, f.RESIDUAL_SLOT: residual[0], f.RESIDUAL_OFFSET: residual[1], f.RESIDUAL_TOKEN: residual[2],
        }  # fmt: skip
    kernel = rows_gemm.rows_gemm(packed.group_size, target, other, twins)
    return op_of(name, kernel, f, given, -(-tokens // block) * chunks)


def _joins_twins(weights: Weights, target: Target) -> bool:
    """Whether there are twins, in groups of a size that is computed two at a time."""
    return rows_gemm.joins_twins(weights.packed.group_size, target) and bool(weights.twin.any())


@dataclass(frozen=True)
class Sequences:
    """A recurrent op's geometry.

    Attributes:
        cell: ``lstm`` or ``gru``.
        steps: of a sequence.
        batch: sequences.
        hidden: entries of a state.
        units: those that are computed; all when None.
        time_first: whether steps are the first axis of projections and states.
        reverse: from the last step to the first.
        threshold: states smaller than it become 0.
        keep: the largest states of a step stay; 0: all.
    """

    cell: str
    steps: int
    batch: int
    hidden: int
    units: tuple[int, ...] | None
    time_first: bool
    reverse: bool
    threshold: float
    keep: int

    @property
    def computed(self) -> int:
        return self.hidden if self.units is None else len(self.units)

    @property
    def scratch(self) -> int:
        """Floats an entry of the batch needs."""
        return recurrent.scratch(self.cell, self.computed, self.hidden)

    @property
    def prune(self) -> str:
        """What the kernel is told about zero states."""
        return "threshold" if self.threshold > 0.0 else "top" if 0 < self.keep < self.computed else ""


def sequence(
    name: str, weights: Weights, tiling: Tiling, size: Sequences, x: tuple[int, int], y: tuple[int, int],
    before: tuple[tuple[int, int], ...], scratch: Buffer, target: Target,
) -> NativeOp:  # fmt: skip
    """One direction of a recurrent layer; x, y and the states before it, where there are any, are (slot, bytes)."""
    f, packed = recurrent.Field, weights.packed
    rows = GATES[size.cell] * size.computed
    of_entry = (1, size.batch) if size.time_first else (size.steps, 1)  # from an entry, and a step, to the next
    begin: list[tuple[int, Any, int]] = [(slot, offset, size.hidden) for slot, offset in before]
    nothing = np.zeros(size.hidden, np.float32)
    begin += [(0, nothing, 0)] * (2 - len(begin))
    units = np.arange(size.hidden) if size.units is None else np.array(size.units)
    block = max(1, -(-size.batch // max(1, min(size.batch, tiling.chunk))))
    given: dict[IntEnum, Any] = {
        f.X_SLOT: x[0], f.X_OFFSET: x[1], f.X_ENTRY: of_entry[0] * rows, f.X_STEP: of_entry[1] * rows,
        f.Y_SLOT: y[0], f.Y_OFFSET: y[1], f.Y_ENTRY: of_entry[0] * size.hidden, f.Y_STEP: of_entry[1] * size.hidden,
        f.Y_CELL: size.steps * size.batch * size.hidden, f.H_SLOT: begin[0][0], f.H_OFFSET: begin[0][1],
        f.H_ENTRY: begin[0][2], f.C_SLOT: begin[1][0], f.C_OFFSET: begin[1][1], f.C_ENTRY: begin[1][2],
        f.SCRATCH_SLOT: scratch.slot, f.SCRATCH_OFFSET: scratch.offset, f.SCRATCH: size.scratch, f.STEPS: size.steps,
        f.BATCH: size.batch, f.BLOCK: block, f.REVERSE: int(size.reverse), f.HIDDEN: size.hidden,
        f.UNITS: size.computed, f.UNIT_INDEX: units.astype(np.int32),
        f.OUT_INDEX: np.ascontiguousarray(packed.out_index), f.FIRST: weights.first, f.GROUPS: packed.groups,
        f.THRESHOLD: float_bits(size.threshold), f.KEEP: size.keep,
    }  # fmt: skip
    columns = weights.by_column if tiling.columns else None
    pointer, index, values = columns or (packed.group_pointer, packed.index, packed.values)
    given |= {f.GROUP_POINTER: pointer, f.INDEX: index, f.VALUES: values}
    given[f.BIAS] = weights.bias_rows if columns is None else weights.bias
    if twins := columns is None and _joins_twins(weights, target):
        given[f.TWIN] = weights.twin
    form = recurrent.Form(size.cell, packed.group_size, twins, columns is not None, size.prune)
    return op_of(name, recurrent.recurrent(form, target), f, given, -(-size.batch // block))


def into_planes(name: str, tokens: int, x: tuple[int, int, int], y: MapAt, target: Target) -> NativeOp:
    """Rows of tokens as a map with a channel a feature; x is (slot, bytes, floats from a token to the next)."""
    f, features = turn.Field, y.layout.channels
    given: dict[IntEnum, Any] = {
        f.ROWS_SLOT: x[0], f.ROWS_OFFSET: x[1], f.ROWS_TOKEN: x[2], f.PLANES_SLOT: y.buffer.slot,
        f.PLANES_OFFSET: y.offset, f.PLANES_FEATURE: y.layout.channel(1), f.TOKENS: tokens, f.FEATURES: features,
    }  # fmt: skip
    return op_of(name, turn.into_planes(target), f, given, -(-tokens // target.lanes))


def out_of_planes(
    name: str, tokens: int, x: MapAt, y: tuple[int, int, int], residual: tuple[int, int, int] | None,
    activation: str | None, target: Target,
) -> NativeOp:  # fmt: skip
    """A map with a channel a feature as rows of tokens; y and residual are (slot, bytes, floats to the next token)."""
    f = turn.Field
    low, high, other = clamped(activation)
    given: dict[IntEnum, Any] = {
        f.ROWS_SLOT: y[0], f.ROWS_OFFSET: y[1], f.ROWS_TOKEN: y[2], f.PLANES_SLOT: x.buffer.slot,
        f.PLANES_OFFSET: x.offset, f.PLANES_FEATURE: x.layout.channel(1), f.TOKENS: tokens,
        f.FEATURES: x.layout.channels, f.LOW: low, f.HIGH: high,
    }  # fmt: skip
    if residual is not None:
        given |= {
            f.RESIDUAL: 1, f.RESIDUAL_SLOT: residual[0], f.RESIDUAL_OFFSET: residual[1], f.RESIDUAL_TOKEN: residual[2],
        }  # fmt: skip
    return op_of(name, turn.out_of_planes(target, other), f, given, -(-tokens // target.lanes))


def layer_norm(
    name: str, x: tuple[int, int], y: tuple[int, int], tokens: int, weight: NDArray[np.float32],
    bias: NDArray[np.float32], epsilon: float, target: Target,
) -> NativeOp:  # fmt: skip
    """Each row of (tokens, features) normalised; x and y are (slot, bytes)."""
    f = rows.Field
    features = len(weight)
    block = max(1, min(tokens, CHUNK_FLOATS // (4 * features)))
    given: dict[IntEnum, Any] = {
        f.X_SLOT: x[0], f.X_OFFSET: x[1], f.Y_SLOT: y[0], f.Y_OFFSET: y[1], f.ROWS: tokens, f.FEATURES: features,
        f.BLOCK: block, f.WEIGHT: weight, f.BIAS: bias, f.EPSILON: float_bits(epsilon),
        f.SHARE: float_bits(1 / features),
    }  # fmt: skip
    return op_of(name, rows.layer_norm(target), f, given, -(-tokens // block))


def attend(
    name: str, q: Place, k: Place, v: Place, y: Place, scratch: Buffer, size: tuple[int, int, int, int, int],
    scale: float, target: Target,
) -> NativeOp:  # fmt: skip
    """Attention; `size` is batch, heads, queries, keys and the width of a head."""
    f = attention.Field
    batch, heads, queries, keys, width = size
    places = [number for slot, offset, strides in (q, k, v, y) for number in (slot, offset, *strides[:3])]
    given: dict[IntEnum, Any] = dict(zip(f, places, strict=False))
    given |= {
        f.SCRATCH_SLOT: scratch.slot, f.SCRATCH_OFFSET: scratch.offset,
        f.SCRATCH: attention.scratch(keys, width, target), f.HEADS: heads, f.QUERIES: queries, f.KEYS: keys,
        f.WIDTH: width, f.SCALE: float_bits(scale),
    }  # fmt: skip
    return op_of(name, attention.attention(target), f, given, batch * heads)
