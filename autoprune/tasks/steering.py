"""Small tasks that steering is learned on, and the tasks it is judged by, of builds that are never drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.tasks.family import Member

_DENSE = TrainingSettings(epochs=8, learning_rate=0.05, warmup=0.1, clip_norm=1.0)
_NORMED = TrainingSettings(epochs=8, learning_rate=0.1, warmup=0.1)
_ATTENTION = TrainingSettings(epochs=20, learning_rate=2e-3, optimizer="adamw", weight_decay=0.01, warmup=0.1)

Draw = Callable[[np.random.Generator], tuple[dict[str, Any], TrainingSettings]]


def _mlp(draws: np.random.Generator) -> tuple[dict[str, Any], TrainingSettings]:
    widths = sorted((int(draws.integers(2, 9)) * 16 for _ in range(int(draws.integers(2, 5)))), reverse=True)
    return {"name": "mlp", "widths": widths}, _DENSE


def _plain(draws: np.random.Generator) -> tuple[dict[str, Any], TrainingSettings]:
    first = int(draws.integers(2, 4)) * 4
    return {"name": "plain_cnn", "widths": [first, 2 * first, 4 * first][: int(draws.integers(2, 4))]}, _NORMED


def _depthwise(draws: np.random.Generator) -> tuple[dict[str, Any], TrainingSettings]:
    first = int(draws.integers(2, 4)) * 8
    return {"name": "depthwise_cnn", "widths": [first, 2 * first, 4 * first]}, _NORMED


_KINDS: Mapping[str, Draw] = {"mlp": _mlp, "plain": _plain, "depthwise": _depthwise}
_TURNS = ("mlp", "plain", "mlp", "depthwise")  # MLPs train fastest


def _member(name: str, model: dict[str, Any], dense: TrainingSettings, seed: int) -> Member:
    return Member(name, Choice("digits", {"model": model, "augment": False, "seed": seed}), dense)


def draw_steering_members(count: int, seed: int) -> tuple[Member, ...]:
    """`count` tasks on digits to learn on: kinds of models in turn, widths and depths at random."""
    members = []
    for index in range(count):
        kind = _TURNS[index % len(_TURNS)]
        model, dense = _KINDS[kind](np.random.default_rng([seed, index]))
        members.append(_member(f"{index:02d}-{kind}", model, dense, index))
    return tuple(members)


def held_out_steering_members() -> tuple[Member, ...]:
    """Tasks to judge by, of builds that `draw_steering_members` never draws."""
    builds: tuple[tuple[str, dict[str, Any], TrainingSettings], ...] = (
        ("residual", {"name": "residual_cnn", "widths": [8, 16], "blocks": 1}, _NORMED),
        ("vgg", {"name": "vgg", "widths": [8, 16], "hidden": 48}, _NORMED),
        ("lenet5", {"name": "lenet5", "widths": [8, 16, 64]}, _DENSE),
        ("inverted", {"name": "inverted_cnn", "widths": [8, 16]}, _NORMED),
        ("mixer", {"name": "mixer", "width": 48, "blocks": 2, "patch": 8}, _ATTENTION),
    )
    return tuple(_member(name, model, dense, 1000 + index) for index, (name, model, dense) in enumerate(builds))
