"""Short real training: the plan's own method and settings, for a few steps."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import nn

from autoprune.checks import check_counts
from autoprune.evaluation.recovery.base import Recovery, Subject
from autoprune.evaluation.recovery.finetune import finetune_
from autoprune.plan import Plan
from autoprune.training.batch_norm import recalibrate_batch_norm_


class Train(Recovery):
    """Trains for `steps` optimiser steps with the plan's method, learning rate and distillation."""

    trains: ClassVar[bool] = True

    def __init__(self, steps: int = 20) -> None:
        check_counts("recovery 'train'", {"steps": steps}, most=100_000)
        self.steps = steps

    def recover_(self, model: nn.Module, plan: Plan, subject: Subject) -> None:
        settings = replace(subject.settings, max_steps=self.steps)
        finetune_(model, plan, subject, settings)
        recalibrate_batch_norm_(model, subject.task.calibration)
