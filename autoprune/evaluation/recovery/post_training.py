"""Post-training pruning: layer after layer is cut, refitted and corrected, without labels and without training.

After optimal brain compression (Frantar and Alistarh 2022) and SparseGPT (Frantar and Alistarh 2023), with the dense
model's outputs as the targets (He et al. 2017) and the biases corrected (Nagel et al. 2019).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from autoprune.checks import check_flags, check_numbers
from autoprune.criteria import CRITERIA, LayerStatistics
from autoprune.criteria.least_squares import LeastSquares
from autoprune.errors import ConfigError
from autoprune.evaluation.recovery.base import Recovery, Subject
from autoprune.evaluation.recovery.sums import LayerSums, layer_sums
from autoprune.masks import Batches, Masks, apply_masks_, collect_statistics, make_masks, sparsity
from autoprune.model.inventory import Inventory
from autoprune.model.recurrent.names import partner_of
from autoprune.model.weights import as_held, as_read, weight_of
from autoprune.patterns import PATTERNS
from autoprune.plan import LayerSpec, Plan
from autoprune.progress import SILENT, Progress
from autoprune.training.batch_norm import recalibrate_batch_norm_

Fit = Literal["dense", "own", "none"]
_OF_A_LOSS = frozenset({"gradient", "squared_gradient"})


@dataclass(frozen=True)
class LayerFit:
    """What became of one layer.

    Attributes:
        name: of the layer.
        sparsity: of its weight.
        error: mean square of what its output is off the dense model's, over that output's variance (over its mean
            square, where nothing makes up for the mean); on the calibration data, before batch norm.
        positions: of all calibration samples that the layer was fitted on. Where they are not several times
            `columns`, the fit may be to these samples alone: give more of them, or a higher damping.
        columns: weights of a filter.
    """

    name: str
    sparsity: float
    error: float
    positions: int
    columns: int


class PostTraining(Recovery):
    """Cuts layer after layer, in the order in which they run, by what the model that is pruned so far gives them.

    Each layer: its criterion scores it on its present input; what is kept is refitted; the bias takes up what the mean
    of the output is off; batch norms are recalibrated. Targets of calibration batches are not read.

    Args:
        reconstruct: what the kept weights are fitted to: ``dense``, the dense model's output; ``own``, what the layer's
            whole weight gives for the same input; ``none``, nothing: they stay as they are.
        correct_bias: whether biases make up for means. A layer without a bias of its own has none to correct.
        damping: of the fit: holds the kept weights where they were, over the mean square of the layer's input; > 0.
    """

    def __init__(self, reconstruct: Fit = "dense", correct_bias: bool = True, damping: float = 0.01) -> None:
        if reconstruct not in get_args(Fit):
            raise ConfigError(
                f"post-training pruning: reconstruct is one of {', '.join(get_args(Fit))}, not {reconstruct!r}."
            )
        check_flags("post-training pruning", {"correct_bias": correct_bias})
        check_numbers("post-training pruning", {"damping": damping}, 0.0, ends="(]")
        self.reconstruct, self.correct_bias, self.damping = reconstruct, correct_bias, damping

    def check_criteria(self, names: Iterable[str]) -> None:
        for name in names:
            if CRITERIA.get(name).needs & _OF_A_LOSS:
                without = [each for each in CRITERIA if not CRITERIA.get(each).needs & _OF_A_LOSS]
                raise ConfigError(
                    f"criterion {name!r} reads gradients of a loss, and post-training pruning has none. Take one of "
                    f"{', '.join(without)}."
                )

    def recover_(self, model: nn.Module, plan: Plan, subject: Subject) -> None:
        self.prune_(model, subject.dense, subject.inventory, plan, subject.task.calibration, subject.progress)

    def prune_(
        self,
        model: nn.Module,
        dense: nn.Module,
        inventory: Inventory,
        plan: Plan,
        batches: Batches,
        progress: Progress = SILENT,
    ) -> tuple[list[LayerFit], Masks]:
        """Prunes `model`, a copy of `dense`, in place.

        Args:
            model: the copy.
            dense: what it is to follow.
            inventory: the layers that can be pruned.
            plan: their sparsities, patterns and criteria.
            batches: of calibration, iterated several times a layer.
            progress: where the layers are shown.

        Returns:
            What became of each layer that was cut, and the masks.

        Raises:
            ConfigError: the plan does not fit the model, or a criterion reads gradients of a loss: there is none.
            AutopruneError: the batches do not reach a layer.
            NumericalError: the data, or what layers read on it, is not finite.
        """
        plan.check_layers(inventory.names)
        names = [name for name in inventory.names if name in plan.layers and plan.layers[name].sparsity > 0.0]
        self.check_criteria(plan.layers[name].criterion.name for name in names)
        masks: Masks = {}
        fits = []
        with progress.bar("post-training pruning", len(names)) as bar:
            for name in names:
                sums = layer_sums(model, dense, name, batches)
                free = self._bias(model, inventory, name, sums)
                offset = free is not None or inventory[name].norm is not None  # the norm takes the mean out
                seen = sums.centred if offset else sums
                if name not in masks:
                    masks |= _masks(model, inventory, plan, name, self._statistics(seen), batches)
                fits.append(self._fit_(model, inventory[name], masks, seen))
                if free is not None:
                    _correct_(free, weight_of(model, name), sums)
                apply_masks_(model, {each: masks[each] for each in names if each in masks}, inventory)
                recalibrate_batch_norm_(model, batches)
                bar.advance(note=name)
        return fits, masks

    def _statistics(self, seen: LayerSums) -> LayerStatistics:
        cross = seen.cross if self.reconstruct == "dense" else None
        return LayerStatistics(input_moments=seen.moments, cross_moments=cross)

    def _bias(self, model: nn.Module, inventory: Inventory, name: str, sums: LayerSums) -> Tensor | None:
        """The bias that is this layer's alone and is added at each of its uses; None where there is none to correct."""
        own = inventory[name].biases
        shared = any(bias in other.biases for other in inventory.layers for bias in own if other.name != name)
        if not self.correct_bias or len(own) != 1 or shared or not sums.biased:
            return None
        return model.get_parameter(own[0])

    def _fit_(self, model: nn.Module, layer: LayerSpec, masks: Masks, seen: LayerSums) -> LayerFit:
        """Cuts and refits a layer's weight."""
        weight, mask = weight_of(model, layer.name), masks[layer.name]
        read = as_read(weight.detach(), layer.turned)
        start = read.double().reshape(seen.cross.shape)
        kept = as_read(mask, layer.turned).reshape(start.shape)
        if self.reconstruct == "none":
            rows = start * kept
        else:
            cross = seen.cross if self.reconstruct == "dense" else start @ seen.moments
            rows = LeastSquares(start, seen.moments, cross, self.damping).fitted(kept)
        with torch.no_grad():
            weight.copy_(as_held(rows.reshape(read.shape), layer.turned))
        off = seen.power.sum() - 2 * (rows * seen.cross).sum() + (rows @ seen.moments * rows).sum()
        error = max(0.0, float(off / seen.power.sum().clamp(min=1e-30)))
        return LayerFit(layer.name, sparsity(mask), error, seen.count, start.shape[-1])


def _masks(
    model: nn.Module, inventory: Inventory, plan: Plan, name: str, own: LayerStatistics, batches: Batches
) -> Masks:
    """The mask of a layer; where units of a recurrent one are cut as a whole, of both its weights."""
    names, partner = [name], partner_of(name)
    whole = PATTERNS.get(plan.layers[name].pattern.name).whole_filters
    if whole and partner is not None and partner in plan.layers and plan.layers[partner].sparsity > 0.0:
        names.append(partner)
    needs = frozenset[str]().union(*(CRITERIA.get(plan.layers[each].criterion.name).needs for each in names))
    if len(names) == 1:
        needs -= {"input_moments"}
    found = collect_statistics(model, names, batches, _no_loss, needs)
    if len(names) == 1:
        found[name] = replace(found[name], input_moments=own.input_moments, cross_moments=own.cross_moments)
    return make_masks(model, inventory, replace(plan, layers={each: plan.layers[each] for each in names}), found)


def _no_loss(output: object, target: object) -> Tensor:
    raise AssertionError("no criterion reads it: see check_criteria")


def _correct_(bias: Tensor, weight: Tensor, sums: LayerSums) -> None:
    """Adds what the mean of a layer's output is off the dense model's."""
    rows = as_read(weight.detach(), sums.turned).double().reshape(sums.cross.shape)
    with torch.no_grad():
        bias += (sums.outputs - rows @ sums.inputs).reshape(bias.shape).to(bias.dtype)
