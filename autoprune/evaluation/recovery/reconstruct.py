"""Least-squares reconstruction: what is left of a layer makes up for what was cut (He et al. 2017; OBS's update)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autoprune.criteria.obs import damped
from autoprune.errors import AutopruneError, ConfigError
from autoprune.evaluation.recovery.base import Recovery, Subject
from autoprune.masks import Batches, apply_masks_, weight_of
from autoprune.model.arguments import call_with
from autoprune.model.columns import input_columns, joined, output_rows
from autoprune.model.inventory import eval_mode, watch_forward
from autoprune.model.recurrent.names import layer_at
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
        name: of the layer, a Conv2d or Linear.
        mask: its mask, True keeps; what it cuts stays zero.
        batches: to run both on.
        damping: > 0; of the distance from the masked dense weights, over the mean square of the layer's input.
    """
    weight = weight_of(model, name)
    moments, cross = _sums(model, dense, name, batches)
    shape = cross.shape  # (conv_groups, out / conv_groups, columns)
    rows = (weight.detach() * mask).double().reshape(shape)
    missed = cross - rows @ moments
    systems = damped(moments, damping)
    for group, (kept, own) in enumerate(zip(mask.reshape(shape), rows, strict=True)):
        supports, which = kept.unique(dim=0, return_inverse=True)  # filters of a group share theirs: one system
        for index, support in enumerate(supports):
            at, filters = support.nonzero().flatten(), (which == index).nonzero().flatten()
            change = torch.linalg.solve(systems[group][at][:, at], missed[group][filters][:, at].T).T
            own[filters[:, None], at] += change
    with torch.no_grad():
        weight.copy_(rows.reshape(weight.shape))


def _sums(model: nn.Module, dense: nn.Module, name: str, batches: Batches) -> tuple[Tensor, Tensor]:
    """Over all samples and positions: sums of ``c c^T`` and of ``y c^T``.

    c are the columns that the masked model's layer reads, ``(conv_groups, columns, columns)``, and y the dense model's
    output, bias left out, ``(conv_groups, out / conv_groups, columns)``; both float64.
    """
    module = layer_at(model, name)
    moments = cross = torch.zeros(())
    for inputs, _ in batches:
        read = [x for x, _ in _calls(model, name, inputs)]
        wanted = [y for _, y in _calls(dense, name, inputs)]
        for x, y in zip(read, wanted, strict=True):
            rows, done = output_rows(module, y), 0
            if isinstance(module.bias, Tensor):
                rows = rows - module.bias.detach().reshape(rows.shape[1], -1, 1)
            for part in input_columns(module, x):
                columns, targets = joined(part), joined(rows[done : done + len(part)])
                moments = moments + (columns @ columns.transpose(1, 2)).double()
                cross = cross + (targets @ columns.transpose(1, 2)).double()
                done += len(part)
    if not moments.ndim:
        raise AutopruneError(f"calibration never reached {name}: give batches that run the whole model.")
    return moments, cross


def _calls(model: nn.Module, name: str, inputs: Any) -> list[tuple[Tensor, Tensor]]:
    """The input and the output of each call of a layer when the model runs in eval mode."""
    calls: list[tuple[Tensor, Tensor]] = []

    def seen(_: str, args: tuple[Any, ...], output: Tensor) -> None:
        calls.append((args[0].clone(), output.clone()))  # what follows may work in place

    with eval_mode(model), watch_forward(model, [name], seen), torch.no_grad():
        call_with(model, inputs)
    return calls
