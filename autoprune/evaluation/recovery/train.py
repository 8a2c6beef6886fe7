"""Short real training: the plan's own method and settings, for a few steps."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from autoprune.errors import ConfigError
from autoprune.evaluation.recovery.base import Recovery, Subject
from autoprune.plan import Plan
from autoprune.training import TRAINING
from autoprune.training.loop import recalibrate_batch_norm_, train_
from autoprune.training.widening import make_pruner_


class Train(Recovery):
    """Trains for `steps` optimiser steps with the plan's method, learning rate and distillation."""

    trains: ClassVar[bool] = True

    def __init__(self, steps: int = 20) -> None:
        if not 1 <= steps <= 100_000:
            raise ConfigError(f"recovery 'train': steps must be from 1 to 100000, not {steps}.")
        self.steps = steps

    def recover_(self, model: nn.Module, plan: Plan, subject: Subject) -> None:
        task = subject.task
        settings = subject.settings.changed({**plan.settings, "max_steps": self.steps})
        method = TRAINING.create(plan.training)
        inputs = task.example_inputs(subject.inventory.layers[0].input_shape[0])
        pruner = make_pruner_(method, model, subject.inventory, plan, inputs, task.calibration, task.loss)
        train_(
            model,
            task.train,
            task.loss,
            settings,
            seed=subject.seed,
            method=method,
            pruner=pruner,
            teachers=(subject.dense,),
        )
        recalibrate_batch_norm_(model, task.calibration)
