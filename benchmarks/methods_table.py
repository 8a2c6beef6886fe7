"""What `python -m benchmarks methods` compares: the tasks, the settings, and one recipe a row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.tasks import spoken_digits


@dataclass(frozen=True)
class Setting:
    """How sparse, and in which pattern; the plan gives every layer this sparsity, and so the budget.

    Attributes:
        sparsity: share of zeros; of multiply-accumulates removed, dead filters included, where `macs`.
    """

    pattern: Choice
    sparsity: float
    macs: bool = False


GROUP = Choice("group", {"size": 8})
NORMALISED: Mapping[str, Any] = {"name": "global", "normalise": True}
SETTINGS: Mapping[str, Setting] = {
    "group-75": Setting(GROUP, 0.75),
    "group-90": Setting(GROUP, 0.90),
    "group-97": Setting(GROUP, 0.97),
    "unstructured-90": Setting(Choice("unstructured"), 0.90),
    "unstructured-97": Setting(Choice("unstructured"), 0.97),
    "group-95": Setting(GROUP, 0.95),
    "group-98": Setting(GROUP, 0.98),
    "channel-70": Setting(Choice("channel"), 0.70, macs=True),
    "channel-75": Setting(Choice("channel"), 0.75, macs=True),
    "channel-85": Setting(Choice("channel"), 0.85, macs=True),
    "channel-90": Setting(Choice("channel"), 0.90, macs=True),
    "2:4": Setting(Choice("n:m", {"n": 2, "m": 4}), 0.5),
}


@dataclass(frozen=True)
class Shown:
    """A task of the comparison.

    Attributes:
        name: of the table.
        task: the registry row and its arguments; the seed is added.
        epochs: of every run in all.
        start_epochs: of them, trained densely by the methods that start from a trained model.
        dense: settings of the dense training; methods change what their recipe says.
        settings: shown when none are named.
        seeds: likewise.
    """

    name: str
    task: Choice
    epochs: int
    start_epochs: int
    dense: TrainingSettings
    settings: tuple[str, ...]
    seeds: int

    @property
    def key(self) -> str:
        """Of files: what is trained otherwise has another."""
        digest = hashlib.sha256(f"{self.task} {sorted(self.dense.to_json().items())}".encode()).hexdigest()
        return f"{self.name}-{digest[:8]}"

    def choice(self, seed: int) -> Choice:
        return Choice(self.task.name, {**self.task.args, "seed": seed})


FASHION_MNIST = Shown(
    "fashion_mnist",
    # in 6 epochs, neither shifted images nor larger batches help, by the validation split
    Choice("fashion_mnist", {"widths": [16, 32, 64], "augment": False, "batch_size": 64}),
    epochs=6,
    start_epochs=3,
    dense=TrainingSettings(epochs=6, learning_rate=0.1, weight_decay=5e-4, warmup=0.15),
    settings=("group-90", "group-97", "unstructured-97"),
    seeds=3,
)
# four times the weights: what a network that has some to spare loses
FASHION_MNIST_WIDE = replace(
    FASHION_MNIST,
    name="fashion_mnist_wide",
    task=Choice("fashion_mnist", {**FASHION_MNIST.task.args, "widths": [32, 64, 128]}),
    settings=("group-90", "unstructured-90"),
    seeds=1,
)
SPOKEN_DIGITS = Shown(
    "spoken_digits",
    Choice("spoken_digits", {"hidden": 128}),
    epochs=30,
    start_epochs=15,
    dense=spoken_digits.DENSE_TRAINING.changed({"epochs": 30}),
    settings=("group-75", "group-90"),
    seeds=3,
)
TASKS_SHOWN: Mapping[str, Shown] = {
    "fashion_mnist": FASHION_MNIST,
    "fashion_mnist_wide": FASHION_MNIST_WIDE,
    "digits": Shown(
        "digits",
        Choice("digits", {"widths": [16, 32, 64]}),
        epochs=16,
        start_epochs=8,
        dense=TrainingSettings(epochs=16, learning_rate=0.1, weight_decay=5e-4, warmup=0.1),
        settings=("group-90",),
        seeds=1,
    ),
}


@dataclass(frozen=True)
class Recipe:
    """A row: a method and how it is used.

    Attributes:
        what: in words.
        method: the training method and its arguments; None for dense training.
        from_trained: starts from a model trained densely for `Shown.start_epochs`; else from initial weights.
        settings: training settings that differ from the dense ones.
        criterion: the plan's.
        only: the settings it makes sense for; all when empty.
    """

    what: str
    method: Choice | None
    from_trained: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    criterion: Choice = Choice("magnitude")  # noqa: RUF009 - frozen
    only: tuple[str, ...] = ()

    def dense_epochs(self, shown: Shown) -> int:
        if self.method is None:
            return shown.epochs
        return shown.start_epochs if self.from_trained else 0

    def fits(self, setting: str) -> bool:
        return setting in self.only if self.only else setting != "2:4"


RECIPES: Mapping[str, Recipe] = {
    "dense": Recipe("dense training", None),
    "one_shot": Recipe("three-stage, one cut", Choice("one_shot"), from_trained=True),
    "gradual": Recipe("three-stage, gradual, every layer alike", Choice("gradual"), from_trained=True),
    "gradual_global": Recipe(
        "three-stage, gradual, one ranking", Choice("gradual", {"allocation": NORMALISED}), from_trained=True
    ),
    "gradual_erk": Recipe("three-stage, gradual, ERK", Choice("gradual", {"allocation": "erk"}), from_trained=True),
    "gradual_lamp": Recipe("three-stage, gradual, LAMP", Choice("gradual", {"allocation": "lamp"}), from_trained=True),
    "adaptive": Recipe("layer-sparse adaptive", Choice("adaptive"), from_trained=True),
    "adaptive_mean": Recipe(
        "- over the layers' means, in place of LAMP", Choice("adaptive", {"allocation": NORMALISED}), from_trained=True
    ),
    "adaptive_ahead": Recipe("- with look-ahead", Choice("adaptive", {"look_ahead": 10.0}), from_trained=True),
    "adaptive_feather": Recipe(
        "- thresholding as Feather's", Choice("adaptive", {"power": 3.0, "through": 0.5}), from_trained=True
    ),
    "feather": Recipe("- the same, from initial weights", Choice("adaptive", {"power": 3.0, "through": 0.5})),
    "gradual_scratch": Recipe("gradual from initial weights, every layer alike", Choice("gradual")),
    "gradual_scratch_erk": Recipe("gradual from initial weights, ERK", Choice("gradual", {"allocation": "erk"})),
    "gradual_scratch_lamp": Recipe("gradual from initial weights, LAMP", Choice("gradual", {"allocation": "lamp"})),
    "thresholds": Recipe("trainable thresholds", Choice("thresholds")),
    "proximal_half": Recipe("L1/2", Choice("proximal", {"allocation": "lamp"}), from_trained=True),
    "proximal_l1": Recipe("- L1", Choice("proximal", {"penalty": "l1", "allocation": "lamp"}), from_trained=True),
    "proximal_none": Recipe(
        "- no penalty", Choice("proximal", {"penalty": "none", "allocation": "lamp"}), from_trained=True
    ),
    "proximal_splice": Recipe(
        "- L1/2 with splicing", Choice("proximal", {"splice": True, "allocation": "lamp"}), from_trained=True
    ),
    "expand": Recipe("expand 1.5x, then prune", Choice("expand"), from_trained=True),
    "expand_scratch": Recipe("- widened before any training", Choice("expand")),
    "expand_not": Recipe("- without expanding", Choice("expand", {"factor": 1.0}), from_trained=True),
    "bayesian": Recipe("iterative, Bayesian", Choice("bayesian"), from_trained=True),
    "bayesian_memoryless": Recipe("- memory-less", Choice("bayesian", {"memory": False}), from_trained=True),
    "joint": Recipe("joint search and training", Choice("joint")),
    "joint_planned": Recipe(
        "- thresholds start from every layer alike, not LAMP", Choice("joint", {"allocation": "planned"})
    ),
    "joint_taught": Recipe(
        "- with a moving average as teacher",
        Choice("joint"),
        settings={"distillation_weight": 0.5, "ema_teacher": 0.99},
    ),
    "joint_free": Recipe("- without the threshold network", Choice("joint", {"generator": False})),
    "ac_dc": Recipe("AC/DC, every layer alike", Choice("ac_dc")),
    "ac_dc_lamp": Recipe("- LAMP", Choice("ac_dc", {"allocation": "lamp"})),
    "admm": Recipe("ADMM, every layer alike", Choice("admm"), from_trained=True),
    "admm_lamp": Recipe("- LAMP", Choice("admm", {"allocation": "lamp"}), from_trained=True),
    "rigl": Recipe("RigL, every layer alike", Choice("rigl")),
    "rigl_erk": Recipe("- ERK", Choice("rigl", {"allocation": "erk"})),
    "set_erk": Recipe("- ERK, random growth (SET)", Choice("rigl", {"allocation": "erk", "growth": "random"})),
    "granet_erk": Recipe("- ERK, from half the sparsity (GraNet)", Choice("rigl", {"allocation": "erk", "start": 0.5})),
    "sr_ste": Recipe("SR-STE", Choice("sr_ste")),
    "sr_ste_2_4": Recipe("SR-STE, 2:4", Choice("sr_ste"), only=("2:4",)),
}
