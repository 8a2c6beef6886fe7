"""Values brought into interleaved maps and out of them: equal to numpy to the last bit, inside their buffers."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from autoprune.errors import AutopruneError
from autoprune.quantization.grid import Grid
from autoprune.repack.kernels.compiler import Target, host
from autoprune.repack.lowering import byte_nodes, byte_sums
from autoprune.repack.lowering.buffers import StridedRef
from autoprune.repack.lowering.layout import MapLayout
from autoprune.repack.weights.quads import lanes_of
from tests.repack.byte_memory import (
    Floats,
    Memory,
    Shape,
    bordered,
    bytes_of,
    dequantised,
    each_seed,
    floats_of,
    fma,
    grid_of,
    in_lanes,
    layout_of,
    quantised,
    shape_of,
    targets,
    to_bytes,
    whole_quads,
)


def test_the_reference_is_the_grid() -> None:
    memory, grid = Memory(0), Grid(0.03, 77)
    x = floats_of(memory, (2, 3, 20, 20), grid)
    assert np.array_equal(quantised(x, grid), grid.quantize(torch.from_numpy(x)).numpy())
    q = bytes_of(memory, (1, 4, 9, 9))
    assert np.array_equal(dequantised(q, grid), grid.dequantize(torch.from_numpy(q)).numpy())


@targets
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1), (1, 3)])
def test_rows_become_bytes(target: Target, stride: tuple[int, int]) -> None:
    def check(rng: random.Random, memory: Memory) -> None:
        shape, grid = shape_of(rng), grid_of(rng)
        n, c, h, w = shape
        row = w + rng.choice([0, 3])
        channel = h * row + rng.choice([0, 7])
        x = floats_of(memory, shape, grid)
        y = memory.map(n, layout_of(rng, shape, stride), written=True)
        ref = memory.floats(shape, (c * channel, channel, row, 1), x)
        memory.run(byte_nodes.quantised("x", shape, ref, y, grid, target))
        assert np.array_equal(memory.get(y, n), in_lanes(bordered(quantised(x, grid), y.layout, grid.zero_point)))

    each_seed(20, check)


@targets
def test_tokens_become_bytes(target: Target) -> None:
    def check(rng: random.Random, memory: Memory) -> None:
        n, f, t = rng.randint(1, 2), rng.choice([1, 3, 5, 16, 33, 64, 65, 130]), rng.choice([1, 2, 15, 16, 17, 40])
        shape, grid, token = (n, f, 1, t), grid_of(rng), f + rng.choice([0, 2])
        x = floats_of(memory, shape, grid)
        y = memory.map(n, layout_of(rng, shape), written=True)
        ref = memory.floats(shape, (t * token, 1, t * token, token), x)
        memory.run(byte_nodes.quantised("x", shape, ref, y, grid, target))
        assert np.array_equal(memory.get(y, n), in_lanes(bordered(quantised(x, grid), y.layout, grid.zero_point)))

    each_seed(25, check)


@targets
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1)])
def test_bytes_become_a_map_of_floats(target: Target, stride: tuple[int, int]) -> None:
    def check(rng: random.Random, memory: Memory) -> None:
        shape, grid = shape_of(rng), grid_of(rng)
        n, c, *_ = shape
        q = bytes_of(memory, shape)
        x = memory.map(n, layout_of(rng, shape))
        memory.put(x, q, grid.zero_point)
        y = memory.map(n, layout_of(rng, shape, stride, channels=c), written=True)
        memory.run(byte_nodes.dequantised("y", shape, x, y, grid, target))
        wanted = np.pad(dequantised(q, grid), ((0, 0), (0, 0), (y.layout.pad_h,) * 2, (y.layout.pad_w,) * 2))
        assert np.array_equal(memory.get(y, n).view(np.float32), wanted)

    each_seed(15, check)


@targets
def test_a_border_that_is_not_zero_is_left_alone(target: Target) -> None:
    memory, grid, shape = Memory(0), Grid(0.1, 3), (2, 5, 4, 19)
    q = bytes_of(memory, shape)
    x = memory.map(2, MapLayout(2, 4, 19, 20, 1, 1))
    memory.put(x, q, grid.zero_point)
    y = memory.map(2, MapLayout(5, 4, 19, 22, 1, 2, border=float("-inf")), written=True)
    before = memory.get(y, 2)
    memory.run(byte_nodes.dequantised("y", shape, x, y, grid, target))
    before[:, :, 1:-1, 2:-2] = dequantised(q, grid).view(np.int32)
    assert np.array_equal(memory.get(y, 2), before)


@targets
@pytest.mark.parametrize("tokens", [False, True])
def test_bytes_become_rows(target: Target, tokens: bool) -> None:
    def check(rng: random.Random, memory: Memory) -> None:
        shape, grid = shape_of(rng), grid_of(rng)
        if tokens:
            shape = (shape[0], rng.choice([1, 3, 33, 64, 65, 130]), 1, shape[3])
        n, c, h, w = shape
        q = bytes_of(memory, shape)
        x = memory.map(n, layout_of(rng, shape))
        memory.put(x, q, grid.zero_point)
        y = memory.floats(shape, (c * w, 1, c * w, c) if tokens else (c * h * w, h * w, w, 1))
        memory.run(byte_nodes.dequantised("y", shape, x, y, grid, target))
        assert np.array_equal(memory.strided(y, shape).view(np.float32), dequantised(q, grid))

    each_seed(25, check)


@targets
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1), (40, 40)])
def test_a_map_is_moved(target: Target, stride: tuple[int, int]) -> None:
    def check(rng: random.Random, memory: Memory) -> None:
        shape, border = shape_of(rng), rng.choice([0, 128, 255])
        n = shape[0]
        q = whole_quads(bytes_of(memory, shape), 9)
        x = memory.map(n, layout_of(rng, shape))
        memory.put(x, q, 77)
        y = memory.map(n, layout_of(rng, shape, stride), written=True)
        memory.run(byte_nodes.moved("y", n, x, y, border, target))
        assert np.array_equal(memory.get(y, n), in_lanes(bordered(q, y.layout, border)))

    each_seed(15, check)


def test_scattered_floats_are_refused() -> None:
    memory = Memory(0)
    y = memory.map(1, MapLayout(1, 4, 4, 4))
    with pytest.raises(AutopruneError, match="strides"):
        byte_nodes.quantised("x", (1, 4, 4, 4), StridedRef(1, 0, (64, 1, 16, 4)), y, Grid(1.0), host())


def steps(given: list[tuple[NDArray[Any], Grid | None]], grid: Grid) -> Floats:
    """The sum of values, bytes or floats, in steps of a grid."""
    factors = [(1.0 if on is None else float(np.float32(on.scale))) / float(np.float32(grid.scale)) for _, on in given]
    bias = float(grid.zero_point)
    for factor, (_, on) in zip(factors, given, strict=True):
        bias -= 0.0 if on is None else on.zero_point * factor
    total = np.float32(bias) * np.ones(given[0][0].shape, np.float32)
    for factor, (x, _) in zip(factors, given, strict=True):
        total = fma(x, factor, total)
    return total


def put_on(memory: Memory, rng: random.Random, shape: Shape, pitch: int, made: Grid) -> tuple[byte_nodes.On, Any]:
    """A map of bytes or of floats, and what is in it."""
    grid = rng.choice([made, grid_of(rng), None])
    pads = (rng.randint(0, 2), min(2, pitch - shape[3]))
    layout = MapLayout(shape[1] if grid is None else lanes_of(shape[1]), *shape[2:], pitch, *pads)
    at = memory.map(shape[0], layout)
    if grid is None:
        x = floats_of(memory, shape, made)
        x[np.isinf(x)] = 0.0
        memory.put_floats(at, x)
        return byte_nodes.On(at, None), x
    q = bytes_of(memory, shape)
    memory.put(at, q, grid.zero_point)
    return byte_nodes.On(at, grid), q


@targets
def test_values_are_added(target: Target) -> None:
    def check(rng: random.Random, memory: Memory) -> None:
        shape, grid = shape_of(rng), grid_of(rng)
        y = memory.map(shape[0], layout_of(rng, shape), written=True)
        (a, given), (b, other) = (put_on(memory, rng, shape, y.layout.pitch, grid) for _ in range(2))
        bounds = rng.choice([(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0)])
        memory.run(byte_sums.added("y", shape, a, b, y, grid, target, bounds))
        low, high = (np.float32(bound / float(np.float32(grid.scale)) + grid.zero_point) for bound in bounds)
        total = np.nan_to_num(steps([(given, a.grid), (other, b.grid)], grid), nan=-np.inf)
        wanted = to_bytes(np.clip(total, max(low, np.float32(0)), min(high, np.float32(255))))
        assert np.array_equal(memory.get(y, shape[0]), in_lanes(bordered(wanted, y.layout, grid.zero_point)))

    each_seed(40, check)


@targets
def test_values_are_joined_along_channels(target: Target) -> None:
    def check(rng: random.Random, memory: Memory) -> None:
        n, _, h, w = shape_of(rng)
        grid = grid_of(rng)
        counts = [rng.choice([1, 2, 3, 4, 5, 7, 8]) for _ in range(rng.randint(1, 4))]
        y = memory.map(n, layout_of(rng, (n, sum(counts), h, w)), written=True)
        wanted, first = [], 0
        for channels in counts:
            shape = (n, channels, h, w)
            x, given = put_on(memory, rng, shape, y.layout.pitch, grid)
            memory.run(byte_sums.joined("y", shape, x, y, grid, first, target))
            wanted.append(given if x.grid == grid else to_bytes(steps([(given, x.grid)], grid)))
            first += channels
        whole = bordered(np.concatenate(wanted, axis=1), y.layout, grid.zero_point)
        assert np.array_equal(memory.get(y, n), in_lanes(whole))

    each_seed(40, check)
