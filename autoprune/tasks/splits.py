"""The splits of a user's data, and what they are changed to for a loss or an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import ConfigError
from autoprune.masks import Batches
from autoprune.model.arguments import call_with, prediction
from autoprune.model.given import kind
from autoprune.tasks.batches import MappedBatches
from autoprune.tasks.defaults import next_tokens, with_target

Change = Callable[[Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Splits:
    """Re-iterable batches; the test split is the validation split where there is none.

    Attributes:
        calibration: what criteria and curves are computed from, in the order of `train`.
    """

    train: Batches
    validation: Batches
    testing: Batches
    calibration: Batches

    @classmethod
    def of(cls, loaders: Any, data: str) -> Splits:
        """Of what the function `data` returned; raises ConfigError where that is no two or three loaders."""
        if not isinstance(loaders, (tuple, list)) or len(loaders) not in (2, 3):
            count = f" of {len(loaders)}" if isinstance(loaders, (tuple, list)) else ""
            raise ConfigError(
                f"data={data!r} must return (train, validation) or (train, validation, test), not "
                f"{kind(loaders)}{count}."
            )
        return cls(loaders[0], loaders[1], loaders[-1], loaders[0])

    def items(self, data: str) -> list[tuple[str, Batches]]:
        """Each split with what it is called in an error."""
        splits = [("train", self.train), ("validation", self.validation)]
        if self.testing is not self.validation:
            splits.append(("test", self.testing))
        return [(f"the {name} split of data={data!r}", batches) for name, batches in splits]

    def trained_by(self, loss: str | None, dense: nn.Module) -> Splits:
        """With the batches that a row of `LOSSES` needs; as they are for all others, and for a user's function.

        Args:
            loss: the row's name.
            dense: the dense model, in eval mode.
        """
        if loss == "none":
            return self.trained_on(DenseOutput(dense), DenseOutput(dense, noise=1.0))
        return self.trained_on(WithTarget(dense)) if loss == "model" else self

    def trained_on(self, change: Change, calibration: Change | None = None) -> Splits:
        """With other batches to train on, and to calibrate on."""
        return replace(
            self,
            train=MappedBatches(self.train, change),
            calibration=MappedBatches(self.calibration, calibration or change),
        )

    def scored_on(self, change: Change) -> Splits:
        """With other batches to score on."""
        validation = MappedBatches(self.validation, change)
        testing = validation if self.testing is self.validation else MappedBatches(self.testing, change)
        return replace(self, validation=validation, testing=testing)


def shifted(inputs: Any, target: Tensor) -> tuple[Any, Any]:
    """A batch of a model that shifts its targets itself, as one of a model that does not."""
    return inputs, next_tokens(target)


@dataclass(frozen=True)
class WithTarget:
    """A batch with its target among the inputs, for a model that computes its loss itself."""

    model: nn.Module

    def __call__(self, inputs: Any, target: Any) -> tuple[Any, Any]:
        return with_target(self.model, inputs, target), target


@dataclass(frozen=True)
class DenseOutput:
    """A batch whose target is what the dense model says to it.

    Attributes:
        model: the dense one, in eval mode.
        noise: added to it, in the output's standard deviations: at the dense model's own output every gradient is 0,
            and with noise the squared gradients are those of a model of such a variance.
    """

    model: nn.Module
    noise: float = 0.0

    def __call__(self, inputs: Any, target: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            output = prediction(call_with(self.model, inputs))
            if self.noise:
                output = output + self.noise * output.std(correction=0) * torch.randn_like(output)
        return inputs, output
