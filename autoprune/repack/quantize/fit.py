"""Fitting int8 layers to calibration data: the grid of what they read, the scales of their filters.

Errors are those of a layer's weighted sums, before a residual and an activation, and with the float model's values as
its input: what is found for one layer does not depend on which others are int8.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from autoprune.quantization import METHODS, Grid, Observer, least_squares_weight_scales, on_scales, weight_scales
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import Conv2d, LayerOp
from autoprune.repack.graph.ops.recurrent import STATES
from autoprune.repack.quantize.batches import Batch, walked
from autoprune.repack.quantize.placement import Int8Layer, Placement

BEST = "best"
"""The range method that takes, for each value, the one of METHODS with the least measured error."""


def decibels(signal: float, noise: float) -> float:
    """A signal-to-noise ratio in dB; infinite where there is no noise, minus infinity where there is no end of it."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and noise < math.inf else -math.inf


def weighted_sums(op: LayerOp, x: Tensor, weight: Tensor) -> Tensor:
    """The sums of a layer's products for each filter, without its bias: ``(samples, positions, filters)``."""
    if isinstance(op, Conv2d):
        return op.convolved(x, {"weight": weight}).flatten(2).transpose(1, 2)
    y = F.linear(x, weight)
    return y.reshape(len(y) if y.ndim > 1 else 1, -1, len(weight))


class Ranges:
    """The grids of values, by one range method or the best one.

    Args:
        observers: value -> what was observed of it.
        method: a key of METHODS, or BEST.
        noise: (int8 layer, value of its chain) -> method -> the error of its sums as a share of them, for BEST.
    """

    def __init__(
        self, observers: Mapping[str, Observer], method: str, noise: Mapping[tuple[str, str], Mapping[str, float]]
    ) -> None:
        self.observers, self._method, self._noise = observers, method, noise
        self._grids: dict[tuple[str, str], Grid] = {}

    def method(self, placement: Placement, value: str) -> str:
        """The range method of a value; least squares where the best is asked for and no int8 layer reads it."""
        if self._method != BEST:
            return self._method
        readers = [layer for layer in placement.chains if placement.source(layer) == value]
        if not readers:
            return "least_squares"
        return min(METHODS, key=lambda method: sum(self._noise[layer, value][method] for layer in readers))

    def grid(self, value: str, method: str) -> Grid:
        """The grid of a value by a method."""
        if (value, method) not in self._grids:
            self._grids[value, method] = METHODS[method](self.observers[value])
        return self._grids[value, method]

    def grids(self, placement: Placement) -> dict[str, Grid]:
        """The grid of every value that is moved onto one."""
        owners = {value: placement.like.get(value, value) for value in placement.behind}
        while any(owner in placement.like for owner in owners.values()):  # what is joined may be joined again
            owners = {value: placement.like.get(owner, owner) for value, owner in owners.items()}
        return {value: self.grid(owner, self.method(placement, owner)) for value, owner in owners.items()}


def fitted_ranges(
    graph: Graph, batches: Sequence[Batch], placement: Placement, observers: Mapping[str, Observer], method: str
) -> Ranges:
    """The grids of values; of the best method, by the error that each makes in the layers' sums."""
    ranges = Ranges(observers, method, {})
    if method != BEST:
        return ranges
    signal: dict[str, float] = dict.fromkeys(placement.chains, 0.0)
    noise = {
        (layer, value): dict.fromkeys(METHODS, 0.0) for layer, chain in placement.chains.items() for value in chain
    }
    with torch.inference_mode():
        for batch in batches:
            for op, values in walked(graph, batch):
                if op.output not in placement.chains or not isinstance(op, LayerOp):
                    continue
                x, weight = values[op.inputs[0]], graph.constants[op.tensors["weight"]]
                signal[op.output] += _energy(weighted_sums(op, x, weight))
                tried: dict[Grid, float] = {}
                for value in placement.chains[op.output]:
                    for name in METHODS:
                        grid = ranges.grid(value, name)
                        if grid not in tried:
                            tried[grid] = _energy(weighted_sums(op, grid.rounded(x) - x, weight))
                        noise[op.output, value][name] += tried[grid]
    shares = {
        (layer, value): {name: error / (signal[layer] or 1.0) for name, error in errors.items()}
        for (layer, value), errors in noise.items()
    }
    return Ranges(observers, method, shares)


def _energy(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


@dataclass(frozen=True)
class Fitted:
    """An int8 layer with the signal-to-noise ratio of its weighted sums."""

    layer: Int8Layer
    snr_db: float


def fitted_layers(graph: Graph, batches: Sequence[Batch], inputs: Mapping[str, Grid]) -> dict[str, Fitted]:
    """Int8 layers for a graph: each filter has the scale, of two, that makes the smaller error in its sums.

    They are that of its largest weight and the least-squares one of its weights.

    Args:
        graph: of floats.
        batches: as `fitting_batches` gives them.
        inputs: the output of each layer -> the grid of what its weight meets.
    """
    layers = {op.output: op for op in graph.ops if isinstance(op, LayerOp) and op.output in inputs}
    weights = {name: graph.constants[op.tensors["weight"]].detach() for name, op in layers.items()}
    scales = {name: (weight_scales(w), least_squares_weight_scales(w)) for name, w in weights.items()}
    rounded = {name: [on_scales(w, each) for each in scales[name]] for name, w in weights.items()}
    signal = dict.fromkeys(layers, 0.0)
    noise = {name: torch.zeros(len(scales[name]), len(w), dtype=torch.float64) for name, w in weights.items()}
    with torch.inference_mode():
        for batch in batches:
            for op, values in walked(graph, batch):
                if op.output not in layers:
                    continue
                layer, x = layers[op.output], layers[op.output].met(values)
                exact, on_grid = weighted_sums(layer, x, weights[op.output]), inputs[op.output].rounded(x)
                signal[op.output] += _energy(exact)
                for number, weight in enumerate(rounded[op.output]):
                    error = weighted_sums(layer, on_grid, weight) - exact
                    noise[op.output][number] += error.square().sum((0, 1), dtype=torch.float64)
    fitted = {}
    for name, weight in weights.items():
        least, choice = noise[name].min(dim=0)
        chosen = torch.stack(scales[name])[choice, torch.arange(len(choice))]
        snr_db = decibels(signal[name], float(least.sum()))
        fitted[name] = Fitted(Int8Layer(on_scales(weight, chosen), chosen), snr_db)
    return fitted


def grids_of_inputs(placement: Placement, grids: Mapping[str, Grid], layers: Collection[str]) -> dict[str, Grid]:
    """The grid of what each layer's weight meets: its input, or the states of a recurrent one."""
    return {layer: grids[placement.source(layer)] if layer in placement.chains else STATES for layer in layers}
