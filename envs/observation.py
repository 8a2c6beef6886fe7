"""Observations: fixed length and scale-free, so that one policy fits any model.

Nothing is min-max scaled over a model's own layers: sizes are logs, costs are shares, curves are fractions of the
dense layer, so the numbers mean the same on a model the policy has never seen.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from autoprune.envs.problem import Problem
from autoprune.plan import LayerSpec, Plan

OBSERVATION_VERSION = 2
KINDS = ("conv2d", "grouped conv2d", "linear", "recurrent")
CURVE_ANCHORS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # sparsities at which the curves are read
LIMIT = 10.0

NAMES = (
    "is run step",
    *(f"is {kind}" for kind in KINDS),
    "position",
    "log out",
    "log in",
    "log kernel",
    "log positions",
    "strided",
    "share of weights",
    "share of macs",
    "share of latency",
    *(f"latency at {a}" for a in CURVE_ANCHORS),
    *(f"accuracy drop at {a}" for a in CURVE_ANCHORS),
    "latency saved so far",
    "latency still undecided",
    "accuracy drop so far",
    "log target speed-up",
    "target accuracy drop",
    "target sparsity",
    "log layers",
)


def length(action_size: int) -> int:
    """Length of an observation: the features and the previous action."""
    return len(NAMES) + action_size


class Observer:
    """Writes observations of one problem; what does not change within an episode is computed once."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        names = problem.inventory.names
        self._layers = [_layer(problem, index) for index in range(len(names))]
        self._run = [0.0] * len(self._layers[0])
        self._dense_us = [problem.table.dense_us(name) for name in names]
        target = problem.target
        self._target = [
            math.log2(target.speedup) if target.speedup is not None else 0.0,
            10 * target.accuracy_drop if target.accuracy_drop is not None else 0.0,
            target.sparsity if target.sparsity is not None else 0.0,
            math.log2(len(names)) / 6,
        ]

    def observe(self, plan: Plan, step: int, previous: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the agent sees before step `step`: 0 is the run's hyper-parameters, i >= 1 is layer i."""
        layer = self._run if step == 0 else self._layers[step - 1]
        features = [float(step == 0), *layer, *self._progress(plan, max(0, step - 1)), *self._target, *previous]
        return np.clip(np.array(features, dtype=np.float32), -LIMIT, LIMIT)

    def _progress(self, plan: Plan, decided: int) -> list[float]:
        table, names = self._problem.table, self._problem.inventory.names[:decided]
        done = [(name, plan.layers[name]) for name in names]
        all_us, dense_us = sum(self._dense_us), sum(self._dense_us[:decided])
        used_us = sum(table.layer_us(name, str(layer.pattern), layer.sparsity) for name, layer in done)
        lost = sum(self._problem.sensitivity.drop(name, layer.sparsity) for name, layer in done)
        return [(dense_us - used_us) / all_us, 1.0 - dense_us / all_us, lost]


def _kind(layer: LayerSpec) -> str:
    if layer.gates > 1:
        return "recurrent"
    return "grouped conv2d" if layer.conv_groups > 1 else layer.kind


def _layer(problem: Problem, index: int) -> list[float]:
    layers, table = problem.inventory.layers, problem.table
    layer = layers[index]
    dense_us = table.dense_us(layer.name)
    all_us = sum(table.dense_us(other.name) for other in layers)
    pattern = str(problem.pattern)
    return [
        *(float(_kind(layer) == kind) for kind in KINDS),
        (index + 1) / len(layers),
        math.log2(layer.weight_shape[0]) / 10,
        math.log2(layer.weight_shape[1]) / 10,
        math.log2(math.prod(layer.weight_shape[2:])) / 5,
        math.log2(max(1, layer.positions)) / 15,
        float(max(layer.stride) > 1),
        layer.weights / sum(other.weights for other in layers),
        layer.macs / sum(other.macs for other in layers),
        dense_us / all_us,
        *(table.layer_us(layer.name, pattern, anchor) / dense_us for anchor in CURVE_ANCHORS),
        *(problem.sensitivity.drop(layer.name, anchor) for anchor in CURVE_ANCHORS),
    ]
