"""Least-squares reconstruction: what is left of a layer makes up for what was cut (He et al. 2017; OBS's update).

With a constant beside the weights it is the affine compensation of structured cuts (CORP, 2026).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoprune.checks import check_flags, check_numbers
from autoprune.criteria.least_squares import LeastSquares
from autoprune.evaluation.recovery.base import Recovery, Subject
from autoprune.evaluation.recovery.sums import layer_sums
from autoprune.masks import Batches, apply_masks_, filter_rows, live_filters
from autoprune.model.weights import as_held, as_read, weight_of
from autoprune.plan import LayerSpec, Plan
from autoprune.training.batch_norm import recalibrate_batch_norm_


class Reconstruct(Recovery):
    """Masks, then refits each layer's kept weights to the dense layer's output, in the order the layers run.

    A layer is fitted on what it reads after those before it were cut and refitted. Batch norm is recalibrated in the
    end. Biases stay as they are unless `affine` is set.

    Args:
        damping: holds the kept weights where they were, over the mean square of the layer's input; > 0.
        affine: fit biases too, and the layers that are not cut but run after one that is. A layer then makes up for
            channels that it reads no more as far as they are a linear function of the others and a constant.
    """

    def __init__(self, damping: float = 0.01, affine: bool = False) -> None:
        check_numbers("recovery 'reconstruct'", {"damping": damping}, 0.0, ends="(]")
        check_flags("recovery 'reconstruct'", {"affine": affine})
        self.damping, self.affine = damping, affine

    def recover_(self, model: nn.Module, plan: Plan, subject: Subject) -> None:
        masks = subject.masks(plan)
        apply_masks_(model, masks, subject.inventory)
        behind_a_cut = False
        for layer in subject.inventory.layers:
            behind_a_cut |= layer.name in masks
            if layer.name in masks or (self.affine and behind_a_cut):
                self._refit_(model, layer, masks.get(layer.name), subject)
        recalibrate_batch_norm_(model, subject.task.calibration)

    def _refit_(self, model: nn.Module, layer: LayerSpec, mask: Tensor | None, subject: Subject) -> None:
        if mask is None:
            mask = torch.ones_like(weight_of(model, layer.name), dtype=torch.bool)
        # a norm behind the layer subtracts the mean, whatever it is
        constant = self.affine and bool(layer.biases or layer.norm)
        added = reconstruct_(
            model, subject.dense, layer.name, mask, subject.task.calibration, self.damping, constant=constant
        )
        if constant and layer.biases:
            with torch.no_grad():  # a filter cut as a whole stays silent
                filter_rows(model, layer)[layer.biases[0]].add_(added * live_filters(layer, mask))


def reconstruct_(
    model: nn.Module,
    dense: nn.Module,
    name: str,
    mask: Tensor,
    batches: Batches,
    damping: float = 0.01,
    *,
    constant: bool = False,
) -> Tensor:
    """Sets the kept weights of one layer to those whose output is nearest the dense layer's, in the mean square.

    Args:
        model: masked; its other layers feed this one.
        dense: the model to follow.
        name: of the layer.
        mask: its mask, True keeps; what it cuts stays zero.
        batches: to run both on.
        damping: > 0; of the distance from the masked dense weights, over the mean square of the layer's input.
        constant: whether a constant is fitted with the weights, the best one for each filter.

    Returns:
        What is to be added to each filter's output, beside the dense layer's bias, ``(out,)``; zeros unless `constant`.
    """
    weight, sums = weight_of(model, name), layer_sums(model, dense, name, batches)
    seen = sums.centred if constant else sums
    read = as_read(weight.detach(), sums.turned)
    fit = LeastSquares(read.double().reshape(seen.cross.shape), seen.moments, seen.cross, damping)
    rows = fit.fitted(as_read(mask, sums.turned).reshape(sums.cross.shape))
    with torch.no_grad():
        weight.copy_(as_held(rows.reshape(read.shape), sums.turned))
    added = sums.outputs - rows @ sums.inputs if constant else torch.zeros_like(sums.outputs)
    return added.flatten().to(weight.dtype)
