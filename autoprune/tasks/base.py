"""What a task is: a model, its data and its metric, under one name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.errors import AutopruneError
from autoprune.masks import Batches, Loss
from autoprune.metric import ACCURACY, Metric
from autoprune.model.arguments import call_with
from autoprune.model.given import called, read
from autoprune.model.inventory import as_tuple, eval_mode
from autoprune.settings import TrainingSettings


def accuracy(model: nn.Module, batches: Batches) -> float:
    """Fraction of targets, class indices (N, ...), that are the largest of the logits (N, ..., classes).

    The model runs in eval and inference mode; its mode is restored.
    """
    return _mean(model, batches, lambda logits, target: logits.argmax(dim=-1) == target)


def minus_bits(model: nn.Module, batches: Batches) -> float:
    """Mean log2 of the probability of each target: minus the bits it takes to tell it. Shapes as of `accuracy`."""
    return _mean(model, batches, lambda logits, target: -_nats(logits, target) / math.log(2.0))


def _nats(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none")


def _mean(model: nn.Module, batches: Batches, worth: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The mean of what each target is worth, given its logits."""
    total, count = 0.0, 0
    with eval_mode(model), torch.inference_mode():
        for _, inputs, target in read(batches, "the data to evaluate on"):
            total += float(worth(call_with(model, inputs), target).sum(dtype=torch.float64))
            count += target.numel()
    if count == 0:
        raise AutopruneError("there is no data to evaluate on; give at least one batch.")
    return total / count


@dataclass(frozen=True)
class Task:
    """A model to prune and the data that says how good it is.

    Attributes:
        name: the registry row.
        model: the dense model, on the CPU; trained already when `dense_training` is None.
        train: re-iterable batches of ``(inputs, target)``, shuffled and augmented.
        calibration: a few fixed batches of the train split, without augmentation.
        validation: the only split a search sees.
        testing: the split of reported figures.
        loss: ``loss(model(*inputs), target)`` is a scalar.
        dense_training: how the dense model is trained; None when it comes trained.
        score: (model, split) -> a number, higher is better; may leave the model in another mode.
        metric: how a score reads, and what scores there are.
        examples: inputs to run and time the model on; taken from `calibration` when None.
    """

    name: str
    model: nn.Module
    train: Batches
    calibration: tuple[tuple[Any, Tensor], ...]
    validation: Batches
    testing: Batches
    loss: Loss
    dense_training: TrainingSettings | None
    score: Callable[[nn.Module, Batches], Any] = accuracy
    metric: Metric = ACCURACY
    examples: tuple[Tensor, ...] | None = None

    def evaluate(self, model: nn.Module) -> float:
        """Score of `model` on the validation split.

        Raises:
            NumericalError: `score` gave none.
            GivenError: it raised something.
        """
        return self._scored(model, self.validation)

    def test(self, model: nn.Module) -> float:
        """Score of `model` on the test split; likewise."""
        return self._scored(model, self.testing)

    def _scored(self, model: nn.Module, split: Batches) -> float:
        with eval_mode(model), torch.no_grad():
            with called("the model cannot be evaluated"):
                given = self.score(model, split)
            return self.metric.score(given)

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """The model's inputs for `batch` samples, repeated where there are too few."""
        if batch < 1:
            raise AutopruneError(f"a batch holds at least one sample, not {batch}.")
        first = self.examples or as_tuple(self.calibration[0][0])
        return tuple(torch.cat([x] * -(-batch // len(x)))[:batch].clone() for x in first)
