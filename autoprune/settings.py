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
        distillation_weight: share of the teacher's term in the loss, in [0, 1]; 0 trains without a teacher.
        distillation_temperature: softens both sides' logits, > 0.
        max_steps: stop after this many optimizer steps; None trains all epochs.
        clip_norm: largest L2 norm of the gradient, > 0; None never clips.
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
    max_steps: int | None = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError naming the setting, its value and what is allowed."""
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"unknown optimizer {self.optimizer!r}. {did_you_mean(str(self.optimizer), OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"unknown schedule {self.schedule!r}. {did_you_mean(str(self.schedule), SCHEDULES)}")
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


_OPTIONAL = frozenset({"max_steps", "clip_norm"})
_RANGES: Mapping[str, tuple[bool, str, Callable[[float], bool]]] = {
    "epochs": (True, "an integer >= 1", lambda value: value >= 1),
    "learning_rate": (False, "a number > 0", lambda value: value > 0),
    "momentum": (False, "in [0, 1)", lambda value: 0 <= value < 1),
    "weight_decay": (False, "a number >= 0", lambda value: value >= 0),
    "warmup": (False, "in [0, 1)", lambda value: 0 <= value < 1),
    "distillation_weight": (False, "in [0, 1]", lambda value: 0 <= value <= 1),
    "distillation_temperature": (False, "a number > 0", lambda value: value > 0),
    "max_steps": (True, "an integer >= 1 or nothing", lambda value: value >= 1),
    "clip_norm": (False, "a number > 0 or nothing", lambda value: value > 0),
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
