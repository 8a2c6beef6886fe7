"""No recovery: the masked model as it is."""

from __future__ import annotations

from torch import nn

from autoprune.evaluation.recovery.base import Recovery, Subject
from autoprune.masks import apply_masks_
from autoprune.plan import Plan


class NoRecovery(Recovery):
    """Only masks."""

    def recover_(self, model: nn.Module, plan: Plan, subject: Subject) -> None:
        apply_masks_(model, subject.masks(plan), subject.inventory)
