"""Lowers what works on rows of tokens: Linears, norms, recurrences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from autoprune.errors import AutopruneError
from autoprune.repack.graph.ops import LayerNorm, Linear, Recurrent, RmsNorm
from autoprune.repack.lowering import bf16_rules, byte_row_nodes, byte_rules, convolutions, token_nodes
from autoprune.repack.lowering.buffers import Buffer
from autoprune.repack.lowering.context import Lowering, turn_back, turned
from autoprune.repack.lowering.geometry import Tiling, Window
from autoprune.repack.lowering.layout import ALIGN
from autoprune.repack.lowering.steps import Map, NativeStep, is_float, storage_of
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.native.op import NativeOp


def norm(lowering: Lowering, op: LayerNorm | RmsNorm) -> bool:
    """Each row normalised; False where its weights do not fit and torch has to run it."""
    x = lowering.rows(op.inputs[0])
    features = op.size if isinstance(op, LayerNorm) else (0, *x.shape)[-1]
    arrays = {role: lowering.graph.constants[name] for role, name in op.tensors.items()}
    fitting = all(is_float(each) and each.shape == (features,) for each in arrays.values())
    if x.shape[-1:] != (features,) or not features or not fitting:
        return False
    weight = arrays.get("weight", torch.ones(features, dtype=torch.float32, device="cpu")).contiguous().numpy()
    bias = None
    if isinstance(op, LayerNorm):
        bias = arrays.get("bias", torch.zeros(features, dtype=torch.float32, device="cpu")).contiguous().numpy()
    meta = lowering.define(op.output, x.shape)
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())

    def build(*_: Any) -> NativeOp:
        tokens, y = meta.numel() // features, buffer.ref(features, 1)
        return token_nodes.norm(op.output, tokens, x.rows(), y, weight, bias, op.eps, lowering.target)

    lowering.steps.append(NativeStep(op.output, [x.buffer], buffer, build))
    return True


def recurrent(lowering: Lowering, op: Recurrent) -> bool:
    """One direction of an LSTM or GRU, all its steps; False where its weight is not packed gate by gate."""
    if op.output not in lowering.weights or not op.interleaved:
        return False
    weight = lowering.constants[op.tensors["weight"]]
    x, before = lowering.rows(op.inputs[0]), [lowering.rows(name) for name in op.inputs[1:]]
    if len(x.shape) != 3 or x.shape[2] != weight.shape[0]:
        raise AutopruneError(f"a recurrent layer takes projections (..., ..., {weight.shape[0]}), not {x.shape}.")
    steps, batch = x.shape[:2] if op.time_first else (x.shape[1], x.shape[0])
    hidden = weight.shape[1]
    for view in before:
        if view.shape != (batch, hidden):
            raise AutopruneError(f"a recurrent layer begins with a state {(batch, hidden)}, not {view.shape}.")
    size = token_nodes.Sequences(
        op.cell, steps, batch, hidden, op.units, op.time_first, op.reverse, op.threshold, op.keep
    )
    meta = lowering.define(op.output, (2 if size.cell == "lstm" else 1, *x.shape[:2], hidden))
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())
    scratch = Buffer(batch * size.scratch, scratch=True)
    lowering.scratches.append(scratch)

    def build(weights: Weights | None, tiling: Tiling) -> NativeOp:
        assert weights is not None
        starts = tuple(view.rows() for view in before)
        make = token_nodes.sequence if weights.packed.scale is None else byte_row_nodes.sequence
        return make(
            op.output, weights, tiling, size, x.ref(), buffer.ref(), starts, scratch, lowering.target
        )  # fmt: skip

    reads = [x.buffer, scratch, *(view.buffer for view in before)]
    lowering.steps.append(NativeStep(op.output, reads, buffer, build, op, (steps, batch)))
    return True


def linear(lowering: Lowering, op: Linear) -> bool:
    """A packed Linear; False where it is not packed."""
    if op.output not in lowering.weights:
        return False
    weight, given = lowering.constants[op.tensors["weight"]], lowering.values[op.inputs[0]].shape
    if given[-1:] != weight.shape[1:]:
        raise AutopruneError(f"a Linear takes {weight.shape[1]} features, not an input of shape {tuple(given)}.")
    shape = (*given[:-1], weight.shape[0])
    lowering.same_shape(op, op.residual, shape)
    if byte_rules.in_bytes(lowering, op):
        byte_rules.linear(lowering, op, shape)
        return True
    meta = lowering.define(op.output, shape)
    tokens = meta.numel() // weight.shape[0]
    if tokens >= lowering.target.lanes:
        _by_position(lowering, op, tokens)
        return True
    in_bf16 = bf16_rules.in_bf16(lowering, op)
    x = (bf16_rules.rounded_rows if in_bf16 else Lowering.rows)(lowering, op.inputs[0])
    residual = None if op.residual is None else lowering.rows(op.residual)
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())

    def build(weights: Weights | None, tiling: Tiling) -> NativeOp:
        assert weights is not None
        y, other = buffer.ref(weight.shape[0], 1), None if residual is None else residual.rows()
        return token_nodes.linear(
            op.output, weights, op.activation, tiling, tokens, x.rows(), y, other, lowering.target
        )

    reads = [x.buffer, *([residual.buffer] if residual is not None else [])]
    lowering.steps.append(NativeStep(op.output, reads, buffer, build, op, (tokens, 1)))
    return True


def _by_position(lowering: Lowering, op: Linear, tokens: int) -> None:
    """A Linear over many tokens as a convolution by one position."""
    out = lowering.constants[op.tensors["weight"]].shape[0]
    in_bf16 = bf16_rules.in_bf16(lowering, op)
    given = (bf16_rules.rounded_planes if in_bf16 else turned)(lowering, op.inputs[0], tokens)
    made = Map((1, out, 1, tokens), (1, 1), 0.0).padded((0, 0))
    made.pitch.join(given.pitch)
    scratch = lowering.scratch(convolutions.room_for_panels(op.output, lowering.weights, lowering.tilings))
    window = Window((1, 1), (1, 1), (0, 0), (1, 1))
    added = op.residual
    activation = op.activation if added is None else None

    def build(weights: Weights | None, tiling: Tiling) -> NativeOp:
        assert weights is not None
        if tokens < ALIGN:  # as `rows_gemm` sums them on targets of wider vectors
            tiling = replace(tiling, panel=0, serpentine=False)
        return convolutions.convolution(
            op.output, weights, window, activation, tiling, 1, given.at, made.at, None, scratch, lowering.target
        )

    residual = None if added is None else lowering.rows(added)
    reads = [given.buffer, scratch]
    lowering.steps.append(NativeStep(op.output, reads, made.buffer, build, op, (tokens, 1), by_position=True))
    lowering.planes[op.output if added is None else lowering.own_name(f"{op.output} before")] = made
    if residual is not None:
        turn_back(lowering, op.output, made, residual, op.activation)
