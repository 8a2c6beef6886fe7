"""How a grid is found for what was observed of a value, and scales for the filters of a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from autoprune.quantization.grid import WEIGHT_LEVELS, Grid, weight_scales
from autoprune.quantization.observer import Observer

SHRUNK = [2 ** (-step / 24) for step in range(120)]  # of a range, down to a thirtieth of it
SHRUNK_WEIGHTS = [1 - step / 50 for step in range(26)]


def min_max(observer: Observer) -> Grid:
    """The grid of all that was observed: nothing is clipped."""
    return Grid.of_range(observer.low, observer.high)


def percentile(observer: Observer, percent: float) -> Grid:
    """The grid that clips the elements above a percentile, and as many below."""
    share = percent / 100
    return Grid.of_range(observer.quantile(1 - share), observer.quantile(share))


def least_squares(observer: Observer) -> Grid:
    """The grid with the least squared error on what was observed: its range is cut at both ends, then at each."""
    low, high = min(observer.low, 0.0), max(observer.high, 0.0)
    best = 1.0, 1.0
    for ends in ((True, True), (True, False), (False, True)):
        tried = [(best[0] * share if ends[0] else best[0], best[1] * share if ends[1] else best[1]) for share in SHRUNK]
        best = min(tried, key=lambda cut: observer.noise(Grid.of_range(low * cut[0], high * cut[1])))
    return Grid.of_range(low * best[0], high * best[1])


METHODS: Mapping[str, Callable[[Observer], Grid]] = {
    "min_max": min_max,
    "percentile_99.9": partial(percentile, percent=99.9),
    "percentile_99.99": partial(percentile, percent=99.99),
    "least_squares": least_squares,
}
"""Range methods: what was observed of a value -> its grid."""


def least_squares_weight_scales(weight: Tensor) -> Tensor:
    """The scale of each filter, ``(out,)``, whose steps are nearest to its weights; 1 for a filter of zeros.

    Args:
        weight: dense float32, ``(out, ...)``.

    Raises:
        AutopruneError: a weight is not finite.
    """
    scales = weight_scales(weight)
    best, least = scales, weight_noise(weight, scales)
    for share in SHRUNK_WEIGHTS[1:]:
        tried = torch.clamp(scales * share, min=torch.finfo(torch.float32).tiny)
        noise = weight_noise(weight, tried)
        best, least = torch.where(noise < least, tried, best), torch.minimum(noise, least)
    return best


def on_scales(weight: Tensor, scales: Tensor) -> Tensor:
    """The multiples of each filter's scale nearest to its weights, -127 to 127 of them; float32, of weight's shape.

    Dividing them by the scale and rounding gives the bytes back.
    """
    per_filter = scales.reshape(-1, *[1] * (weight.ndim - 1))
    return torch.round(weight / per_filter).clamp(-WEIGHT_LEVELS, WEIGHT_LEVELS) * per_filter


def weight_noise(weight: Tensor, scales: Tensor) -> Tensor:
    """The squared error of each filter's weights on its scale, ``(out,)``."""
    return (on_scales(weight, scales) - weight).square().flatten(1).sum(dim=1)
