"""Batch-norm recalibration: running statistics are measured again on the masked model (EagleEye, Li et al. 2020)."""

from __future__ import annotations

from torch import nn

from autoprune.evaluation.recovery.base import Recovery, Subject
from autoprune.masks import apply_masks_
from autoprune.plan import Plan
from autoprune.training.batch_norm import recalibrate_batch_norm_


class BatchNorm(Recovery):
    """Masks, then one pass over the calibration batches; a model without batch norm is only masked."""

    def recover_(self, model: nn.Module, plan: Plan, subject: Subject) -> None:
        apply_masks_(model, subject.masks(plan), subject.inventory)
        recalibrate_batch_norm_(model, subject.task.calibration)
