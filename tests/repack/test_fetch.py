"""The fetch model: a cache as textbooks have it, and the lines a kernel must touch, counted by hand."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import autoprune
from autoprune.errors import AutopruneError
from autoprune.patterns.group import Group
from autoprune.repack import ProgramModel
from autoprune.repack.graph.ir import Graph, Input
from autoprune.repack.graph.ops import Conv2d, op_from_json
from autoprune.repack.kernels.compiler import Target, host, narrowed
from autoprune.repack.kernels.rows_gemm import tokens_together
from autoprune.repack.lowering.convolutions import serpentine
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.lowering.steps import NativeStep
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.runtime.program import Program
from autoprune.repack.tuning.cache_model import Cache, CacheState, Fetched, What, fetched
from autoprune.repack.tuning.layer_memory import layer_memory
from autoprune.repack.tuning.tuning import TuningCache
from autoprune.repack.weights.packed import pack
from autoprune.repack.weights.serialized import store

HUGE = Cache(2**26, 64, 16)


@given(
    seed=st.integers(0, 2**20),
    cache=st.sampled_from([Cache(512, 64, 1), Cache(512, 64, 8), Cache(1536, 32, 4), Cache(4096, 128, 2)]),
    spread=st.sampled_from([300, 3000, 30000]),
)
def test_misses_are_those_of_least_recently_used_sets(seed: int, cache: Cache, spread: int) -> None:
    addresses = np.random.default_rng(seed).integers(0, spread, 500)
    sets: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(cache.sets)]
    expected = []
    for address in addresses.tolist():
        line = address // cache.line
        held = sets[line % cache.sets]
        expected.append(line not in held)
        held.pop(line, None)
        held[line] = None
        if len(held) > cache.ways:
            held.popitem(last=False)
    state = CacheState(cache)
    halves = [state.misses(part) for part in np.array_split(addresses, 2)]  # what it holds is kept between calls
    assert np.concatenate(halves).tolist() == expected


@pytest.mark.parametrize(
    "shape", [(0, 64, 8), (1000, 64, 8), (4096, 48, 8), (4096, 64, 0), (4096, 64, 3), (4096.0, 64, 8)]
)
def test_a_cache_that_cannot_be_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(AutopruneError, match="a cache has a line of a power of two bytes"):
        Cache(*shape)


def by_convolution(
    tiling: Tiling, cache: Cache, sparsity: float = 0.5, size: int = 8, filters: int = 32, target: Target | None = None
) -> Fetched:
    torch.manual_seed(0)
    weight = torch.randn(filters, 16, 3, 3)
    weight *= Group(size).mask(weight.abs(), sparsity)
    weights = Weights.of(pack(weight, size=size), None)
    attributes = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1, "activation": None}
    op = op_from_json("conv2d", "y", ("x",), attributes, {"weight": "w"})
    graph = Graph((Input("x", (1, 16, 20, 20), "float32"),), (op,), "y", {"w": weight})
    program = Program(graph, {"y": weights}, {"y": tiling}, threads=1, target=target)
    plan = program.plan(((1, 16, 20, 20),))
    frame = plan.frame()
    step = next(step for step in plan.lowered.steps if isinstance(step, NativeStep) and step.layer)
    native = step.build(weights, tiling)
    found = fetched(native, Conv2d, size, program.target, frame.slots, cache)
    plan.release(frame)
    return found


TILINGS = [Tiling(8, 24), Tiling(8, 192, 2, False), Tiling(8, 48, panel=40), Tiling(8, 48, panel=40, serpentine=True)]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_nothing_is_fetched_twice_into_a_cache_that_holds_everything(tiling: Tiling) -> None:
    assert by_convolution(tiling, HUGE).total == 0


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_every_line_is_fetched_by_a_cache_that_holds_next_to_nothing(tiling: Tiling) -> None:
    tiny, small, usual = (by_convolution(tiling, Cache(size, 64, 1)) for size in (64, 8192, 2**18))
    assert tiny.total > small.total > usual.total
    least = pack_bytes(tiling) / 64
    assert tiny.lines[What.WEIGHT] >= least
    assert tiny.bytes == 64 * tiny.total


def pack_bytes(tiling: Tiling) -> int:
    torch.manual_seed(0)
    weight = torch.randn(32, 16, 3, 3)
    return int(pack(weight * Group(8).mask(weight.abs(), 0.5), size=8).values.nbytes)


def test_fewer_kept_positions_fetch_less() -> None:
    cache = Cache(4096, 64, 8)
    totals = [by_convolution(Tiling(8, 48), cache, sparsity).total for sparsity in (0.0, 0.5, 0.75, 0.9)]
    assert totals == sorted(totals, reverse=True)


def test_panels_read_inputs_from_the_nearest_cache() -> None:
    cache, target = Cache(8192, 64, 8), narrowed(8)  # wider registers hold the whole group: its inputs are read once
    whole, panels = (by_convolution(Tiling(8, 48, panel=panel), cache, 0.0, target=target) for panel in (0, 36))
    assert panels.lines[What.INPUT] < 0.5 * whole.lines[What.INPUT]


def test_the_serpentine_order_fetches_fewer_inputs_and_computes_the_same() -> None:
    cache = Cache(4096, 64, 8)
    rising, turned = (by_convolution(Tiling(8, 24, serpentine=flag), cache, 0.5) for flag in (False, True))
    assert turned.lines[What.INPUT] < rising.lines[What.INPUT]
    packed = pack(torch.randn(24, 8, 3, 3) * Group(8).mask(torch.rand(24, 8, 3, 3), 0.5), size=8)
    other = serpentine(packed)
    assert torch.equal(other.unpack(), packed.unpack())
    assert np.array_equal(replace(other, index=serpentine(other).index).index, packed.index)


@pytest.mark.parametrize("size", [4, 16])
def test_a_linear_streams_its_weights_once_for_one_token(size: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 512)
    weight *= Group(size).mask(weight.abs(), 0.75)
    fast = autoprune.repack(nn.Sequential(linear := nn.Linear(512, 256)), torch.ones(1, 512), {"0": weight != 0})
    assert linear.weight.shape == weight.shape
    assert isinstance(fast, ProgramModel)
    (row,) = layer_memory(fast, torch.ones(1, 512), Cache(4096, 64, 8))
    packed = fast.program.weights["linear"].packed
    assert row.fetched is not None
    lines = row.fetched.lines
    assert packed.values.nbytes / 64 <= lines[What.WEIGHT] <= 1.05 * packed.values.nbytes / 64 + 40
    assert packed.index.nbytes / 64 <= lines[What.INDEX] <= 1.1 * packed.index.nbytes / 64 + 40
    assert row.stored_bytes == store(packed).bytes


def test_many_tokens_read_the_weights_again_for_every_few() -> None:
    totals, few = [], tokens_together(16, host())
    counts = [
        min(count, host().lanes - 1) for count in (few, few + 1)
    ]  # more are computed as a convolution's positions
    for tokens in counts:
        model, x = nn.Sequential(nn.Linear(256, 128)), torch.ones(tokens, 256)
        fast = autoprune.repack(model, x, cache=told(TuningCache(), Tiling(16, 1000)))
        (row,) = layer_memory(fast, x, Cache(1024, 64, 8))
        assert row.fetched is not None
        totals.append(row.fetched.lines[What.WEIGHT])
    passes = -(-counts[1] // few)  # two; one where the registers hold the sums of a whole vector of tokens
    assert totals[1] == pytest.approx(passes * totals[0], rel=0.25)  # addresses decide what meets in a set


def test_groups_that_keep_the_same_read_their_input_once() -> None:
    """A dense weight's groups are twins; with one input less in every other group, none are."""
    lanes, x, inputs = host().lanes, torch.ones(1, 512), []
    for left_out in (0, 1):
        model = nn.Sequential(linear := nn.Linear(512, 8 * lanes))
        with torch.no_grad():
            linear.weight.view(4, 2, lanes, 512)[:, 1, :, :left_out] = 0
        fast = autoprune.repack(model, x, cache=told(TuningCache(), Tiling(lanes, 1000)))
        (row,) = layer_memory(fast, x, Cache(1024, 64, 8))
        assert row.fetched is not None
        inputs.append(row.fetched.lines[What.INPUT])
    assert inputs[1] == pytest.approx(2 * inputs[0], rel=0.1)


def told(cache: TuningCache, tiling: Tiling) -> TuningCache:
    """A cache that knows every layer's tiling, so that no timing decides."""

    class Told(dict[str, Tiling]):
        def __contains__(self, key: object) -> bool:
            return True

        def __missing__(self, key: str) -> Tiling:
            return tiling

    cache.found = Told()
    return cache
