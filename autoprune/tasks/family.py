"""A distribution of small tasks that one policy is trained on, and the tasks it is judged by.

What is judged is of builds that are never drawn to train on: learning them by heart does not help.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoprune.errors import ConfigError, did_you_mean
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings

_FASHION = {"train_samples": 5_000, "validation_samples": 1_000, "batch_size": 64}
_ATTENTION = TrainingSettings(epochs=8, learning_rate=2e-3, optimizer="adamw", weight_decay=0.01, warmup=0.1)
_DENSE = TrainingSettings(epochs=5, learning_rate=0.02, warmup=0.1, clip_norm=1.0)  # without a batch norm
_NORMED = TrainingSettings(epochs=5, learning_rate=0.1, warmup=0.1)
_RECURRENT = TrainingSettings(
    epochs=8, learning_rate=3e-3, optimizer="adamw", weight_decay=0.01, warmup=0.1, clip_norm=1.0
)


@dataclass(frozen=True)
class Member:
    """A task of the family and how its dense model is trained."""

    name: str
    task: Choice
    dense: TrainingSettings


Draw = Callable[[np.random.Generator], tuple[dict[str, Any], TrainingSettings]]


def _rising(draws: np.random.Generator, first: tuple[int, int], count: int) -> list[int]:
    """Widths that grow by 1 to 2 times a stage, multiples of 4."""
    widths = [float(draws.integers(*first))]
    for _ in range(count - 1):
        widths.append(widths[-1] * draws.uniform(1.1, 2.1))
    return [max(8, round(width / 4) * 4) for width in widths]


def _residual(draws: np.random.Generator) -> tuple[dict[str, Any], TrainingSettings]:
    widths = _rising(draws, (8, 16), int(draws.integers(2, 4)))
    return {"name": "residual_cnn", "widths": widths, "blocks": int(draws.integers(1, 3))}, _NORMED


def _plain(draws: np.random.Generator) -> tuple[dict[str, Any], TrainingSettings]:
    return {"name": "plain_cnn", "widths": _rising(draws, (12, 28), int(draws.integers(3, 6)))}, _NORMED


def _depthwise(draws: np.random.Generator) -> tuple[dict[str, Any], TrainingSettings]:
    return {"name": "depthwise_cnn", "widths": _rising(draws, (16, 37), int(draws.integers(3, 5)))}, _NORMED


def _mlp(draws: np.random.Generator) -> tuple[dict[str, Any], TrainingSettings]:
    widths = sorted((int(draws.integers(8, 33)) * 16 for _ in range(int(draws.integers(2, 5)))), reverse=True)
    return {"name": "mlp", "widths": widths}, _DENSE


def _encoder(draws: np.random.Generator) -> tuple[dict[str, Any], TrainingSettings]:
    width, blocks = int(draws.integers(10, 19)) * 16, int(draws.integers(1, 4))
    return {"name": "tiny_transformer", "width": width, "blocks": blocks, "heads": 2}, _ATTENTION


_IMAGES: Mapping[str, Draw] = {
    "residual": _residual,
    "plain": _plain,
    "depthwise": _depthwise,
    "mlp": _mlp,
    "encoder": _encoder,
}
DATA = ("digits", "fashion_mnist", "spoken_digits")
_DIGITS_EPOCHS = 2  # as many times more: an epoch of digits is short


def _image_member(name: str, data: str, model: dict[str, Any], dense: TrainingSettings, seed: int) -> Member:
    if model["name"] in ("tiny_transformer", "mixer"):
        model = {**model, "patch": 8 if data == "digits" else 7}
    if data == "digits":
        dense = dense.changed({"epochs": dense.epochs * _DIGITS_EPOCHS})
        return Member(name, Choice("digits", {"model": model, "seed": seed}), dense)
    return Member(name, Choice("fashion_mnist", {"model": model, **_FASHION, "seed": seed}), dense)


def draw_members(count: int, seed: int, data: tuple[str, ...] = DATA) -> tuple[Member, ...]:
    """`count` tasks to train on: kinds of models and kinds of data in turn, widths and depths at random.

    Raises:
        ConfigError: `data` names what the family has no tasks of.
    """
    for name in data:
        if name not in DATA:
            raise ConfigError(f"the family has no tasks of {name!r}. {did_you_mean(name, DATA)}")
    images = [name for name in data if name != "spoken_digits"]
    members: list[Member] = []
    for index in range(count):
        draws = np.random.default_rng([seed, index])
        if "spoken_digits" in data and (index % 8 == 7 or not images):
            cell, hidden = ("lstm", "gru")[index // 8 % 2], int(draws.integers(10, 17)) * 16
            args = {"cell": cell, "hidden": hidden, "layers": 1 + index // 16 % 2, "seed": index}
            members.append(Member(f"{index:02d}-spoken-{cell}", Choice("spoken_digits", args), _RECURRENT))
            continue
        kind = list(_IMAGES)[index % len(_IMAGES)]
        model, dense = _IMAGES[kind](draws)
        source = images[index // len(_IMAGES) % len(images)]
        members.append(_image_member(f"{index:02d}-{source.partition('_')[0]}-{kind}", source, model, dense, index))
    return tuple(members)


def held_out_members(data: tuple[str, ...] = DATA) -> tuple[Member, ...]:
    """Tasks to judge by, of builds that `draw_members` never draws."""
    images: tuple[tuple[str, str, dict[str, Any], TrainingSettings], ...] = (
        ("fashion-vgg", "fashion_mnist", {"name": "vgg", "widths": [12, 24, 40], "hidden": 96}, _NORMED),
        ("fashion-inception", "fashion_mnist", {"name": "inception", "widths": [18, 36, 60]}, _NORMED),
        ("fashion-inverted", "fashion_mnist", {"name": "inverted_cnn", "widths": [12, 20, 32]}, _NORMED),
        ("fashion-lenet5", "fashion_mnist", {"name": "lenet5", "widths": [16, 32, 160]}, _DENSE),
        ("fashion-mixer", "fashion_mnist", {"name": "mixer", "width": 192, "blocks": 3}, _ATTENTION),
        ("digits-resnet20", "digits", {"name": "resnet20"}, _NORMED),
        ("digits-vgg", "digits", {"name": "vgg", "widths": [16, 24], "hidden": 64}, _NORMED),
        ("digits-inception", "digits", {"name": "inception", "widths": [15, 30]}, _NORMED),
    )
    members = [_image_member(*row, seed=1000 + index) for index, row in enumerate(images) if row[1] in data]
    if "spoken_digits" in data:
        args = {"cell": "lstm", "hidden": 160, "bidirectional": True, "layers": 2, "seed": 1008}
        members.append(Member("spoken-bidirectional", Choice("spoken_digits", args), _RECURRENT))
    return tuple(members)
