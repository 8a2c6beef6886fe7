"""A task of the user's own: functions named in a config as ``package.module:function``."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError, ConfigError
from autoprune.masks import Batches, Loss
from autoprune.model.arguments import Arguments
from autoprune.model.classes import class_axis
from autoprune.model.given import TARGETS, described, kind
from autoprune.registry import Choice
from autoprune.tasks.base import Task
from autoprune.tasks.batches import first_batches
from autoprune.tasks.checks import check_model, check_training, first_pair, unfreeze_
from autoprune.tasks.defaults import First, Fit, first_of, fitting_evaluation, fitting_loss, next_tokens, shifts_targets
from autoprune.tasks.functions import function, is_path, result_of, user_model
from autoprune.tasks.losses import LOSSES, loss_named
from autoprune.tasks.scoring import Scoring, check_names, named_scoring, own_scoring
from autoprune.tasks.splits import DenseOutput, Splits, shifted

CALIBRATION_BATCHES = 4
FUNCTIONS = ("model", "data", "loss", "evaluate", "metric")
"""Arguments of `user` that may name functions of the user's own."""


# long: its arguments are a config's keys, told in full
def user(
    model: str, data: str, loss: str | None = None, evaluate: str | None = None, metric: str | None = None
) -> Task:
    """A trained model and its loaders.

    Args:
        model: names a function without arguments that returns the trained ``nn.Module``.
        data: names one that returns ``(train, validation)`` or ``(train, validation, test)``: re-iterables, such as a
            DataLoader, of batches in any form that `inputs_and_target` takes. Without a test split, the validation
            split is reported.
        loss: a row of `LOSSES`, or names a function ``(output, target) -> scalar``. When left out, what fits the first
            batch is taken, and the report says so; likewise `evaluate`.
        evaluate: a row of `EVALUATIONS`, or names a function ``(model, loader) -> figure``, which gets a split's loader
            as `data` gives it.
        metric: a row of `EVALUATIONS`, or names an `autoprune.Metric`: how the figure of a function reads. When left
            out, a figure is read as a fraction, in percent, or as a number without a range, by what the dense model
            gets. Alone, a row also evaluates.

    Raises:
        ConfigError: a function cannot be imported or returns something else, names do not exist or go together, or no
            loss that fits can be told.
        AutopruneError: the first batch does not run through the model, or does not fit the loss or the evaluation.
    """
    check_names(evaluate, metric)
    named_loss = None if loss is None else _loss(loss)
    built = user_model("model", model)
    given = splits = Splits.of(result_of("data", data), data)
    check_model(built)
    dense = copy.deepcopy(built.cpu()).eval().requires_grad_(False)
    firsts = {name: _first(name, batches, dense) for name, batches in splits.items(data)}
    _check_alike(firsts)
    train, first = next(iter(firsts.items()))
    if shifts_targets(first):
        splits = splits.trained_on(shifted).scored_on(shifted)
        first = replace(first, target=next_tokens(first.target))
    fit = Fit(loss) if loss is not None else _fitting_loss(train, first)
    if fit.name == "cross_entropy":
        for name, batch in firsts.items():
            _check_classes(name, batch)
    scored = Fit(evaluate or metric or "") if evaluate or metric else fitting_evaluation(first)
    if is_path(scored.name):
        splits = replace(splits, validation=given.validation, testing=given.testing)
    elif scored.name == "fidelity":
        splits = splits.scored_on(DenseOutput(dense))
    scoring = _scoring(scored, metric, dense, splits.validation)
    splits = splits.trained_by(fit.name, dense)
    trained_by = named_loss or _loss(fit.name)
    check_training(train, unfreeze_(built), splits.train, trained_by)
    return Task(
        name="user",
        model=built,
        train=splits.train,
        calibration=first_batches(splits.calibration, CALIBRATION_BATCHES),
        validation=splits.validation,
        testing=splits.testing,
        loss=trained_by,
        dense_training=None,
        score=scoring.score,
        metric=scoring.metric,
        examples=Arguments.of(first_batches(given.train, 1)[0][0]).positional(built),
        facts={"loss": str(fit), **scoring.facts},
    )


def functions_of(task: Choice) -> tuple[str, ...]:
    """The functions that making a config's task imports and calls, as the config names them."""
    if task.name != "user":
        return ()
    named = (str(task.args[name]) for name in FUNCTIONS if task.args.get(name) is not None)
    return tuple(name for name in named if is_path(name))


def _loss(name: str) -> Loss:
    return function("loss", name) if is_path(name) else loss_named(name)


def _fitting_loss(train: str, first: First) -> Fit:
    _check_indices(train, first)
    try:
        return fitting_loss(first)
    except AutopruneError as error:
        raise ConfigError(
            f"{train}: no loss is known to fit: {str(error).rstrip('.')}. Name one (task.loss, --loss): "
            f"{', '.join(LOSSES)}, or package.module:function of your own."
        ) from None


def _scoring(scored: Fit, metric: str | None, dense: nn.Module, validation: Batches) -> Scoring:
    if is_path(scored.name):
        return own_scoring(scored.name, metric, dense, validation)
    return named_scoring(scored, dense, validation)


def _first(what: str, loader: Any, model: nn.Module) -> First:
    """The first batch of a split, run through the model."""
    inputs, target = first_pair(what, loader)
    tensors = Arguments.of(inputs).tensors
    if not tensors:
        raise AutopruneError(
            f"{what}: inputs must be a tensor or a tuple of them, not {kind(inputs)}; or a dictionary of tensors."
        )
    if any(x.is_floating_point() and not bool(torch.isfinite(x).all()) for x in tensors):
        raise AutopruneError(f"{what} holds NaN or infinity in its first batch; clean the data.")
    try:
        return first_of(model, inputs, target)
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise AutopruneError(
            f"{what} does not run through the model: inputs of shape {shapes}: {described(error)}."
        ) from error


def _check_alike(firsts: dict[str, First]) -> None:
    """Raises AutopruneError where some splits have targets and others have none."""
    without = [name for name, first in firsts.items() if first.target is None]
    if without and len(without) < len(firsts):
        raise AutopruneError(
            f"a batch of {without[0]} must be an (inputs, target) pair, not {kind(firsts[without[0]].inputs)}: the "
            f"other splits have targets. The target of a dictionary is at {' or '.join(TARGETS)}; where no split has "
            "any, a model is trained to do what the dense one does."
        )


def _check_indices(what: str, first: First) -> None:
    """Raises AutopruneError for what looks like class indices, or like a table of classes, and is none."""
    target, logits = first.target, first.prediction
    if not isinstance(target, Tensor) or not isinstance(logits, Tensor) or first.own_loss is not None:
        return
    classes = logits.shape[-1] if logits.dim() else 1
    if target.is_floating_point() and logits.shape[:-1] == target.shape and classes > 1:
        raise AutopruneError(
            f"{what}: targets must be class indices of type int64, not {target.dtype}; use target.long(). If they are "
            "no classes, let the model give an output of their shape, or name the loss."
        )
    if target.dtype == torch.int64 and logits.shape == target.shape and classes > 1:
        raise AutopruneError(
            f"{what}: for targets of shape {tuple(target.shape)} the model must give logits of that "
            f"shape and one more dimension, the classes; it gave shape {tuple(logits.shape)}. If they are several "
            "labels a sample, or numbers to be met, use target.float()."
        )


def _check_classes(what: str, first: First) -> None:
    """Raises AutopruneError for class indices that the logits do not have."""
    target, logits = first.target, first.prediction
    axis = class_axis(logits, target) if isinstance(logits, Tensor) else None
    if axis is None:
        return  # the loss says what is wrong
    classes, told = logits.shape[axis], target[(target >= 0) | (target != -100)]
    if told.numel() and (int(told.min()) < 0 or int(told.max()) >= classes):
        raise AutopruneError(
            f"{what}: targets must be class indices from 0 to {classes - 1}, the model's classes, or -100, which is "
            f"ignored; not {int(told.min())} to {int(told.max())}."
        )
