"""Distillation: a loss mixed with what teachers say (Hinton et al. 2015): other models, or the model's own past."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.errors import AutopruneError
from autoprune.masks import Loss
from autoprune.model.arguments import call_with, prediction
from autoprune.model.classes import classes_last
from autoprune.settings import TEACHER_WEIGHTS, TrainingSettings


class Distillation:
    """A loss mixed with the divergence from the teachers' softened logits.

    Several teachers speak as one, by the weighted mean of their softened probabilities: the gradient is that of the
    weighted mean of their divergences. Logits have the classes last, (..., classes), or where `class_axis` finds
    them; of a nested output they are its `prediction`.

    One more teacher is the model's own past: the moving average of its weights, and of its buffers where they are no
    counters (Tarvainen and Valpola 2017, mean teacher). Early averages are short, so that the first weights are
    forgotten: the decay at step t is at most ``1 - 1 / (t + 1)``.

    Args:
        model: in training.
        loss: ``loss(output, target)``.
        settings: the weight and temperature of the divergence, the teachers' weights, the decay of the average.
        teachers: in eval mode.

    Attributes:
        average: the average, None where the settings ask for none.
    """

    def __init__(self, model: nn.Module, loss: Loss, settings: TrainingSettings, teachers: Sequence[nn.Module]) -> None:
        self.model, self.loss, self.decay = model, loss, settings.ema_teacher
        self.average = None if self.decay is None else copy.deepcopy(model).requires_grad_(False).eval()
        self.teachers = [*teachers, *([] if self.average is None else [self.average])]
        self.weight, self.temperature = settings.distillation_weight, settings.distillation_temperature
        self.teacher_weights = TEACHER_WEIGHTS[settings.teacher_weights]

    def __call__(self, output: Any, inputs: Any, target: Any) -> Tensor:
        logits = classes_last(prediction(output), target)
        own = (logits.flatten(0, -2) / self.temperature).log_softmax(dim=-1)
        divergence = functional.kl_div(
            own, self._wanted(logits, inputs, target), reduction="batchmean", log_target=True
        )
        # T^2 keeps the soft term's gradients at the size of the hard one's
        return (1.0 - self.weight) * self.loss(output, target) + self.weight * self.temperature**2 * divergence

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Takes the model into its average, after each optimizer step, counted from 1."""
        if self.average is None or self.decay is None:
            return
        new = 1.0 - min(self.decay, 1.0 - 1.0 / (step + 1))
        current = _tensors(self.model)
        for name, mean in _tensors(self.average).items():
            now = current[name]
            if mean.is_floating_point():
                mean.lerp_(now, new)
            else:
                mean.copy_(now)

    @torch.no_grad()
    def _wanted(self, own: Tensor, inputs: Any, target: Any) -> Tensor:
        """Log-probabilities of the teachers together, softened, ``(samples, classes)``."""
        outputs = (prediction(call_with(teacher, inputs)) for teacher in self.teachers)
        logits = torch.stack([classes_last(output, target).flatten(0, -2) for output in outputs])
        classes = isinstance(target, Tensor) and target.dtype == torch.int64 and target.shape == own.shape[:-1]
        weights = self.teacher_weights(logits.log_softmax(dim=2), target.flatten() if classes else None)
        return (weights[:, :, None] + (logits / self.temperature).log_softmax(dim=2)).logsumexp(dim=0)


def check_teachers(model: nn.Module, settings: TrainingSettings, teachers: Sequence[nn.Module]) -> None:
    """Raises AutopruneError when there is none to distil from, or one is the model itself."""
    if settings.distillation_weight > 0 and not teachers and settings.ema_teacher is None:
        raise AutopruneError(
            f"distillation_weight is {settings.distillation_weight} but there is no teacher: give the dense model "
            "among teachers, set ema_teacher, or set distillation_weight to 0."
        )
    if any(teacher is model for teacher in teachers):
        raise AutopruneError("a teacher is the model itself: give a copy of the dense model, or set ema_teacher.")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
