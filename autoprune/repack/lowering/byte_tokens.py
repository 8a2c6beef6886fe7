"""Rules of Linears of bytes over fewer tokens than a vector holds: their values on grids are rows of bytes.

A row has four features in a lane. The form is chosen by the number of tokens, and so the same for all layers that read
a value; what else reads it reads floats, made of the bytes.
"""

from __future__ import annotations

import math
from typing import Any

from autoprune.repack.graph.ops import Linear
from autoprune.repack.lowering import byte_row_nodes
from autoprune.repack.lowering.buffers import Buffer, StridedRef
from autoprune.repack.lowering.byte_row_nodes import RowsOn
from autoprune.repack.lowering.context import Lowering
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.lowering.interleaved import only_reader, put_on
from autoprune.repack.lowering.steps import NativeStep, storage_of
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.native.op import NativeOp
from autoprune.repack.weights.quads import lanes_of


def few(lowering: Lowering, tokens: int) -> bool:
    """Whether so many tokens leave lanes of a vector empty."""
    return tokens < lowering.target.lanes


def linear(lowering: Lowering, op: Linear, shape: tuple[int, ...]) -> None:
    """A packed Linear of bytes over few tokens: a vector holds the filters of a group."""
    tokens, x = math.prod(shape[:-1]), op.inputs[0]
    given, grid = _rows(lowering, x), lowering.grids[x]
    residual = None if op.residual is None else lowering.rows(op.residual)
    rounding, meta = only_reader(lowering, op), lowering.define(op.output, shape)
    if rounding is None:
        made, on = Buffer(meta.numel()), None
        lowering.buffers[storage_of(meta)] = made
    else:
        lowering.define(rounding.output, shape)
        put_on(lowering, rounding.output, rounding.grid)
        made, on = _new(lowering, rounding.output), rounding.grid
        lowering.made_of_bytes[rounding.output] = _floats

    def build(weights: Weights | None, tiling: Tiling) -> NativeOp:
        assert weights is not None
        y = RowsOn(made.ref(shape[-1] if on is None else lanes_of(shape[-1]), 1), on)
        other = None if residual is None else RowsOn(residual.rows(), None)
        return byte_row_nodes.linear(
            op.output, weights, op.activation, tiling, tokens, RowsOn(_ref(lowering, x, given), grid), y, other,
            lowering.target,
        )  # fmt: skip

    reads = [given, *([residual.buffer] if residual is not None else [])]
    lowering.steps.append(NativeStep(op.output, reads, made, build, op, (tokens, 1)))


def _new(lowering: Lowering, name: str) -> Buffer:
    """Room for a value's rows of bytes, which the next step writes."""
    *lead, features = lowering.values[name].shape
    made = lowering.byte_rows[name] = Buffer(math.prod(lead) * lanes_of(features))
    return made


def _ref(lowering: Lowering, name: str, rows: Buffer) -> StridedRef:
    return rows.ref(lanes_of(lowering.values[name].shape[-1]), 1)


def _rows(lowering: Lowering, name: str) -> Buffer:
    """A value on a grid as rows of bytes, ``(tokens, ceil(features / 4))``; rounded where it is floats."""
    if name not in lowering.byte_rows:
        floats, grid = lowering.rows(lowering.unrounded.get(name, name)), lowering.grids[name]
        made = _new(lowering, name)
        *lead, features = floats.shape

        def build(*_: Any) -> NativeOp:
            x, y = floats.rows(), _ref(lowering, name, made)
            return byte_row_nodes.quantised(name, math.prod(lead), features, x, y, grid, lowering.target)

        lowering.steps.append(NativeStep(name, [floats.buffer], made, build))
    return lowering.byte_rows[name]


def _floats(lowering: Lowering, name: str) -> None:
    """The step that makes a value's floats of its rows of bytes."""
    meta, rows = lowering.values[name], lowering.byte_rows[name]
    *lead, features = meta.shape
    buffer = lowering.buffers[storage_of(meta)] = Buffer(meta.numel())

    def build(*_: Any) -> NativeOp:
        x, y, grid = _ref(lowering, name, rows), buffer.ref(features, 1), lowering.grids[name]
        return byte_row_nodes.dequantised(name, math.prod(lead), features, x, y, grid, lowering.target)

    lowering.steps.append(NativeStep(name, [rows], buffer, build))
