"""Least-squares reconstruction: what is left of a layer makes up for what was cut (He et al. 2017; OBS's update)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.criteria.obs import damped
from autoprune.errors import AutopruneError, ConfigError
from autoprune.evaluation.recovery.base import Recovery, Subject
from autoprune.masks import Batches, apply_masks_
from autoprune.model.arguments import call_with
from autoprune.model.columns import input_columns, joined, output_rows
from autoprune.model.inventory import eval_mode
from autoprune.model.uses import Use, watch_weights
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
    weight = weight_of(model, name)
    moments, cross, turned = _sums(model, dense, name, batches)
    shape = cross.shape  # (conv_groups, out / conv_groups, columns)
    rows = as_read(weight.detach() * mask, turned).double().reshape(shape)
    missed = cross - rows @ moments
    systems = damped(moments, damping)
    for group, (kept, own) in enumerate(zip(as_read(mask, turned).reshape(shape), rows, strict=True)):
        supports, which = kept.unique(dim=0, return_inverse=True)  # filters of a group share theirs: one system
        for index, support in enumerate(supports):
            at, filters = support.nonzero().flatten(), (which == index).nonzero().flatten()
            change = torch.linalg.solve(systems[group][at][:, at], missed[group][filters][:, at].T).T
            own[filters[:, None], at] += change
    with torch.no_grad():
        weight.copy_(as_held(rows.reshape(as_read(weight, turned).shape), turned))


def _sums(model: nn.Module, dense: nn.Module, name: str, batches: Batches) -> tuple[Tensor, Tensor, bool]:
    """Over all samples and positions: sums of ``c c^T`` and of ``y c^T``; and whether the parameter lies turned.

    c are the columns that the masked model's layer reads, ``(conv_groups, columns, columns)``, and y the dense model's
    output, bias left out, ``(conv_groups, out / conv_groups, columns)``; both float64.
    """
    moments = cross = torch.zeros(())
    turned = False
    for inputs, _ in batches:
        for use, wanted in zip(_uses(model, name, inputs), _uses(dense, name, inputs), strict=True):
            rows, done, turned = output_rows(use, wanted.output), 0, use.turned
            if wanted.bias is not None:
                rows = rows - wanted.bias.detach().reshape(use.conv_groups, -1, 1)
            for part in input_columns(use, use.x):
                columns, targets = joined(part), joined(rows[done : done + len(part)])
                moments = moments + (columns @ columns.transpose(1, 2)).double()
                cross = cross + (targets @ columns.transpose(1, 2)).double()
                done += len(part)
    if not moments.ndim:
        raise AutopruneError(f"calibration never reached {name}: give batches that run the whole model.")
    return moments, cross, turned


def _uses(model: nn.Module, name: str, inputs: Any) -> list[Use]:
    """Every use of a layer's weight when the model runs in eval mode."""
    uses: list[Use] = []

    def seen(_: str, use: Use) -> None:
        uses.append(replace(use, x=use.x.clone(), output=use.output.clone()))  # what follows may work in place

    with eval_mode(model), watch_weights(model, [name], seen), torch.no_grad():
        call_with(model, inputs)
    return uses
