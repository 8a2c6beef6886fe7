"""Builds the ops on rows of tokens: Linears, recurrences, norms, attention; and between rows and maps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoprune.model.recurrent.names import GATES
from autoprune.repack.kernels import attention, few_attention, recurrent, rows, rows_gemm, turn
from autoprune.repack.kernels.compiler import Target
from autoprune.repack.kernels.few_rows import few
from autoprune.repack.kernels.fields import Given
from autoprune.repack.kernels.math import clamped
from autoprune.repack.lowering.buffers import Buffer, MapAt, StridedRef
from autoprune.repack.lowering.geometry import CHUNK_FLOATS, Tiling
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.native.op import NativeOp, op_of


def linear(
    name: str, weights: Weights, activation: str | None, tiling: Tiling, tokens: int, x: StridedRef, y: StridedRef,
    residual: StridedRef | None, target: Target,
) -> NativeOp:  # fmt: skip
    """A packed Linear.

    Args:
        name: of what is computed.
        weights: of the layer.
        activation: a name, see `kernels.math`.
        tiling: how the work is cut.
        tokens: rows of x, y and the residual.
        x: ``(tokens, in)``; the features of a token are neighbours, as in y and the residual.
        y: ``(tokens, out)``.
        residual: ``(tokens, out)``, added before the activation; None for none.
        target: what to compile for.
    """
    f = rows_gemm.Field
    packed = weights.packed
    pointer, index, values = packed.group_pointer, packed.index, packed.values
    if packed.in_bf16:
        pointer, index, pairs = weights.pairs
        values = pairs.view(np.float32)
    low, high, other = clamped(activation)
    together = rows_gemm.tokens_together(packed.group_size, target)
    block = min(-(-tiling.block // together) * together, max(1, tokens))
    chunk = min(tiling.chunk or packed.groups, packed.groups)
    chunks = -(-packed.groups // chunk)
    given: dict[rows_gemm.Field, Given] = {
        f.X_SLOT: x.slot, f.X_OFFSET: x.offset_bytes, f.X_TOKEN: x.strides[0],
        f.Y_SLOT: y.slot, f.Y_OFFSET: y.offset_bytes, f.Y_TOKEN: y.strides[0],
        f.TOKENS: tokens, f.GROUP_POINTER: pointer, f.INDEX: index, f.VALUES: values,
        f.BIAS: weights.bias_rows, f.OUT_INDEX: np.ascontiguousarray(packed.out_index), f.FIRST: weights.first,
        f.LOW: low, f.HIGH: high, f.GROUPS: packed.groups, f.CHUNK: chunk, f.CHUNKS: chunks, f.BLOCK: block,
    }  # fmt: skip
    if twins := _joins_twins(weights, target):
        given[f.TWIN] = weights.twin
    if residual is not None:
        given |= {
            f.RESIDUAL_SLOT: residual.slot, f.RESIDUAL_OFFSET: residual.offset_bytes,
            f.RESIDUAL_TOKEN: residual.strides[0],
        }  # fmt: skip
    kernel = rows_gemm.rows_gemm(packed.group_size, target, other, twins, packed.in_bf16)
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


def sequence_fields(
    size: Sequences, tiling: Tiling, x: StridedRef, y: StridedRef, before: tuple[StridedRef, ...], scratch: Buffer
) -> tuple[dict[recurrent.Field, Given], int]:  # fmt: skip
    """What a recurrent op is given whatever its weight is, and its items; arguments as of `sequence`."""
    f, gates = recurrent.Field, GATES[size.cell] * size.computed
    of_entry = (1, size.batch) if size.time_first else (size.steps, 1)  # from an entry, and a step, to the next
    zeros = StridedRef(0, np.zeros(size.hidden, np.float32), (0,))
    state, cell = (*before, zeros, zeros)[:2]
    units = np.arange(size.hidden) if size.units is None else np.array(size.units)
    block = max(1, -(-size.batch // max(1, min(size.batch, tiling.chunk))))
    return {
        f.X_SLOT: x.slot, f.X_OFFSET: x.offset_bytes, f.X_ENTRY: of_entry[0] * gates, f.X_STEP: of_entry[1] * gates,
        f.Y_SLOT: y.slot, f.Y_OFFSET: y.offset_bytes, f.Y_ENTRY: of_entry[0] * size.hidden,
        f.Y_STEP: of_entry[1] * size.hidden, f.Y_CELL: size.steps * size.batch * size.hidden,
        f.H_SLOT: state.slot, f.H_OFFSET: state.offset_bytes, f.H_ENTRY: state.strides[0],
        f.C_SLOT: cell.slot, f.C_OFFSET: cell.offset_bytes, f.C_ENTRY: cell.strides[0],
        f.SCRATCH_SLOT: scratch.slot, f.SCRATCH_OFFSET: scratch.offset, f.SCRATCH: size.scratch, f.STEPS: size.steps,
        f.BATCH: size.batch, f.BLOCK: block, f.REVERSE: int(size.reverse), f.HIDDEN: size.hidden,
        f.UNITS: size.computed, f.UNIT_INDEX: units.astype(np.int32), f.THRESHOLD: float(size.threshold),
        f.KEEP: size.keep,
    }, -(-size.batch // block)  # fmt: skip


def sequence(
    name: str, weights: Weights, tiling: Tiling, size: Sequences, x: StridedRef, y: StridedRef,
    before: tuple[StridedRef, ...], scratch: Buffer, target: Target,
) -> NativeOp:  # fmt: skip
    """One direction of a recurrent layer.

    Args:
        name: of what is computed.
        weights: of the recurrent product.
        tiling: how the work is cut.
        size: of all values, which are contiguous; steps and batch in the order that `size.time_first` says.
        x: input projections, ``(steps, batch, gates * computed units)``.
        y: states and an LSTM's cells, ``(1 or 2, steps, batch, hidden)``.
        before: state and cell before the first step, ``(batch, hidden)``; zeros where left out.
        scratch: `size.scratch` floats for each entry of the batch.
        target: what to compile for.
    """
    f, packed = recurrent.Field, weights.packed
    given, items = sequence_fields(size, tiling, x, y, before, scratch)
    columns = weights.by_column if tiling.columns else None
    pointer, index, values = columns or (packed.group_pointer, packed.index, packed.values)
    given |= {
        f.GROUP_POINTER: pointer, f.INDEX: index, f.VALUES: values, f.GROUPS: packed.groups, f.FIRST: weights.first,
        f.OUT_INDEX: np.ascontiguousarray(packed.out_index),
        f.BIAS: weights.bias_rows if columns is None else weights.bias,
    }  # fmt: skip
    if twins := columns is None and _joins_twins(weights, target):
        given[f.TWIN] = weights.twin
    form = recurrent.Form(size.cell, packed.group_size, twins, columns is not None, size.prune)
    return op_of(name, recurrent.recurrent(form, target), f, given, items)


def into_planes(name: str, tokens: int, x: StridedRef, y: MapAt, target: Target, rounds: bool = False) -> NativeOp:
    """Rows (tokens, features) as a map of a channel a feature; the features of a token are neighbours in x.

    Where it `rounds`, to bfloat16 numbers.
    """
    f, features = turn.Field, y.layout.channels
    given: dict[turn.Field, Given] = {
        f.ROWS_SLOT: x.slot, f.ROWS_OFFSET: x.offset_bytes, f.ROWS_TOKEN: x.strides[0], f.PLANES_SLOT: y.buffer.slot,
        f.PLANES_OFFSET: y.offset, f.PLANES_FEATURE: y.layout.channel(1), f.TOKENS: tokens, f.FEATURES: features,
    }  # fmt: skip
    return op_of(name, turn.into_planes(target, rounds), f, given, -(-tokens // target.lanes))


def out_of_planes(
    name: str, tokens: int, x: MapAt, y: StridedRef, residual: StridedRef | None, activation: str | None,
    target: Target,
) -> NativeOp:  # fmt: skip
    """A map of a channel a feature as rows; y and the residual that is added are (tokens, features).

    The features of a token are neighbours in both. The activation follows the sum.
    """
    f = turn.Field
    low, high, other = clamped(activation)
    given: dict[turn.Field, Given] = {
        f.ROWS_SLOT: y.slot, f.ROWS_OFFSET: y.offset_bytes, f.ROWS_TOKEN: y.strides[0], f.PLANES_SLOT: x.buffer.slot,
        f.PLANES_OFFSET: x.offset, f.PLANES_FEATURE: x.layout.channel(1), f.TOKENS: tokens,
        f.FEATURES: x.layout.channels, f.LOW: low, f.HIGH: high,
    }  # fmt: skip
    if residual is not None:
        given |= {
            f.RESIDUAL_SLOT: residual.slot, f.RESIDUAL_OFFSET: residual.offset_bytes,
            f.RESIDUAL_TOKEN: residual.strides[0],
        }  # fmt: skip
    clamps = (low, high) != (-math.inf, math.inf)
    ending = turn.Ending(residual is not None, clamps, other)
    return op_of(name, turn.out_of_planes(target, ending), f, given, -(-tokens // target.lanes))


def norm(
    name: str, tokens: int, x: StridedRef, y: StridedRef, weight: NDArray[np.float32],
    bias: NDArray[np.float32] | None, epsilon: float, target: Target,
) -> NativeOp:  # fmt: skip
    """Each row normalised; x and y are (tokens, features), contiguous, weight and bias (features,).

    By mean and variance, or where there is no bias by the mean square alone.
    """
    f = rows.Field
    features = len(weight)
    block = max(1, min(tokens, CHUNK_FLOATS // (4 * features)))
    given: dict[rows.Field, Given] = {
        f.X_SLOT: x.slot, f.X_OFFSET: x.offset_bytes, f.Y_SLOT: y.slot, f.Y_OFFSET: y.offset_bytes, f.ROWS: tokens,
        f.FEATURES: features, f.BLOCK: block, f.WEIGHT: weight, f.EPSILON: float(epsilon), f.SHARE: 1 / features,
    }  # fmt: skip
    if bias is not None:
        given[f.BIAS] = bias
    kernel = rows.rms_norm if bias is None else rows.layer_norm
    return op_of(name, kernel(target), f, given, -(-tokens // block))


class Heads(NamedTuple):
    """Sizes of an attention.

    Attributes:
        batch: images, or sequences.
        heads: of each.
        queries: of a head.
        keys: of a head, and values.
        width: features of a query and a key.
        value_width: features of a value and a result.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    value_width: int


def attention_scratch(size: Heads, target: Target) -> int:
    """Floats of scratch that `attend` needs for each thread."""
    if few(size.queries):
        return few_attention.scratch(size.keys, size.width)
    return attention.scratch(size.keys, size.width, size.value_width, target)


def attend(
    name: str, size: Heads, q: StridedRef, k: StridedRef, v: StridedRef, y: StridedRef, bias: StridedRef | None,
    scratch: Buffer, scale: float, target: Target,
) -> NativeOp:  # fmt: skip
    """Scaled dot-product attention.

    Args:
        name: of what is computed.
        size: of the values.
        q: ``(batch, heads, queries, width)``; the features of a head are neighbours, as in k, v and y.
        k: ``(batch, heads, keys, width)``.
        v: ``(batch, heads, keys, value_width)``.
        y: ``(batch, heads, queries, value_width)``.
        bias: ``(batch, heads, queries, keys)``, added to the scaled products; the keys are neighbours.
        scratch: `attention_scratch` floats for each thread.
        scale: of the products of queries and keys.
        target: what to compile for.
    """
    f = attention.Field
    given: dict[attention.Field, Given] = {
        f.Q_SLOT: q.slot, f.Q_OFFSET: q.offset_bytes, f.K_SLOT: k.slot, f.K_OFFSET: k.offset_bytes,
        f.V_SLOT: v.slot, f.V_OFFSET: v.offset_bytes, f.Y_SLOT: y.slot, f.Y_OFFSET: y.offset_bytes,
        f.Q_IMAGE: q.strides[0], f.Q_HEAD: q.strides[1], f.Q_TOKEN: q.strides[2],
        f.K_IMAGE: k.strides[0], f.K_HEAD: k.strides[1], f.K_TOKEN: k.strides[2],
        f.V_IMAGE: v.strides[0], f.V_HEAD: v.strides[1], f.V_TOKEN: v.strides[2],
        f.Y_IMAGE: y.strides[0], f.Y_HEAD: y.strides[1], f.Y_TOKEN: y.strides[2],
        f.SCRATCH_SLOT: scratch.slot, f.SCRATCH_OFFSET: scratch.offset,
        f.SCRATCH: attention_scratch(size, target), f.HEADS: size.heads,
        f.QUERIES: size.queries, f.KEYS: size.keys, f.WIDTH: size.width, f.VALUE_WIDTH: size.value_width,
        f.SCALE: float(scale),
    }  # fmt: skip
    if bias is not None:
        given |= {
            f.BIAS_SLOT: bias.slot, f.BIAS_OFFSET: bias.offset_bytes, f.BIAS_IMAGE: bias.strides[0],
            f.BIAS_HEAD: bias.strides[1], f.BIAS_TOKEN: bias.strides[2],
        }  # fmt: skip
    kernel = few_attention.attention if few(size.queries) else attention.attention
    return op_of(name, kernel(target, bias is not None), f, given, size.batch * size.heads)
