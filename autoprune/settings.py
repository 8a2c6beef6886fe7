"""How a model is trained: plain data that a config, a task and the training loop share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from autoprune.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class TrainingSettings:
    """One training run.

    Attributes:
        epochs: passes over the batches, >= 1.
        learning_rate: the peak learning rate, > 0.
        momentum: SGD's momentum and AdamW's first beta, in [0, 1).
        weight_decay: >= 0; biases and norms (one dimension or none) are never decayed.
        optimizer: a name in OPTIMIZERS.
        schedule: a name in SCHEDULES; the factor on the learning rate after the warm-up.
        warmup: fraction of all steps over which the learning rate rises linearly from 0, in [0, 1).
        distillation_weight: share of the teachers' term in the loss, in [0, 1]; 0 trains without a teacher.
        distillation_temperature: softens both sides' logits, > 0.
        teacher_weights: a name in TEACHER_WEIGHTS; how much each of several teachers has to say on a sample.
        ema_teacher: decay, in [0, 1), of a moving average of the model in training that is one more teacher; None has
            no such teacher.
        max_steps: stop after this many optimizer steps; None trains all epochs.
        clip_norm: largest L2 norm of the gradient, > 0; None never clips.
        quantize_from: share of the epochs after which a model that will run in int8 trains fake-quantised, in [0, 1).
    """

    epochs: int = 5
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    optimizer: str = "sgd"
    schedule: str = "cosine"
    warmup: float = 0.0
    distillation_weight: float = 0.0
    distillation_temperature: float = 4.0
    teacher_weights: str = "mean"
    ema_teacher: float | None = None
    max_steps: int | None = None
    clip_norm: float | None = None
    quantize_from: float = 0.5

    def __post_init__(self) -> None:
        """Raises ConfigError naming the setting, its value and what is allowed."""
        for name, table in {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "teacher_weights": TEACHER_WEIGHTS}.items():
            given = getattr(self, name)
            if given not in table:
                raise ConfigError(f"unknown {name} {given!r}. {did_you_mean(str(given), table)}")
        for name, (whole, allowed, fits) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            number = isinstance(value, int) if whole else isinstance(value, (int, float))
            if not number or isinstance(value, bool) or not math.isfinite(value) or not fits(value):
                raise ConfigError(f"training setting {name!r} must be {allowed}, not {value!r}.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def changed(self, settings: Mapping[str, Any]) -> TrainingSettings:
        """A copy with the named settings changed; raises ConfigError like `from_json`."""
        return self.from_json({**self.to_json(), **settings})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainingSettings:
        """Raises ConfigError on a name that is not a setting, or a value out of range."""
        names = [field.name for field in fields(cls)]
        for name in data:
            if name not in names:
                raise ConfigError(f"unknown training setting {name!r}. {did_you_mean(name, names)}")
        return cls(**data)


_OPTIONAL = frozenset({"max_steps", "clip_norm", "ema_teacher"})
_RANGES: Mapping[str, tuple[bool, str, Callable[[float], bool]]] = {
    "epochs": (True, "an integer >= 1", lambda value: value >= 1),
    "learning_rate": (False, "a number > 0", lambda value: value > 0),
    "momentum": (False, "in [0, 1)", lambda value: 0 <= value < 1),
    "weight_decay": (False, "a number >= 0", lambda value: value >= 0),
    "warmup": (False, "in [0, 1)", lambda value: 0 <= value < 1),
    "distillation_weight": (False, "in [0, 1]", lambda value: 0 <= value <= 1),
    "distillation_temperature": (False, "a number > 0", lambda value: value > 0),
    "ema_teacher": (False, "in [0, 1) or nothing", lambda value: 0 <= value < 1),
    "max_steps": (True, "an integer >= 1 or nothing", lambda value: value >= 1),
    "clip_norm": (False, "a number > 0 or nothing", lambda value: value > 0),
    "quantize_from": (False, "in [0, 1)", lambda value: 0 <= value < 1),
}

SCHEDULES: Mapping[str, Callable[[float], float]] = {  # progress in [0, 1] -> factor
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def learning_rate(settings: TrainingSettings, step: int, total_steps: int) -> float:
    """The learning rate of `step`, counted from 1, of `total_steps`."""
    warm = round(settings.warmup * total_steps)
    if step <= warm:
        return settings.learning_rate * step / warm
    progress = (step - 1 - warm) / max(1, total_steps - warm)
    return settings.learning_rate * SCHEDULES[settings.schedule](progress)


def _sgd(groups: list[dict[str, Any]], settings: TrainingSettings) -> torch.optim.Optimizer:
    nesterov = settings.momentum > 0
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=nesterov)


def _adamw(groups: list[dict[str, Any]], settings: TrainingSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(settings.momentum, 0.999))


OPTIMIZERS: Mapping[str, Callable[[list[dict[str, Any]], TrainingSettings], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adamw": _adamw,
}


def make_optimizer(parameters: Sequence[Tensor], settings: TrainingSettings) -> torch.optim.Optimizer:
    """The optimizer of `settings` over `parameters`; only those of two or more dimensions decay."""
    decayed = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay}
    plain = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    return OPTIMIZERS[settings.optimizer]([group for group in (decayed, plain) if group["params"]], settings)


def _mean(log_shares: Tensor, target: Tensor | None) -> Tensor:
    return torch.full(log_shares.shape[:2], -math.log(len(log_shares)))


def _confidence(log_shares: Tensor, target: Tensor | None) -> Tensor:
    confidence = (log_shares.exp() * log_shares).sum(dim=2)  # minus the entropy
    if target is not None:
        true = log_shares.gather(2, target.clamp(min=0).expand(len(log_shares), -1)[:, :, None])[:, :, 0]
        confidence = torch.where(target >= 0, true, confidence)  # a class below 0 is one to ignore
    return confidence.log_softmax(dim=0)


# Log-probabilities of the classes, (teachers, samples, classes), and the true ones, (samples,), where targets are
# classes -> log of each teacher's weight on each sample, (teachers, samples); the weights of a sample sum to 1.
# By confidence, a teacher weighs what it gives the true class: the posterior that its answer is the one to follow
# (after Zhang et al. 2022, CA-MKD, whose weights fall with the cross-entropy too).
TEACHER_WEIGHTS: Mapping[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "mean": _mean,
    "confidence": _confidence,
}
