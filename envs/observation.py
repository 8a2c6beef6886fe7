"""Observations: fixed length and scale-free, so that one policy fits any model.

Nothing is min-max scaled over a model's own layers: sizes are logs, costs are shares, curves are fractions of the
dense layer or logs of the loss, so the numbers mean the same on a model the policy has never seen. A layer's curves are
those in float32, also where plans choose precisions; what a plan loses, and has saved so far, is in the plan's own.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from autoprune.envs.curves import GRID, Array, Decided, place
from autoprune.envs.problem import Problem
from autoprune.plan import LayerSpec, Plan

OBSERVATION_VERSION = 3
KINDS = ("conv2d", "grouped conv2d", "linear", "recurrent")
CURVE_ANCHORS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # sparsities at which the curves are read
LIMIT = 10.0

STRUCTURE = (
    *(f"is {kind}" for kind in KINDS),
    "position",
    "log out",
    "log in",
    "log kernel",
    "log positions",
    "strided",
    "before a norm",
    "share of weights",
    "share of macs",
    "share of latency",
    "starting sparsity",
    "starting sparsity before",  # of the layer before this one; likewise after
    "starting sparsity after",
)
CURVES = (
    *(f"latency at {a}" for a in CURVE_ANCHORS),
    *(f"log loss at {a}" for a in CURVE_ANCHORS),
    *(f"error at {a}" for a in CURVE_ANCHORS),
    "log loss at the starting sparsity",
    "error at the starting sparsity",
    "share of the starting plan's loss",
)
MODEL = (
    "log target speed-up",
    "target accuracy drop",
    "target sparsity",
    "log layers",
    "starting plan's log loss",
    "starting plan's mean sparsity",
    "share of time that plans decide",
)
PROGRESS = ("latency saved so far", "latency still undecided", "log loss so far")

NAMES = ("is run step", *STRUCTURE, *CURVES, *MODEL, *PROGRESS)


def length(action_size: int) -> int:
    """Length of an observation: the features and the previous action."""
    return len(NAMES) + action_size


class Observer:
    """Writes observations of one problem; what does not change within an episode is computed once.

    Before the run's hyper-parameters, a layer's features are means over all layers.

    Args:
        problem: what is observed.
        start: the plan episodes start with.
        curves: whether the layers' curves are seen; without them those features are 0.
    """

    def __init__(self, problem: Problem, start: Plan, curves: bool = True) -> None:
        rows = _layers(problem, start)
        if not curves:
            rows[:, len(STRUCTURE) :] = 0.0
        model = _model(problem, start)
        steps = [np.concatenate([[1.0], rows.mean(0), model])]
        steps += [np.concatenate([[0.0], row, model]) for row in rows]
        self._steps = np.clip(np.array(steps), -LIMIT, LIMIT).astype(np.float32)
        dense_ms = problem.curves.dense_ms
        self._all_ms = float(dense_ms.sum())
        self._undecided = 1.0 - np.concatenate([[0.0], np.cumsum(dense_ms)]) / self._all_ms

    def observe(self, decided: Decided, step: int, previous: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the agent sees before step `step`: 0 is the run's hyper-parameters, i >= 1 is layer i."""
        progress = (decided.saved_ms / self._all_ms, self._undecided[decided.layers], float(log_loss(decided.lost)))
        return np.concatenate([self._steps[step], np.array(progress, np.float32), previous])


def log_loss(loss: float | Array) -> Array:
    """A rise of the loss from 0.0001 to 10 as about 0 to 1."""
    return np.asarray((np.log10(np.asarray(loss) + 1e-4) + 4.0) / 5.0)


def _kind(layer: LayerSpec) -> str:
    if layer.gates > 1:
        return "recurrent"
    kind = "conv2d" if layer.kind == "conv1d" else layer.kind  # one of height 1
    return f"grouped {kind}" if layer.conv_groups > 1 else kind


def _layers(problem: Problem, start: Plan) -> Array:
    """`STRUCTURE` and `CURVES` of every layer, (layers, features)."""
    layers, curves = problem.inventory.layers, problem.curves
    dense_ms, ms = curves.dense_ms, curves.ms(str(problem.pattern))
    chosen = np.array([place(start.layers[layer.name].sparsity) for layer in layers])
    lost, error = curves.plan_lost(start)
    around = np.concatenate([[0.0], chosen / GRID, [0.0]])
    weights, macs = (sum(getattr(layer, name) for layer in layers) for name in ("weights", "macs"))
    rows = []
    for row, layer in enumerate(layers):
        anchors = [place(anchor) for anchor in CURVE_ANCHORS]
        rows.append(
            [
                *(float(_kind(layer) == kind) for kind in KINDS),
                (row + 1) / len(layers),
                math.log2(layer.weight_shape[0]) / 10,
                math.log2(layer.weight_shape[1]) / 10,
                math.log2(math.prod(layer.weight_shape[2:])) / 5,
                math.log2(max(1, layer.positions)) / 15,
                float(max(layer.stride) > 1),
                float(layer.norm is not None),
                layer.weights / weights,
                layer.macs / macs,
                dense_ms[row] / dense_ms.sum(),
                around[row + 1],
                around[row],
                around[row + 2],
                *(ms[row, anchors] / dense_ms[row]),
                *log_loss(curves.loss[row, anchors]),
                *curves.error[row, anchors],
                float(log_loss(lost[row])),
                error[row],
                lost[row] / max(1e-9, lost.sum()),
            ]
        )
    return np.array(rows)


def _model(problem: Problem, start: Plan) -> Array:
    """`MODEL`."""
    target, curves = problem.target, problem.curves
    chosen = np.array([place(start.layers[name].sparsity) for name in problem.inventory.names])
    lost = curves.plan_lost(start)[0].sum()
    decided_ms = curves.ms(str(problem.pattern))[:, 0].sum()
    whole_ms = problem.table.whole_ms(float(decided_ms + curves.fixed_ms))
    return np.array(
        [
            math.log2(problem.required_speedup) if problem.required_speedup is not None else 0.0,
            10 * target.accuracy_drop if target.accuracy_drop is not None else 0.0,
            target.sparsity if target.sparsity is not None else 0.0,
            math.log2(len(chosen)) / 6,
            float(log_loss(lost)),
            float(chosen.mean()) / GRID,
            min(1.0, decided_ms / whole_ms),
        ]
    )
