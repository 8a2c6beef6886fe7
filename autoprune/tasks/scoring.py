"""How a user's models are scored: what is named, or what fits, as a score of which a drop of 0.01 means something."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import nn

from autoprune.errors import ConfigError, NumericalError
from autoprune.masks import Batches
from autoprune.metric import Metric, returned
from autoprune.model.given import called, kind
from autoprune.tasks.batches import first_batches
from autoprune.tasks.defaults import Fit
from autoprune.tasks.evaluations import (
    EVALUATIONS,
    Evaluation,
    Figure,
    Score,
    percentage,
    scaled,
    target_variance,
)
from autoprune.tasks.functions import function, is_path, named

SCORE = "score"  # what a user's own figure is called that has no metric


@dataclass(frozen=True)
class Scoring:
    """A task's score, its metric, and what the report says of them."""

    score: Score
    metric: Metric
    facts: Mapping[str, str]


def check_names(evaluate: str | None, metric: str | None) -> None:
    """Raises ConfigError where names of evaluations and metrics do not exist, or do not go together."""
    for name in (evaluate, metric):
        if name is not None and not is_path(name):
            evaluation(name)
    if metric is None or is_path(evaluate) or evaluate == metric:
        return
    if evaluate is not None:
        raise ConfigError(
            f"the evaluation {evaluate!r} has a metric of its own: leave out the metric {metric!r}, or give it alone."
        )
    if is_path(metric):
        raise ConfigError(
            f"the metric {metric!r} says how a score reads: give the function that evaluates, too (task.evaluate, "
            "--evaluate)."
        )


def evaluation(name: str) -> Evaluation:
    """A row of the registry; raises ConfigError with the nearest name on a miss."""
    return cast("Evaluation", EVALUATIONS.get(name))


def named_scoring(fit: Fit, model: nn.Module, validation: Batches) -> Scoring:
    """By a row of the registry.

    Args:
        fit: the row, and why it was taken.
        model: the dense one.
        validation: the data whose targets, or on which the dense model's figure, may be the unit of a drop.
    """
    row = evaluation(fit.name)
    with called(f"the model cannot be evaluated by {fit.name!r}"):
        metric = row.metric
        row.figure(model, first_batches(validation, 1))  # now, and not after what takes long
        if row.unit == "dense":
            metric = scaled(metric, abs(returned(row.figure(model, validation), metric.name)) or 1.0)
        elif row.unit != "one":
            variance = target_variance(validation)
            metric = scaled(metric, (variance if row.unit == "variance" else math.sqrt(variance)) or 1.0)
    divisor = metric.factor if metric.factor < 0 else 1.0
    return _scoring(row.figure, metric, divisor, str(fit))


def own_scoring(evaluate: str, metric: str | None, model: nn.Module, validation: Batches) -> Scoring:
    """By a user's own function.

    Args:
        evaluate: ``package.module:function``.
        metric: a row of the registry, or ``package.module:name`` of a `Metric`; None reads the figure by what it is.
        model: the dense one, which is evaluated once.
        validation: on these data.

    Raises:
        ConfigError: a function cannot be imported, or gives no metric.
        NumericalError: the evaluation gives no finite number, or one out of the metric's range.
        GivenError: it raises something.
    """
    figure, known = function("evaluate", evaluate), None if metric is None else _metric(metric)
    with called(f"evaluate={evaluate!r} failed on the dense model"):
        dense = returned(figure(model, validation), SCORE if known is None else known.name)
    if known is None:
        scoring = _read_by_value(figure, dense, evaluate)
    elif known.unit == "%" and known.factor == 100.0:
        scoring = _fraction(figure, known, dense, evaluate)
    else:
        if metric is not None and not is_path(metric) and evaluation(metric).unit != "one":
            known = scaled(known, abs(dense) or 1.0)
        scoring = _scoring(figure, known, known.factor, evaluate)
    _check_range(evaluate, dense, scoring)
    return scoring


def _check_range(evaluate: str, dense: float, scoring: Scoring) -> None:
    """Raises NumericalError where the dense model's figure is out of its metric's range."""
    metric, divisor = scoring.metric, scoring.score.divisor
    try:
        metric.score(dense / divisor)
    except NumericalError:
        low, high = sorted((metric.lowest * divisor, metric.highest * divisor + 0.0))
        better = "lower" if divisor < 0 else "higher"
        percent = ", or from 0 to 100 in percent" if metric.unit == "%" else ""
        raise NumericalError(
            f"evaluate={evaluate!r} gave {dense:g} for the dense model, but the metric {metric.name!r} is from {low:g} "
            f"to {high:g}{percent}, and {better} is better: return that figure, or name another metric."
        ) from None


def _read_by_value(figure: Figure, dense: float, text: str) -> Scoring:
    if 0.0 <= dense <= 100.0:
        return _fraction(figure, percentage(SCORE), dense, text)
    size = abs(dense)
    metric = Metric(SCORE, size, "", 4, f"of {SCORE}")
    return _scoring(figure, metric, size, f"{text}, a number without a range, the higher the better")


def _fraction(figure: Figure, metric: Metric, dense: float, text: str) -> Scoring:
    """Of a figure that is a fraction, or in percent: the dense model's says which."""
    percent = 1.0 < dense <= 100.0
    form = (
        f"in percent, as the dense model has {dense:.4g}"
        if percent
        else f"a fraction, as the dense model has {dense:.4g}"
    )
    return _scoring(figure, metric, 100.0 if percent else 1.0, f"{text}, {form}")


def _scoring(figure: Figure, metric: Metric, divisor: float, text: str) -> Scoring:
    return Scoring(
        Score(figure, metric.name, divisor),
        metric,
        {"score": f"{text}; a drop of 0.01 is {metric.allowance(0.01)}"},
    )


def _metric(name: str) -> Metric:
    if not is_path(name):
        return evaluation(name).metric
    value = named("metric", name)
    value = value() if callable(value) else value
    if not isinstance(value, Metric):
        raise ConfigError(f"metric={name!r} must be an autoprune.Metric, or return one, not {kind(value)}.")
    return value
