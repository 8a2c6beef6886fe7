"""The evaluations that a config names: a figure of a model on data, and the metric that says how it reads.

One function and one row an evaluation. The model runs in eval and inference mode; its mode is restored. Class indices
below 0 are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.errors import AutopruneError
from autoprune.masks import Batches
from autoprune.metric import ACCURACY, BITS_PER_CHARACTER, Metric, returned
from autoprune.model.arguments import call_with, prediction
from autoprune.model.classes import class_axis
from autoprune.model.given import read
from autoprune.model.inventory import eval_mode
from autoprune.registry import Registry
from autoprune.tasks.losses import alike_for, class_logits

Figure = Callable[[nn.Module, Batches], Any]
Unit = Literal["one", "variance", "deviation", "dense"]
NO_DATA = "there is no data to evaluate on; give at least one batch."


@dataclass(frozen=True)
class Evaluation:
    """What models are scored by.

    Attributes:
        figure: (model, batches) -> the metric's figure; a fraction where it is in percent.
        metric: how the score reads; where lower figures are better its factor is below 0.
        unit: what a drop of 1 is: ``one`` of the metric, the targets' ``variance`` or standard ``deviation``, or the
            ``dense`` model's figure: so a drop of 0.01 means much the same for metrics of any range.
    """

    figure: Figure
    metric: Metric
    unit: Unit = "one"


@dataclass(frozen=True)
class Score:
    """(model, split) -> a score, higher when better, of a figure that reads otherwise.

    Attributes:
        figure: as `Evaluation` has it, or a user's own.
        name: of the metric, where the figure is in a dictionary.
        divisor: the score is the figure over it; below 0 where lower figures are better.
    """

    figure: Figure
    name: str
    divisor: float = 1.0

    def __call__(self, model: nn.Module, batches: Batches) -> float:
        return returned(self.figure(model, batches), self.name) / self.divisor


def scaled(metric: Metric, unit: float) -> Metric:
    """The metric with a score in which a drop of 1 is `unit` of its figure."""
    return replace(metric, factor=math.copysign(unit, metric.factor))


def accuracy(model: nn.Module, batches: Batches) -> float:
    """The fraction that is right: of class indices, the largest of the logits; of labels 0 or 1, a logit's sign.

    Logits of class indices (N, ...) have one more axis, the classes: see `class_axis`.
    """

    def right(output: Tensor, target: Tensor) -> Tensor:
        if (axis := class_axis(output, target)) is not None:
            hits = (output.argmax(dim=axis) == target)[target >= 0]
        else:
            logits, labels = alike_for("accuracy", output, target)
            hits = (logits > 0) == (labels > 0.5)
        return torch.stack([hits.sum(), torch.tensor(hits.numel())])

    return _ratio(_sums(model, batches, right))


def minus_bits(model: nn.Module, batches: Batches) -> float:
    """Mean log2 of the probability of each class index: minus the bits it takes to tell it. Shapes as of `accuracy`."""
    return -bits(model, batches)


def bits(model: nn.Module, batches: Batches) -> float:
    """The mean number of bits it takes to tell each class index, e.g. the next token."""

    def nats(output: Tensor, target: Tensor) -> Tensor:
        logits, indices = _classes("bits", output, target)
        each = functional.cross_entropy(logits, indices, reduction="none")
        return torch.stack([each.sum(dtype=torch.float64), torch.tensor(len(indices))])

    return _ratio(_sums(model, batches, nats)) / math.log(2.0)


def perplexity(model: nn.Module, batches: Batches) -> float:
    """2 to the power of `bits`: among how many equal choices the next token is, to the model."""
    return math.exp2(min(1000.0, bits(model, batches)))


def mse(model: nn.Module, batches: Batches) -> float:
    """The mean square of the error, over all values of the targets."""

    def squares(output: Tensor, target: Tensor) -> Tensor:
        value, wanted = alike_for("mse", output, target)
        return torch.stack([(value - wanted).double().square().sum(), torch.tensor(wanted.numel())])

    return _ratio(_sums(model, batches, squares))


def rmse(model: nn.Module, batches: Batches) -> float:
    """The root of `mse`, in the targets' unit."""
    return math.sqrt(mse(model, batches))


def iou(model: nn.Module, batches: Batches) -> float:
    """Segmentation: intersection over union, its mean over the classes that are predicted or wanted anywhere."""

    def overlap(output: Tensor, target: Tensor) -> Tensor:
        logits, wanted = _classes("iou", output, target)
        got, count = logits.argmax(dim=1), logits.shape[1]
        both, ours, theirs = (x.bincount(minlength=count) for x in (wanted[got == wanted], got, wanted))
        return torch.stack([both, ours + theirs - both])

    intersection, union = _sums(model, batches, overlap)
    return float((intersection[union > 0] / union[union > 0]).mean())


def f1(model: nn.Module, batches: Batches) -> float:
    """Several labels a sample: F1 of all labels of all samples together (micro); a logit above 0 tells its label."""

    def hits(output: Tensor, target: Tensor) -> Tensor:
        logits, labels = alike_for("f1", output, target)
        told, true = logits > 0, labels > 0.5
        return torch.stack([2 * (told & true).sum(), told.sum() + true.sum()])

    twice, positives = _sums(model, batches, hits)
    return float(twice / positives) if float(positives) else 1.0  # there is nothing to tell, and nothing was told


def fidelity(model: nn.Module, batches: Batches) -> float:
    """The share of the targets' variance that the output explains (R squared); the targets are the dense outputs.

    1 where the model says what the dense one does, 0 where it says the mean, below 0 where it is further off.
    """

    def moments(output: Tensor, target: Tensor) -> Tensor:
        value, wanted = (x.double() for x in alike_for("fidelity", output, target))
        lost = (value - wanted).square().sum()
        return torch.stack([lost, wanted.sum(), wanted.square().sum(), torch.tensor(wanted.numel())])

    lost, total, squares, count = _sums(model, batches, moments)
    return 1.0 - float(lost / (squares - total.square() / count).clamp(min=1e-12))


def target_variance(batches: Batches) -> float:
    """Of all values of all targets."""
    values = [target.double().flatten() for _, _, target in read(batches, "the data to evaluate on")]
    return float(torch.cat(values).var(correction=0))


EVALUATIONS: Registry[Evaluation] = Registry(
    "evaluation",
    {
        "accuracy": "autoprune.tasks.evaluations:BY_ACCURACY",
        "iou": "autoprune.tasks.evaluations:BY_IOU",
        "f1": "autoprune.tasks.evaluations:BY_F1",
        "mse": "autoprune.tasks.evaluations:BY_MSE",
        "rmse": "autoprune.tasks.evaluations:BY_RMSE",
        "bits": "autoprune.tasks.evaluations:BY_BITS",
        "perplexity": "autoprune.tasks.evaluations:BY_PERPLEXITY",
        "fidelity": "autoprune.tasks.evaluations:BY_FIDELITY",
    },
)


def percentage(name: str, points: str | None = None) -> Metric:
    """A figure in percent, of a score from 0 to 1."""
    return Metric(name, 100.0, "%", 2, points or f"points of {name}", lowest=0.0, highest=1.0)


def error(name: str) -> Metric:
    """A figure of at least 0, the lower the better."""
    return Metric(name, -1.0, "", 4, name, highest=0.0)


BY_ACCURACY = Evaluation(accuracy, ACCURACY)
BY_IOU = Evaluation(iou, percentage("mean IoU", "points of mean IoU"))
BY_F1 = Evaluation(f1, percentage("F1"))
BY_MSE = Evaluation(mse, error("mse"), unit="variance")
BY_RMSE = Evaluation(rmse, error("rmse"), unit="deviation")
BY_BITS = Evaluation(bits, replace(BITS_PER_CHARACTER, name="bits", points="bits"))
BY_PERPLEXITY = Evaluation(perplexity, error("perplexity"), unit="dense")
BY_FIDELITY = Evaluation(fidelity, replace(percentage("fidelity"), lowest=-math.inf))


def _sums(model: nn.Module, batches: Batches, terms: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What `terms` gives for each batch, added up in float64."""
    total: Tensor | None = None
    with eval_mode(model), torch.inference_mode():
        for _, inputs, target in read(batches, "the data to evaluate on"):
            added = terms(prediction(call_with(model, inputs)), target).double()
            total = added if total is None else total + added
    if total is None:
        raise AutopruneError(NO_DATA)
    return total


def _ratio(sums: Tensor) -> float:
    if not float(sums[1]):
        raise AutopruneError(NO_DATA)
    return float(sums[0] / sums[1])


def _classes(name: str, output: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Logits (samples, classes) and class indices (samples,), without those that are ignored."""
    logits, indices = class_logits(name, output, target)
    kept = indices >= 0
    return logits[kept], indices[kept]
