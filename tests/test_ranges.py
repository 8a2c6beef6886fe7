"""Observers, range methods and the scales of weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from autoprune.errors import AutopruneError
from autoprune.quantization import (
    LEVELS,
    METHODS,
    WEIGHT_LEVELS,
    Grid,
    Observer,
    least_squares_weight_scales,
    on_scales,
    weight_scales,
)
from autoprune.quantization.ranges import weight_noise
from autoprune.repack.weights.packed import pack_rows


def observed(*batches: Tensor) -> Observer:
    observer = Observer("value")
    for batch in batches:
        observer.add(batch)
    return observer


def error(grid: Grid, x: Tensor) -> float:
    return float((grid.rounded(x) - x).double().square().sum())


def test_observer_does_not_depend_on_the_order_of_batches_nor_on_their_size() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(1000) * 10.0**scale for scale in (-6, 3, 0, -2)] + [torch.zeros(7), torch.full((3,), -5.0)]
    whole = observed(torch.cat(parts))
    for order in (parts, parts[::-1], [parts[4], *parts[:4], parts[5]]):
        other = observed(*order)
        assert (other.low, other.high, other.count) == (whole.low, whole.high, whole.count)
        assert torch.equal(other.centres, whole.centres)
        assert torch.equal(other.counts, whole.counts)
    assert int(whole.counts.sum()) == whole.count == 4010


def test_observer_counts_what_a_histogram_of_all_the_data_counts() -> None:
    torch.manual_seed(1)
    x = torch.randn(5000).double().float() * 3 + 1
    observer = observed(x[:10], x[10:])
    width = float(observer.centres[2] - observer.centres[1])
    edges = torch.cat([observer.centres[1:-1].double() - width / 2, torch.tensor([math.inf])])
    expected, _ = np.histogram(x.double().numpy(), np.array([-math.inf, *edges[:-1], edges[-2] + width, math.inf]))
    assert observer.counts.tolist() == expected.tolist()


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-3, 1.0, 1e6, 1e30])
def test_quantiles_lie_within_a_bin_of_the_exact_ones(scale: float) -> None:
    torch.manual_seed(2)
    x = torch.randn(20_000) * scale
    observer = observed(x)
    step = 2e-3 * scale + 2.0**-118
    for share in (0.001, 0.5, 0.999):
        bound = observer.quantile(share)
        assert float((x < bound - step).double().mean()) <= share <= float((x < bound + step).double().mean())
    assert observer.low <= observer.quantile(0.0)
    assert observer.quantile(1.0) == observer.high


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_name_the_value_and_the_batch(bad: float) -> None:
    observer = observed(torch.ones(3))
    with pytest.raises(AutopruneError, match=r"'value' is NaN or infinite somewhere in calibration batch 2"):
        observer.add(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("constant", [0.0, 3.0, -0.37, 1e-30, -1e30])
def test_a_value_that_never_varies_gets_a_grid_that_holds_it(method: str, constant: float) -> None:
    x = torch.full((40,), constant)
    observer = observed(x, x)
    assert observer.constant
    grid = METHODS[method](observer)
    assert float(grid.rounded(x)[0]) == pytest.approx(float(x[0]), rel=1e-5)
    assert grid.zero_point == (LEVELS if constant < 0 else 0)
    if constant == 0:
        assert grid == Grid(1.0, 0)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_never_negative_gets_the_zero_point_zero(method: str) -> None:
    torch.manual_seed(3)
    assert METHODS[method](observed(torch.randn(4000).relu())).zero_point == 0
    assert METHODS[method](observed(torch.rand(4000) + 2)).zero_point == 0


def test_min_max_clips_nothing_and_percentiles_clip_both_tails() -> None:
    torch.manual_seed(4)
    x = torch.randn(200_000)
    grids = {name: METHODS[name](observed(x)) for name in METHODS}
    step = grids["min_max"].scale
    assert grids["min_max"].high == pytest.approx(float(x.max()), abs=step)
    assert grids["min_max"].low == pytest.approx(float(x.min()), abs=step)
    for percent in (99.9, 99.99):
        grid = grids[f"percentile_{percent}"]
        assert grid.high == pytest.approx(float(torch.sort(x).values[int(len(x) * percent / 100)]), abs=0.1)
        assert grid.low == pytest.approx(-grid.high, abs=0.3)


@pytest.mark.parametrize("seed", range(5))
def test_least_squares_has_the_least_error(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(10_000) * torch.rand(10_000).pow(3) + seed % 3
    x[:5] *= 4
    observer = observed(x)
    errors = {name: error(make(observer), x) for name, make in METHODS.items()}
    assert errors["least_squares"] <= 1.02 * min(errors.values())
    assert observer.noise(METHODS["least_squares"](observer)) == pytest.approx(errors["least_squares"], rel=0.1)


@pytest.mark.parametrize("sign", [1, -1])
def test_least_squares_clips_an_outlier_that_costs_the_rest_more(sign: int) -> None:
    torch.manual_seed(6)
    x = torch.rand(500_000)
    x[7] = 2.0
    observer = observed(sign * x)
    grid = METHODS["least_squares"](observer)
    assert max(grid.high, -grid.low) < 1.5
    assert error(grid, sign * x) < 0.8 * error(METHODS["min_max"](observer), sign * x)


@pytest.mark.parametrize("seed", range(5))
def test_weights_on_scales_are_packed_without_a_further_error(seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(16, 24) * 10.0 ** (torch.rand(16, 1) * 60 - 30)
    weight[3], weight[:, 5] = 0.0, 0.0
    for scales in (weight_scales(weight), least_squares_weight_scales(weight)):
        on_grid = on_scales(weight, scales)
        packed = pack_rows(on_grid, 1, np.arange(16, dtype=np.int32).reshape(-1, 8), scales).validate()
        assert torch.equal(packed.unpack(), on_grid)
        assert scales[3] == 1
        assert not on_grid[3].any()
        assert int(np.abs(packed.values).max()) <= WEIGHT_LEVELS


def test_least_squares_scales_are_never_worse_than_those_of_the_largest_weight() -> None:
    torch.manual_seed(5)
    weight = torch.rand(3, 100_000) * 2 - 1
    weight[0, 0], weight[1, 0] = 1.3, -1.3
    by_max, by_squares = weight_scales(weight), least_squares_weight_scales(weight)
    noise, least = weight_noise(weight, by_max), weight_noise(weight, by_squares)
    assert bool((least <= noise).all())
    assert float(least[:2].sum()) < 0.8 * float(noise[:2].sum())


def test_weights_that_are_not_finite_have_no_scales() -> None:
    with pytest.raises(AutopruneError, match="NaN or infinite"):
        least_squares_weight_scales(torch.tensor([[1.0, math.nan]]))
