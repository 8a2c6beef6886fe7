"""Stand-ins for slow and noisy parts: a fake clock and a problem with analytic latency and score."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from autoprune.envs.problem import Problem
from autoprune.evaluation.measurement import Evaluate, Evaluated, Measurement
from autoprune.evaluation.profile import profile_settings
from autoprune.evaluation.sensitivity import Sensitivity
from autoprune.latency.machine import machine_identity
from autoprune.latency.table import LatencyTable, LayerTable, Point
from autoprune.model.inventory import Inventory, take_inventory
from autoprune.plan import LayerSpec, Plan, curve_of
from autoprune.precision import OfLayer, RunPrecision, choices_of_layers
from autoprune.registry import Choice
from autoprune.target import Target

if TYPE_CHECKING:
    from autoprune.pipeline.run import Run  # a fake clock need not wait for all stages of a run

IN_BYTES = 3.0  # times as fast as float32
ANCHORS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)


@dataclass
class FakeClock:
    """A clock that moves on by `step_s` seconds at each reading."""

    step_s: float = 1e-3
    now_s: float = 0.0

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


def fake_table(
    inventory: Inventory,
    patterns: tuple[Choice, ...],
    *,
    fixed_us: float = 0.5,
    precisions: tuple[OfLayer, ...] = ("float32",),
) -> LatencyTable:
    """A latency table in which time follows the kept MACs at 10 per nanosecond, plus a fixed cost a layer.

    In int8 at `IN_BYTES` times that; the first layer cannot be int8.
    """
    first = inventory.names[0]

    def curve(layer: LayerSpec, precision: OfLayer) -> tuple[Point, ...]:
        macs = layer.macs / (IN_BYTES if precision == "int8" and layer.name != first else 1.0)
        return tuple(Point(s, fixed_us + (1.0 - s) * macs / 1e4, "fake") for s in ANCHORS)

    layers = {
        layer.name: LayerTable(
            dense_us=fixed_us + 1.2 * layer.macs / 1e4,
            calls=1,
            curves={
                curve_of(pattern, precision): curve(layer, precision)
                for precision, pattern in itertools.product(precisions, patterns)
            },
        )
        for layer in inventory.layers
    }
    dense_ms = 0.005 + sum(layer.dense_us for layer in layers.values()) / 1e3
    return LatencyTable(
        layers, dense_ms=dense_ms, whole=((0.001, 0.006), (100.0, 100.005)), settings={"batch": 1}, machine={}
    )


def save_fake_table(run: Run) -> LatencyTable:
    """Writes `fake_table` to where a run keeps its latency table, so that the run measures none.

    The run's task, dense model and calibration are made for that, if they are not yet.
    """
    context, subject = run.context, run.preparation.subject
    latency, patterns = context.config.latency, context.choices.patterns
    table = replace(
        fake_table(subject.inventory, patterns, precisions=choices_of_layers(subject.precision)),
        settings=profile_settings(subject, patterns, latency.batch, latency.threads),
        machine=machine_identity(),
    )
    table.save(run.directory / "latency.json")
    return table


@dataclass(frozen=True)
class EvaluateBy(Evaluate):
    """A function as an evaluation."""

    function: Callable[[Plan], Evaluated]

    def __call__(self, plan: Plan) -> Evaluated:
        return self.function(plan)


@dataclass(frozen=True)
class FakeEvaluate(Evaluate):
    """Analytic score (layers differ in how soon they break) and the table's own latency."""

    inventory: Inventory
    table: LatencyTable
    dense_score: float = 0.98

    def layer_drop(self, name: str, sparsity: float, precision: OfLayer = "float32") -> float:
        """Drop of the score by one layer: late, wide layers bear more; in int8 a little more."""
        rank = self.inventory.names.index(name) / max(1, len(self.inventory.layers) - 1)
        return float(0.4 * sparsity ** (2.0 + 8.0 * rank)) + (0.004 if precision == "int8" else 0.0)

    def __call__(self, plan: Plan) -> Measurement:
        lost = sum(self.layer_drop(name, layer.sparsity, layer.precision) for name, layer in plan.layers.items())
        latency_ms = self.table.predict_ms(plan)
        return Measurement(self.dense_score * math.exp(-lost), latency_ms, self.table.dense_ms / latency_ms)


def small_cnn() -> nn.Module:
    """A few convolutions and a classifier over 3x16x16 inputs, 10 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


def fake_problem(
    target: Target | None = None, sizes: tuple[int, ...] = (4, 8, 16), precision: RunPrecision = "float32"
) -> Problem:
    """A whole problem with no training and no timing: episodes take microseconds and never vary."""
    inventory = take_inventory(small_cnn(), torch.zeros(1, 3, 16, 16))
    patterns = tuple(Choice("group", {"size": size}) for size in sizes)
    table = fake_table(inventory, patterns, precisions=choices_of_layers(precision))
    evaluate = FakeEvaluate(inventory, table)
    names = inventory.names

    def lost(anchors: tuple[float, ...], precision: OfLayer) -> Sensitivity:
        loss = {name: tuple(evaluate.layer_drop(name, anchor, precision) for anchor in anchors) for name in names}
        return Sensitivity(anchors, loss, dict.fromkeys(names, anchors))

    sensitivity = lost(ANCHORS[1:], "float32")
    if precision == "planned":
        sensitivity = replace(sensitivity, int8=lost(ANCHORS, "int8"))
    return Problem(
        inventory=inventory,
        table=table,
        sensitivity=sensitivity,
        dense_score=evaluate.dense_score,
        evaluate=evaluate,
        target=target or Target(speedup=3.0, over="eager"),
        pattern=patterns[len(patterns) // 2],
        criterion=Choice("magnitude"),
        training=Choice("one_shot"),
        precision=precision,
    )
