"""Laws of every training method: the plan is reached, zeros stay, and a killed training resumes bit for bit."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from autoprune.allocation import WeightCost
from autoprune.errors import ConfigError
from autoprune.masks import Masks, filter_rows, sparsity
from autoprune.model.weights import weight_of
from autoprune.patterns import PATTERNS
from autoprune.quantization import grids_in
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.testing.cases import (
    LOSS,
    PATTERN_CHOICES,
    conv_net_pruner,
    copied,
    fake_quantize_,
    random_batches,
    same_tensors,
)
from autoprune.testing.law import require
from autoprune.training import Pruner, SparseTraining, train_
from autoprune.training.loop import Quantize

CRITERIA_TO_DRAW = ("magnitude", "gradient", "activation", "random")


def check_method(make: Callable[[], SparseTraining], *, examples: int = 12, seed: int = 0) -> None:
    """Checks a training method on random plans of a small convolutional network.

    Args:
        make: returns a new method; a method has state, and every training needs one of its own.
        examples: how many plans; from 6 on every pattern is among them.
        seed: of the plans.

    Raises:
        BrokenLaw: the method breaks a law; the message says which.
    """
    draws = random.Random(seed)
    for index in range(examples):
        pattern, criterion = PATTERN_CHOICES[index % len(PATTERN_CHOICES)], draws.choice(CRITERIA_TO_DRAW)
        sparsities = [draws.choice((0.0, draws.uniform(0.0, 0.97))) for _ in range(3)]
        check_training(make(), conv_net_pruner(pattern, sparsities, criterion), draws.randint(1, 9))
    check_repeatable(make)
    check_resumes(make)


def check_training(method: SparseTraining, pruner: Pruner, steps: int) -> None:
    """Trains by a new method to a plan of `conv_net` and checks what it leaves.

    Args:
        method: what is checked; used up.
        pruner: of a plan in which all layers have one pattern.
        steps: optimizer steps, from 1 to 12.

    Raises:
        BrokenLaw: the method breaks a law.
    """
    settings = TrainingSettings(epochs=3, learning_rate=0.05, max_steps=steps)
    patterns = {layer.pattern for layer in pruner.layers.values()}
    case = f"with {', '.join(map(str, patterns))} at {[layer.sparsity for layer in pruner.layers.values()]}"
    refusable = method.finds_shares and not all(PATTERNS.create(pattern).any_sparsity for pattern in patterns)
    try:
        result = train_(pruner.model, random_batches(), LOSS, settings, seed=0, method=method, pruner=pruner)
    except ConfigError:
        if refusable:
            return
        raise
    require(not refusable, method, f"refuses, as it finds layers' shares, a pattern of one sparsity alone, {case}")
    require(result.steps == steps, method, f"trains for {steps} steps, {case}")
    masks = result.masks or {}
    require(set(masks) <= set(pruner.layers), method, f"cuts no layer that is planned dense, {case}")
    for name, mask in masks.items():
        spec, weight = pruner.inventory[name], weight_of(pruner.model, name)
        rule = PATTERNS.create(pruner.layers[name].pattern)
        require(rule.check(mask, spec.conv_groups), method, f"has masks of the layers' patterns, {case}")
        require(not bool(weight[~mask].any()), method, f"leaves at zero what its masks cut, {case}")
        require(bool(weight[mask].all()), method, f"leaves nothing at zero but what its masks cut, {case}")
        cut = ~mask.flatten(1).any(dim=1)
        silent = not any(bool(row[cut].any()) for row in filter_rows(pruner.model, spec).values())
        require(silent, method, f"leaves no constant behind of a filter cut as a whole, {case}")
    if method.finds_shares:
        require(_is_within_budget(pruner, masks), method, f"spends the plan's budget, {case}")
        return
    for name, plan in pruner.layers.items():
        spec = pruner.inventory[name]
        wanted = PATTERNS.create(plan.pattern).feasible(spec.weight_shape, plan.sparsity, spec.conv_groups)
        reached = sparsity(masks[name]) if name in masks else 0.0
        require(abs(reached - wanted) <= 1e-9, method, f"brings layer {name} to {wanted}, not {reached}, {case}")


def check_repeatable(make: Callable[[], SparseTraining]) -> None:
    """Checks that two trainings end with the same weights, and that the kept weights moved.

    Raises:
        BrokenLaw: they do not.
    """
    ends = []
    for _ in range(2):
        pruner = conv_net_pruner(Choice("group", {"size": 4}), [0.5, 0.5, 0.8])
        start, settings = copied(pruner.model.state_dict()), TrainingSettings(epochs=2)
        train_(pruner.model, random_batches(), LOSS, settings, seed=3, method=make(), pruner=pruner)
        ends.append(pruner.model.state_dict())
    require(same_tensors(*ends), make(), "gives the same weights for the same seed")
    kept = ends[0]["0.weight"] != 0
    moved = bool((ends[0]["0.weight"][kept] != start["0.weight"][kept]).any())
    require(moved, make(), "lets the kept weights train")


def check_resumes(make: Callable[[], SparseTraining]) -> None:
    """Checks that a training killed after three of four epochs ends as if it had never stopped (`state`, `load_state`).

    Once more with a model that is fake-quantised after two epochs.

    Raises:
        BrokenLaw: it ends otherwise.
    """
    for quantize_, of in ((None, ""), (fake_quantize_, " of a fake-quantised model")):
        whole = _trained(make(), None, quantize_)
        require(bool(grids_in(whole)) == bool(of), make(), f"leaves buffers as they are{of}")
        with tempfile.TemporaryDirectory() as folder:
            with suppress(_Killed):
                _trained(make(), Path(folder), quantize_, kill_after=3)
            resumed = _trained(make(), Path(folder), quantize_)
        law = f"resumes a killed training{of} bit for bit (`state`, `load_state`)"
        require(same_tensors(whole, resumed), make(), law)


class _Killed(Exception):
    """Stands for a killed process."""


def _trained(
    method: SparseTraining, folder: Path | None, quantize_: Quantize | None = None, kill_after: int | None = None
) -> Mapping[str, Tensor]:
    """The state of a model trained for four epochs, with a checkpoint in `folder` after each."""

    def on_epoch(epoch: int, _: dict[str, float]) -> None:
        if epoch == kill_after:
            raise _Killed

    pruner = conv_net_pruner(Choice("filter"), [0.5, 0.5, 0.5])
    result = train_(
        pruner.model,
        random_batches(),
        LOSS,
        TrainingSettings(epochs=4),
        seed=0,
        method=method,
        pruner=pruner,
        quantize_=quantize_,
        checkpoint=folder,
        on_epoch=on_epoch,
    )
    cut = any(bool(weight_of(pruner.model, name)[~mask].any()) for name, mask in (result.masks or {}).items())
    require(not cut, method, "leaves at zero what its masks cut")
    return pruner.model.state_dict()


def _is_within_budget(pruner: Pruner, masks: Masks) -> bool:
    """Whether as many weights are left as the plan says, less no more than a cell a layer."""
    cost = WeightCost(pruner.inventory)
    budget = cost({name: plan.sparsity for name, plan in pruner.layers.items()})
    largest = {name: int(torch.bincount(pruner.cells(name).flatten())[0]) for name in pruner.layers}
    one_kept = sum(largest.values())  # a layer is never cut through, whatever the budget
    least = cost(dict.fromkeys(largest, 1.0)) + one_kept
    left = cost({name: sparsity(mask) for name, mask in masks.items()})
    return budget - one_kept - max(largest.values(), default=0) <= left <= max(budget, least) + len(largest) * 0.5
