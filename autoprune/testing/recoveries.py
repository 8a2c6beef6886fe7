"""Laws of every recovery: the plan holds, what is cut stays cut, and nothing but the copy given is changed."""

from __future__ import annotations

import copy

import torch

from autoprune.evaluation.recovery.base import Recovery, Subject
from autoprune.masks import collect_statistics, sparsity
from autoprune.model.weights import weight_of
from autoprune.patterns import PATTERNS
from autoprune.plan import LayerPlan, Plan
from autoprune.settings import TrainingSettings
from autoprune.tasks.base import Task
from autoprune.testing.cases import (
    LOSS,
    PATTERN_CHOICES,
    conv_net,
    copied,
    inventory_of_conv_net,
    random_batches,
    same_tensors,
)
from autoprune.testing.law import require


def check_recovery(recovery: Recovery) -> None:
    """Checks a recovery on a small network with batch norm, half of whose weights are cut, by every pattern.

    Raises:
        BrokenLaw: the recovery breaks a law; the message says which.
    """
    subject = subject_to_recover()
    dense, names = copied(subject.dense.state_dict()), subject.inventory.names
    for pattern in PATTERN_CHOICES:
        plan, rule = Plan(dict.fromkeys(names[:2], LayerPlan(0.5, pattern))), PATTERNS.create(pattern)
        models = [copy.deepcopy(subject.dense).train() for _ in range(2)]
        for model in models:
            recovery.recover_(model, plan, subject)
        require(all(model.training for model in models), recovery, f"leaves the model's mode as it was, with {pattern}")
        require(
            same_tensors(*(model.state_dict() for model in models)),
            recovery,
            f"gives the same weights every time, with {pattern}",
        )
        for name in plan.layers:
            spec, mask = subject.inventory[name], weight_of(models[0], name) != 0
            wanted = rule.feasible(spec.weight_shape, 0.5, spec.conv_groups)
            require(
                abs(sparsity(mask) - wanted) <= 1e-6,
                recovery,
                f"leaves layer {name} as sparse as planned, by {pattern}",
            )
            require(rule.check(mask, spec.conv_groups), recovery, f"leaves masks of the plan's pattern {pattern}")
        uncut = weight_of(models[0], names[2])
        require(bool(uncut.all()), recovery, f"cuts no layer that the plan leaves out, with {pattern}")
        require(
            same_tensors(dense, subject.dense.state_dict()), recovery, f"leaves the dense model alone, with {pattern}"
        )


def subject_to_recover() -> Subject:
    """`conv_net` as a dense model, with random data, and fine-tuning settings for a few steps."""
    dense, batches = conv_net().eval(), random_batches()
    inventory = inventory_of_conv_net(dense)
    task = Task("random", dense, batches, tuple(batches), batches, batches, LOSS, None)
    with torch.random.fork_rng(devices=[]):
        statistics = collect_statistics(dense, inventory.names, batches, LOSS, frozenset())
    return Subject(task, dense, inventory, statistics, TrainingSettings(epochs=1, learning_rate=0.01), seed=0)
