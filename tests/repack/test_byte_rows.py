"""Rows of bytes, what Linears over a few tokens and recurrences make of them: equal to numpy to the last bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from autoprune.errors import AutopruneError
from autoprune.model.recurrent.names import GATES
from autoprune.quantization import weight_scales
from autoprune.quantization.grid import Grid
from autoprune.repack.graph.ops import Recurrent
from autoprune.repack.graph.ops.recurrent import STATES
from autoprune.repack.kernels.compiler import Target, host
from autoprune.repack.lowering import byte_row_nodes
from autoprune.repack.lowering.byte_row_nodes import RowsOn
from autoprune.repack.lowering.dot_nodes import row_steps
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.lowering.token_nodes import Sequences
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.tuning.layer import neighbours
from autoprune.repack.weights.packed import PackedWeight, pack_rows
from tests.repack.byte_memory import (
    Bytes,
    Floats,
    Memory,
    dequantised,
    each_seed,
    floats_of,
    fma,
    grid_of,
    quantised,
    targets,
    to_bytes,
)


def in_lanes(q: Bytes) -> NDArray[np.float32]:
    """Rows of bytes as rows of lanes, whatever in those behind the last."""
    return np.ascontiguousarray(np.pad(q, ((0, 0), (0, -q.shape[1] % 4)), constant_values=99)).view(np.float32)


def out_of_lanes(lanes: NDArray[np.int32], features: int) -> Bytes:
    return np.ascontiguousarray(lanes).view(np.uint8)[:, :features]


def drawn(rng: random.Random) -> tuple[int, int]:
    """Tokens and features."""
    return rng.randint(1, 15), rng.choice([1, 3, 4, 9, 16, 21, 63, 64, 65, rng.randint(1, 300)])


@targets
def test_rows_become_bytes_and_floats_again(target: Target) -> None:
    def check(rng: random.Random, memory: Memory) -> None:
        (tokens, features), grid = drawn(rng), grid_of(rng)
        lanes, wide, apart = -(-features // 4), features + rng.choice([0, 3]), rng.choice([0, 2])
        x = floats_of(memory, (1, 1, tokens, features), grid)[0, 0]
        q = quantised(x, grid)
        rows = memory.floats((tokens, features), (wide, 1), x)
        made = memory.floats((tokens, lanes), (lanes + apart, 1))
        back = memory.floats((tokens, features), (wide, 1))
        memory.run(byte_row_nodes.quantised("x", tokens, features, rows, made, grid, target))
        assert np.array_equal(out_of_lanes(memory.strided(made, (tokens, lanes)), features), q)
        memory.run(byte_row_nodes.dequantised("x", tokens, features, made, back, grid, target))
        wanted = dequantised(q, grid)
        assert np.array_equal(memory.strided(back, (tokens, features)), wanted.view(np.int32))

    each_seed(12, check)


def weights_of(rng: random.Random, memory: Memory, filters: int, features: int, size: int) -> Weights:
    """Random ones, of some of the features in each group."""
    weight = memory.rng.normal(0, 1, (filters, features)).astype(np.float32)
    kept = memory.rng.random((-(-filters // size), features)) < rng.choice([0.0, 0.2, 0.6, 1.0])
    weight *= np.repeat(kept, size, axis=0)[:filters]
    given = torch.from_numpy(weight)
    packed = pack_rows(given, 1, neighbours(filters, size), weight_scales(given))
    return Weights.of(packed.validate(), torch.from_numpy(memory.rng.normal(0, 5, filters).astype(np.float32)))


def sums_of(weights: Weights, q: Bytes) -> NDArray[np.int64]:
    """The exact sums of each token, in the order of the packed rows."""
    sums: NDArray[np.int64] = q.astype(np.int64) @ weights.packed.unpack_values().astype(np.int64).T
    return sums


def of_filters(weights: Weights, rows: Floats) -> Floats:
    """What is known of each packed row, of each filter."""
    real = weights.packed.out_index.ravel() >= 0
    made = np.empty(weights.packed.shape[0], np.float32)
    made[weights.rows[real]] = rows[real]
    return made


LINEARS = (("floats", "", 16), ("bytes", "", 8), ("floats", "floats", 4), ("bytes", "floats", 16))
"""What it writes, what it adds, and filters in a group."""


@targets
@pytest.mark.parametrize(("output", "added", "size"), LINEARS)
def test_a_linear_is_its_sums_and_one_rounding(target: Target, output: str, added: str, size: int) -> None:
    def check(rng: random.Random, memory: Memory) -> None:
        (tokens, features), filters = drawn(rng), rng.choice([1, 4, 10, 16, 33, 64])
        weights, grid = weights_of(rng, memory, filters, features, size), grid_of(rng)
        on = grid_of(rng) if output == "bytes" else None
        q = memory.rng.integers(0, 256, (tokens, features)).astype(np.uint8)
        lanes, made_lanes = -(-features // 4), -(-filters // 4) if on else filters
        x = RowsOn(memory.floats((tokens, lanes), (lanes, 1), in_lanes(q)), grid)
        y = RowsOn(memory.floats((tokens, made_lanes), (made_lanes, 1)), on)
        activation, residual, other = rng.choice([None, "relu"]), np.zeros((tokens, filters), np.float32), None
        if added:
            residual = memory.rng.normal(0, 3, (tokens, filters)).astype(np.float32)
            other = RowsOn(memory.floats((tokens, filters), (filters, 1), residual), None)
        tiling = Tiling(size, rng.randint(1, 16), rng.randint(0, 3), whole=rng.randint(1, 4))
        op = byte_row_nodes.linear("y", weights, activation, tiling, tokens, x, y, other, target)
        memory.run(op)
        steps = row_steps(weights, grid, on, None, activation)
        factor, bias = of_filters(weights, steps.factor), of_filters(weights, steps.bias)
        wanted = fma(sums_of(weights, q).astype(np.float32), factor, bias)
        wanted = fma(residual, steps.residual, wanted) if added else wanted
        wanted = np.clip(wanted, np.float32(steps.low), np.float32(steps.high))
        found = memory.strided(y.at, (tokens, made_lanes))
        if on is None:
            assert np.array_equal(found, wanted.view(np.int32))
        else:
            assert np.array_equal(out_of_lanes(found, filters), to_bytes(wanted))

    each_seed(16, check)


@targets
@pytest.mark.parametrize(("cell", "size"), [("lstm", 16), ("gru", 8)])
def test_a_recurrence_meets_its_states_as_bytes(target: Target, cell: str, size: int) -> None:
    def check(rng: random.Random, memory: Memory) -> None:
        hidden, gates = rng.choice([1, 3, 8, 17, 40]), GATES[cell]
        units = tuple(sorted(rng.sample(range(hidden), -(-hidden // 2)))) if rng.random() < 0.4 else None
        live = hidden if units is None else len(units)
        weights = weights_of(rng, memory, gates * live, hidden, size)
        steps, batch, time_first, reverse = rng.randint(1, 4), rng.randint(1, 5), rng.random() < 0.5, rng.random() < 0.5
        about = Sequences(cell, steps, batch, hidden, units, time_first, reverse, 0.0, 0)
        lead = (steps, batch) if time_first else (batch, steps)
        x = memory.rng.normal(0, 2, (*lead, gates * live)).astype(np.float32)
        first = memory.rng.normal(0, 1, (batch, hidden)).astype(np.float32)  # beyond -1 and 1 too
        begins = () if units is not None else (first, first)[: 2 if cell == "lstm" else 1]
        before = tuple(memory.floats(each.shape, (hidden, 1), each) for each in begins)
        given = memory.floats(x.shape, (lead[1] * gates * live, gates * live, 1), x)
        kinds = 2 if cell == "lstm" else 1
        made = memory.floats((kinds, *lead, hidden), (steps * batch * hidden, lead[1] * hidden, hidden, 1))
        scratch = memory.buffer(batch * about.scratch, written=True)
        tiling = Tiling(size, 1, rng.randint(1, 3), whole=rng.randint(1, 4))
        memory.run(byte_row_nodes.sequence("y", weights, tiling, about, given, made, before, scratch, target))
        y = memory.strided(made, (kinds, *lead, hidden)).view(np.float32)
        # what the last step met: the state that the one before it left
        states = y[0] if time_first else y[0].transpose(1, 0, 2)
        order = states[::-1] if reverse else states
        met = order[-2] if steps > 1 else (first if begins else np.zeros_like(first))
        rows = row_steps(weights, STATES, None, None, None)
        sums = sums_of(weights, quantised(np.ascontiguousarray(met), STATES))
        wanted = fma(sums.astype(np.float32), of_filters(weights, rows.factor), of_filters(weights, rows.bias))
        start = memory.slots[scratch.slot][scratch.offset // 4 :][: batch * about.scratch].reshape(batch, -1)
        assert np.array_equal(start[:, : gates * live], wanted.view(np.int32))
        assert np.allclose(y, evaluated(weights.packed, weights.bias, about, x, begins), atol=0.02)

    each_seed(12, check)


def evaluated(packed: PackedWeight, bias: Floats, about: Sequences, x: Floats, before: tuple[Floats, ...]) -> Floats:
    """What the operation says."""
    assert packed.scale is not None
    names = ("x", *(f"h{number}" for number in range(len(before))))
    op = Recurrent(
        "y", names, {}, cell=about.cell, time_first=about.time_first, reverse=about.reverse, threshold=0.0, keep=0,
        units=about.units, interleaved=True,
    )  # fmt: skip
    w = {"weight": packed.unpack(), "bias": torch.from_numpy(bias), "scale": torch.from_numpy(packed.scale)}
    made: Floats = op.evaluate([torch.from_numpy(each) for each in (x, *before)], w, {}).numpy()
    return made


def test_sums_that_could_wrap_are_refused() -> None:
    weights = Weights.of(
        PackedWeight(
            (4, 70000), 1, 4, np.array([0, 70000], np.int32), np.arange(70000, dtype=np.int32),
            np.full((70000, 4), 127, np.int8), np.arange(4, dtype=np.int32)[None], np.ones(4, np.float32),
        ), None,
    )  # fmt: skip
    memory = Memory(0)
    x, y = memory.floats((1, 17500), (17500, 1)), memory.floats((1, 4), (4, 1))
    rows = RowsOn(x, Grid(1.0, 0)), RowsOn(y, None)
    with pytest.raises(AutopruneError, match="do not fit 32 bits"):
        byte_row_nodes.linear("y", weights, None, Tiling(4), 1, *rows, None, host())
