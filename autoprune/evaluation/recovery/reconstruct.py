"""Least-squares reconstruction: what is left of a layer makes up for what was cut (He et al. 2017; OBS's update)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoprune.criteria.least_squares import LeastSquares
from autoprune.errors import ConfigError
from autoprune.evaluation.recovery.base import Recovery, Subject
from autoprune.evaluation.recovery.sums import layer_sums
from autoprune.masks import Batches, apply_masks_
from autoprune.model.weights import as_held, as_read, weight_of
from autoprune.plan import Plan
from autoprune.training.loop import recalibrate_batch_norm_


class Reconstruct(Recovery):
    """Masks, then refits each layer's kept weights to the dense layer's output, in the order the layers run.

    A layer is fitted on what it reads after those before it were cut and refitted. Batch norm is recalibrated in the
    end. Biases stay as they are.

    Args:
        damping: holds the kept weights where they were, over the mean square of the layer's input; > 0.
    """

    def __init__(self, damping: float = 0.01) -> None:
        if not isinstance(damping, (int, float)) or isinstance(damping, bool) or not 0.0 < damping < float("inf"):
            raise ConfigError(f"recovery 'reconstruct': damping must be a number > 0, not {damping!r}.")
        self.damping = damping

    def recover_(self, model: nn.Module, plan: Plan, subject: Subject) -> None:
        masks = subject.masks(plan)
        apply_masks_(model, masks, subject.inventory)
        calibration = subject.task.calibration
        for name in (name for name in subject.inventory.names if name in masks):
            reconstruct_(model, subject.dense, name, masks[name], calibration, self.damping)
        recalibrate_batch_norm_(model, calibration)


def reconstruct_(
    model: nn.Module, dense: nn.Module, name: str, mask: Tensor, batches: Batches, damping: float = 0.01
) -> None:
    """Sets the kept weights of one layer to those whose output is nearest the dense layer's, in the mean square.

    Args:
        model: masked; its other layers feed this one.
        dense: the model to follow.
        name: of the layer.
        mask: its mask, True keeps; what it cuts stays zero.
        batches: to run both on.
        damping: > 0; of the distance from the masked dense weights, over the mean square of the layer's input.
    """
    weight, sums = weight_of(model, name), layer_sums(model, dense, name, batches)
    read = as_read(weight.detach(), sums.turned)
    fit = LeastSquares(read.double().reshape(sums.cross.shape), sums.moments, sums.cross, damping)
    rows = fit.fitted(as_read(mask, sums.turned).reshape(sums.cross.shape))
    with torch.no_grad():
        weight.copy_(as_held(rows.reshape(read.shape), sums.turned))
