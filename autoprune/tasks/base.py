"""What a task is: a model, its data and its metric, under one name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.masks import Batches, Loss
from autoprune.metric import ACCURACY, Metric
from autoprune.model.arguments import Arguments
from autoprune.model.given import called
from autoprune.model.inventory import as_tuple, eval_mode
from autoprune.precision import ModelPrecision, RunPrecision
from autoprune.settings import TrainingSettings
from autoprune.tasks.evaluations import accuracy


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
        facts: what the report says of the task beside its name, e.g. how its loss was chosen.
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
    facts: Mapping[str, str] = field(default_factory=dict)

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

    def calibration_inputs(self, precision: ModelPrecision | RunPrecision) -> tuple[tuple[Tensor, ...], ...] | None:
        """The batches from which `repack` finds the ranges of activations, by place; None for float32.

        Raises:
            AutopruneError: one holds what is no tensor, or cannot be given by place.
        """
        return None if precision == "float32" else self.positional_calibration()

    def positional_calibration(self) -> tuple[tuple[Tensor, ...], ...]:
        """The calibration batches' inputs by place; raises as `calibration_inputs` does."""
        return tuple(Arguments.of(inputs).positional(self.model) for inputs, _ in self.calibration)

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """The model's inputs for `batch` samples, repeated where there are too few."""
        if batch < 1:
            raise AutopruneError(f"a batch holds at least one sample, not {batch}.")
        first = self.examples or as_tuple(self.calibration[0][0])
        return tuple(torch.cat([x] * -(-batch // len(x)))[:batch].clone() for x in first)
