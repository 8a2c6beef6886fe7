"""What `python -m benchmarks dynamic` trains: static plans, gates and both, from one dense start, equally long."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn

from autoprune.files import cache_folder, read_tensors, write_tensors
from autoprune.model.channel_gates import Gating, gate_channels_, gates, with_gate_penalty
from autoprune.model.inventory import take_inventory
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.report.console import Console
from autoprune.settings import TrainingSettings
from autoprune.tasks import TASKS, Task
from autoprune.training import TRAINING, Pruner
from autoprune.training.loop import train_

KEPT = cache_folder() / "benchmarks" / "dynamic"
TASK = Choice("fashion_mnist", {"widths": [16, 32, 64], "augment": False, "batch_size": 64})
SETTINGS = TrainingSettings(epochs=3, learning_rate=0.1, weight_decay=5e-4, warmup=0.15)  # of each half of a run
STEPS = 860  # a step is a batch of 64
PENALTY = 1e-3
PATTERN = Choice("group", {"size": 8})
# What is gated: the first convolution of each block, so that both have less to do; of the later blocks alone; all.
PLACES = {
    "inner": ("1.conv1", "2.conv1", "3.conv1"),
    "late": ("2.conv1", "3.conv1"),
    "both": ("1.conv1", "1.conv2", "2.conv1", "2.conv2", "3.conv1", "3.conv2"),
}


@dataclass(frozen=True)
class Variant:
    """A row: how the dense start goes on.

    Attributes:
        sparsity: of the static plan; 0: none.
        place: of PLACES; none is gated when empty.
        keep: share of the gates' groups that live.
        size: channels in a group of a gate; 0: all of them, so that a whole block lives or dies.
        adaptive: whether that share is over all inputs.
        allocation: of the static plan.
    """

    sparsity: float = 0.0
    place: str = ""
    keep: float = 1.0
    size: int = 4
    adaptive: bool = True
    allocation: str = "planned"

    def __str__(self) -> str:
        shared = f", {self.allocation}" if self.allocation != "planned" else ""
        static = f"static {100 * self.sparsity:g}%{shared}" if self.sparsity else ""
        how = "over all inputs" if self.adaptive else "of each input"
        groups = "whole" if self.size == 0 else f"groups of {self.size}"
        dynamic = f"{self.place} gates, {groups}, {100 * self.keep:g}% {how}" if self.place else ""
        return " + ".join(part for part in (static, dynamic) if part) or "dense"

    @property
    def key(self) -> str:
        data = json.dumps([TASK.args, SETTINGS.to_json(), PENALTY, PLACES.get(self.place), vars(self)], sort_keys=True)
        name = f"s{100 * self.sparsity:g}-{self.place}{100 * self.keep:g}"
        return f"{name}-{hashlib.sha256(data.encode()).hexdigest()[:8]}"


@dataclass(frozen=True, eq=False)
class Run:
    """A trained variant.

    Attributes:
        model: in eval mode.
        validation, test: accuracy, in [0, 1].
    """

    variant: Variant
    model: nn.Module
    validation: float
    test: float


@cache
def task() -> Task:
    return TASKS.create(TASK)


def build(variant: Variant) -> nn.Module:
    """The variant's architecture, with initial weights."""
    return gated(copy.deepcopy(task().model), variant)


def gated(model: nn.Module, variant: Variant) -> nn.Module:
    """Puts the variant's gates on `model`, in place."""
    for name in PLACES.get(variant.place, ()):
        size = variant.size or int(model.get_submodule(name).out_channels)  # type: ignore[arg-type]
        gating = Gating(size, variant.keep, variant.adaptive, ramp=STEPS)
        gate_channels_(model, task().example_inputs(1), [name], gating)
    return model


def train_all(variants: Sequence[Variant], workers: int) -> None:
    """Trains what is missing, each on one core; a run that was stopped goes on from its last epoch."""
    console, missing = Console(), [each for each in variants if not _path(each).exists()]
    if not missing:
        return
    _start()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(train, each) for each in missing]):
            console.say(done.result())


def read(variant: Variant) -> Run:
    """A variant that was trained."""
    model = build(variant)
    tensors, about = read_tensors(_path(variant), "the trained variant")
    model.load_state_dict(tensors)
    return Run(variant, model.eval(), float(about["validation"]), float(about["test"]))


def train(variant: Variant) -> str:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # of the gates
    model, x = gated(_start(), variant), task().example_inputs(1)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # trains 1.4 times faster
    loss = with_gate_penalty(model, task().loss, PENALTY) if gates(model) else task().loss
    method = pruner = None
    if variant.sparsity:
        every = take_inventory(model, x)
        inventory = take_inventory(model, x, keep_dense=(every.names[0], every.names[-1]))
        plan = Plan(dict.fromkeys(inventory.names, LayerPlan(variant.sparsity, PATTERN)))
        method = TRAINING.create(Choice("gradual", {"allocation": variant.allocation}))
        pruner = Pruner(model, inventory, plan, task().calibration, task().loss)
    train_(
        model, task().train, loss, SETTINGS, seed=1, method=method, pruner=pruner,
        checkpoint=_path(variant).with_suffix(".training"),
    )  # fmt: skip
    model = model.to(memory_format=torch.contiguous_format).eval()
    scores = {"validation": task().evaluate(model), "test": task().test(model)}
    write_tensors(_path(variant), model.state_dict(), scores)
    return f"{variant}: {100 * scores['validation']:.2f}% of the validation split"


def _start() -> nn.Module:
    """The dense model that every variant starts from."""
    model, path = copy.deepcopy(task().model), KEPT / f"start-{Variant().key}.safetensors"
    if not path.exists():
        torch.set_num_threads(1)
        train_(model, task().train, task().loss, SETTINGS, seed=0, checkpoint=path.with_suffix(".training"))
        write_tensors(path, model.state_dict())
    model.load_state_dict(read_tensors(path, "the dense start")[0])
    return model


def is_trained(variant: Variant) -> bool:
    return _path(variant).exists()


def _path(variant: Variant) -> Path:
    return KEPT / f"{variant.key}.safetensors"
