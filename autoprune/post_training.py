"""Post-training pruning of anybody's model: a trained module and some of its inputs -> the same module with zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from autoprune.criteria import CRITERIA
from autoprune.errors import AutopruneError
from autoprune.evaluation.recovery.post_training import Fit, LayerFit, PostTraining
from autoprune.masks import Batches, Masks
from autoprune.model.arguments import Arguments
from autoprune.model.copies import copy_for_inference, uncompiled_
from autoprune.model.given import read_calibration
from autoprune.model.inventory import check_patterns, take_inventory
from autoprune.patterns import PATTERNS
from autoprune.plan import LayerPlan, Plan
from autoprune.progress import SILENT, Progress
from autoprune.quantization import check_plain
from autoprune.registry import Choice
from autoprune.target import Target


class PostTrained(NamedTuple):
    """What `prune_post_training` returns.

    Attributes:
        model: a pruned copy, in eval mode.
        masks: layer -> its mask, True keeps.
        layers: what became of each layer that was cut, in the order in which they run.
        kept_dense: layer -> why it stays dense.
    """

    model: nn.Module
    masks: Masks
    layers: tuple[LayerFit, ...]
    kept_dense: Mapping[str, str]


def prune_post_training(
    model: nn.Module,
    batches: Batches,
    sparsity: float | None = None,
    *,
    plan: Plan | None = None,
    pattern: str | Choice = Choice("group", {"size": 8}),  # noqa: B008 - frozen
    criterion: str | Choice = Choice("obs", {"steps": 4}),  # noqa: B008 - frozen
    keep_dense: Sequence[str] = (),
    reconstruct: Fit = "dense",
    correct_bias: bool = True,
    damping: float = 0.01,
    progress: Progress = SILENT,
) -> PostTrained:
    """Prunes a trained model on a few batches of its inputs, without labels and without training, in minutes.

        pruned = autoprune.prune_post_training(model, batches, 0.5)
        fast = autoprune.repack(pruned.model, batches[0])

    Layer after layer, in the order in which they run: the criterion scores the weights on what the model that is
    pruned so far gives the layer, those that are kept are refitted to the dense layer's output, the bias makes up for
    the mean, and batch norms are recalibrated. The same arguments give the same model.

    Args:
        model: a trained module; left as it is. On the CPU.
        batches: in any form that training takes, several times as many positions in all as a filter has weights; see
            `LayerFit.positions`. Targets are not read. Several inputs without one are an `Arguments` or a mapping.
        sparsity: of every layer that can be pruned, in (0, 1).
        plan: in place of `sparsity`, `pattern` and `criterion`.
        pattern: a name or a `Choice`; groups of 8 filters when left out.
        criterion: a name or a `Choice`, of one that reads no gradients.
        keep_dense: glob patterns of layer names.
        reconstruct: what kept weights are fitted to: ``dense``, the dense model's output; ``own``, what the layer's
            whole weight gives for the same input; ``none``, nothing: they stay as they are.
        correct_bias: whether biases make up for means.
        damping: of the fit, over the mean square of a layer's input; > 0.
        progress: where the layers are shown.

    Raises:
        ConfigError: no such pattern, criterion or argument, a figure out of range, or a name that no layer has.
        GivenError: a batch cannot be read, or the model does not run on it.
        NumericalError: the data, or what layers read on it, is not finite.
        AutopruneError: no layer can be pruned, there are no batches, or they do not reach a layer.
    """
    if (sparsity is None) == (plan is None):
        raise AutopruneError("give a sparsity or a plan: exactly one of them says how much to prune.")
    how = PostTraining(reconstruct, correct_bias, damping)
    layer = None if sparsity is None else _layer_plan(sparsity, Choice.of(pattern), Choice.of(criterion))
    with torch.inference_mode(False):  # whatever the caller's script is run under
        dense = uncompiled_(copy_for_inference(model)).cpu()
        check_plain(model)
        held = tuple(Arguments.of(inputs) for _, inputs, _ in read_calibration(batches))
        if not held:
            raise AutopruneError("there is no calibration data: give some batches of the model's inputs.")
        inventory = take_inventory(dense, held[0], keep_dense=keep_dense)
        check_patterns(keep_dense, inventory)
        pruned, made = copy_for_inference(dense), plan or Plan({name: layer for name in inventory.names if layer})
        fits, masks = how.prune_(pruned, dense, inventory, made, held, progress)
    return PostTrained(pruned, masks, tuple(fits), {row.name: row.reason for row in inventory.dense})


def _layer_plan(sparsity: float, pattern: Choice, criterion: Choice) -> LayerPlan:
    """What is decided for each layer, checked before anything that takes long."""
    Target(sparsity=sparsity)
    PATTERNS.create(pattern)
    CRITERIA.create(criterion)
    return LayerPlan(sparsity, pattern, criterion)
