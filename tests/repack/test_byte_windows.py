"""Windows over interleaved maps, and means: equal to numpy to the last bit, inside their buffers."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from autoprune.errors import AutopruneError
from autoprune.quantization.grid import Grid
from autoprune.repack.kernels.compiler import Target, host
from autoprune.repack.lowering import byte_nodes, map_nodes
from autoprune.repack.lowering.buffers import Buffer, MapAt, StridedRef
from autoprune.repack.lowering.geometry import Window
from autoprune.repack.lowering.layout import MapLayout
from tests.repack.byte_memory import (
    TARGETS,
    Memory,
    Shape,
    bordered,
    bytes_of,
    each_seed,
    fma,
    grid_of,
    in_lanes,
    layout_of,
    shape_of,
    targets,
    to_bytes,
    whole_quads,
)


def window_of(rng: random.Random, shape: Shape, dilated: bool = True, largest: int = 4) -> tuple[Window, Shape]:
    """A window that fits a map, and the shape of what it gives."""
    while True:
        kernel, stride = ((rng.randint(1, most), rng.randint(1, most)) for most in (largest, 3))
        dilation = (rng.randint(1, 2), rng.randint(1, 2)) if dilated else (1, 1)
        window = Window(kernel, stride, (rng.randint(0, kernel[0] // 2), rng.randint(0, kernel[1] // 2)), dilation)
        height, width = window.outputs(shape[2], shape[3], rng.random() < 0.3)
        if height > 0 and width > 0:
            return window, (*shape[:2], height, width)


def windows(whole: NDArray[Any], window: Window, margin: tuple[int, int], outputs: Shape) -> NDArray[Any]:
    """What each output reads of a bordered map: (taps, N, C, H, W)."""
    (sh, sw), (h, w) = window.stride, outputs[2:]
    return np.stack([
        whole[:, :, margin[0] + dy :: sh, margin[1] + dx :: sw][:, :, :h, :w] for dy, dx in window.taps()
    ])  # fmt: skip


@targets
def test_the_largest_of_each_window(target: Target) -> None:
    def check(rng: random.Random, memory: Memory) -> None:
        shape, border = shape_of(rng, 2), rng.choice([0, 7])
        window, outputs = window_of(rng, shape)
        n, margin = shape[0], window.margin(shape[2:], outputs[2:])
        q = whole_quads(bytes_of(memory, shape), 3)
        y_layout = layout_of(rng, outputs)
        x = memory.map(n, layout_of(rng, shape, pad=margin))
        if window.stride == (1, 1) and rng.random() < 0.7:  # one pitch
            pitch = max(x.layout.pitch, y_layout.pitch)
            x, y_layout = memory.map(n, replace(x.layout, pitch=pitch)), replace(y_layout, pitch=pitch)
        memory.put(x, q, 0)
        y = memory.map(n, y_layout, written=True)
        memory.run(byte_nodes.pooled("y", window, n, x, y, border, target))
        wanted = windows(bordered(q, x.layout, 0), window, margin, outputs).max(axis=0)
        assert np.array_equal(memory.get(y, n), in_lanes(bordered(wanted, y.layout, border)))

    each_seed(25, check)


@targets
def test_the_mean_of_each_window(target: Target) -> None:
    def check(rng: random.Random, memory: Memory) -> None:
        shape, grid, made = shape_of(rng, 2), grid_of(rng), grid_of(rng)
        made = rng.choice([grid, made])
        window, outputs = window_of(rng, shape, dilated=False)
        if rng.random() < 0.1:  # sums that 16 bits do not hold
            shape = (1, 5, 30, 20)
            window, outputs = Window((26, 10), (2, 1), (1, 2), (1, 1)), (1, 5, 4, 15)
        n, margin = shape[0], window.margin(shape[2:], outputs[2:])
        q = whole_quads(bytes_of(memory, shape), grid.zero_point)
        counted = map_nodes.Counted(rng.random() < 0.5, rng.choice([None, None, 3]))
        x = memory.map(n, layout_of(rng, shape, pad=margin))
        memory.put(x, q, grid.zero_point)
        y = memory.map(n, layout_of(rng, outputs), written=True)
        memory.run(byte_nodes.averaged_windows("y", window, n, x, y, (grid, made), counted, target))
        given = windows(bordered(q, x.layout, grid.zero_point), window, margin, outputs).astype(np.int64)
        sums = (given - grid.zero_point).sum(axis=0).astype(np.float32)
        ones = np.ones((1, 1, *shape[2:]), np.int64)
        pads = [(0, 0), (0, 0), *((pad, pad) for pad in window.padding)]
        ones = np.pad(ones, pads, constant_values=int(counted.padding))
        beyond = [(0, 0), (0, 0), *((most - pad, most - pad) for most, pad in zip(margin, window.padding, strict=True))]
        count = windows(np.pad(ones, beyond), window, margin, outputs).sum(axis=0)
        share = (1 / (count if counted.divisor is None else np.full_like(count, counted.divisor))).astype(np.float32)
        wanted = to_bytes(sums * (share * np.float32(grid.scale / made.scale)), made.zero_point)
        assert np.array_equal(memory.get(y, n), in_lanes(bordered(wanted, y.layout, made.zero_point)))

    each_seed(25, check)


@targets
def test_the_mean_of_each_channel(target: Target) -> None:
    def check(rng: random.Random, memory: Memory) -> None:
        shape, grid = shape_of(rng), grid_of(rng)
        n, c, h, w = shape
        q = bytes_of(memory, shape)
        x = memory.map(n, layout_of(rng, shape))
        memory.put(x, q, grid.zero_point)
        y = memory.floats((n, c), (c * 2 + 1, 2))
        memory.run(byte_nodes.averaged("y", n, c, x, y, grid, target))
        sums = (q.astype(np.int64) - grid.zero_point).sum(axis=(2, 3)).astype(np.float32)
        wanted = sums * np.float32(np.float32(grid.scale) / (h * w))
        assert np.array_equal(memory.strided(y, (n, c)).view(np.float32), wanted)

    each_seed(25, check)


def test_sums_that_might_wrap_are_refused() -> None:
    x = MapAt(Buffer(0, slot=1), MapLayout(1, 3000, 3000, 3000))
    with pytest.raises(AutopruneError, match="31 bits"):
        byte_nodes.averaged("y", 1, 4, x, StridedRef(1, 0, (4, 1)), Grid(1.0), host())


def without_vnni(target: Target) -> Target:
    return replace(target, features=f"{target.features},-avxvnni,-avx512vnni")


@pytest.mark.slow
@pytest.mark.parametrize("phases", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("target", [*TARGETS.values(), *map(without_vnni, TARGETS.values())])
def test_depthwise_convolutions(target: Target, phases: bool) -> None:
    check_depthwise(target, phases, count=25)


def check_depthwise(target: Target, phases: bool, count: int) -> None:
    """So many random ones."""

    def check(rng: random.Random, memory: Memory) -> None:
        shape, grid, made = shape_of(rng, 2), grid_of(rng), grid_of(rng)
        window, outputs = window_of(rng, shape, largest=5)
        n, c = shape[:2]
        margin = window.margin(shape[2:], outputs[2:])
        x = memory.map(n, layout_of(rng, shape, window.stride if phases else (1, 1), pad=margin))
        q, extreme = bytes_of(memory, shape), rng.random() < 0.2
        weights = memory.rng.integers(-127, 128, (c, len(window.taps()))).astype(np.int8)
        if extreme:
            q[...], weights[...] = 255, rng.choice([-127, 127])
        memory.put(x, q, grid.zero_point)
        floats, activation = rng.random() < 0.4, rng.choice(["", "", "silu"])
        scale = np.float32(1e-4)
        factor = (memory.rng.uniform(0.5, 2, c) * (scale if activation or floats else 0.01)).astype(np.float32)
        bias = memory.rng.normal(0, 1, c).astype(np.float32)
        bias = bias if activation or floats else bias + np.float32(made.zero_point)
        low, high = (-np.inf, np.inf) if floats else (0.0, 255.0)
        low = rng.choice([low, 3.0])
        y_layout = layout_of(rng, outputs, channels=c if floats else None)
        if window.stride == (1, 1) and rng.random() < 0.7:  # one pitch
            pitch = max(x.layout.pitch, y_layout.pitch)
            x, y_layout = memory.map(n, replace(x.layout, pitch=pitch)), replace(y_layout, pitch=pitch)
            memory.put(x, q, grid.zero_point)
        y = memory.map(n, y_layout, written=True)
        ending = byte_nodes.Ending(factor, bias, low, high, activation)
        memory.run(byte_nodes.depthwise("y", window, n, x, y, weights, ending, None if floats else made, target))
        pads = [(0, 0), (0, 0), *((pad, pad) for pad in margin)]
        given = windows(np.pad(q, pads, constant_values=grid.zero_point), window, margin, outputs).astype(np.int64)
        sums = np.einsum("tnchw,ct->nchw", given, weights.astype(np.int64)).astype(np.float32)
        steps = fma(sums, factor[:, None, None], bias[:, None, None])
        if activation:
            steps = torch.nn.functional.silu(torch.from_numpy(steps)).numpy()
            steps = steps if floats else fma(steps, made.inverse, made.zero_point)
        steps = np.clip(steps, low, high)
        got = memory.get(y, n)
        around = [(0, 0), (0, 0), (y.layout.pad_h,) * 2, (y.layout.pad_w,) * 2]
        if activation and floats:
            np.testing.assert_allclose(got.view(np.float32), np.pad(steps, around), rtol=1e-6, atol=1e-6)
        elif activation:  # polynomials: next to a tie they may fall on its other side
            wanted = bordered(to_bytes(steps), y.layout, made.zero_point)
            there = np.ascontiguousarray(got).view(np.uint8).reshape(*got.shape, 4).transpose(0, 1, 4, 2, 3)
            assert np.abs(there.reshape(wanted.shape).astype(int) - wanted).max() <= 1
        elif floats:
            assert np.array_equal(got.view(np.float32), np.pad(steps, around))
        else:
            assert np.array_equal(got, in_lanes(bordered(to_bytes(steps), y.layout, made.zero_point)))

    each_seed(count, check)


def test_products_that_might_wrap_are_refused() -> None:
    at, weights = MapAt(Buffer(0, slot=1), MapLayout(1, 300, 300, 300)), np.full((4, 70_000), 127, np.int8)
    ending = byte_nodes.Ending(np.ones(4, np.float32), np.ones(4, np.float32), 0.0, 255.0)
    with pytest.raises(AutopruneError, match="31 bits"):
        byte_nodes.depthwise(
            "y", Window((70, 1000), (1, 1), (0, 0), (1, 1)), 1, at, at, weights, ending, Grid(1.0), host()
        )
