"""The model zoo: a file a family, a row a model of images, of sequences or of text.

`standard` gives the published ones at their published shapes, ready to be timed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from autoprune.errors import ConfigError
from autoprune.registry import Choice, Registry
from autoprune.tasks.zoo.arguments import positive

MODELS: Registry[nn.Module] = Registry(
    "model",
    {
        "residual_cnn": "autoprune.tasks.zoo.small:residual_cnn",
        "plain_cnn": "autoprune.tasks.zoo.small:plain_cnn",
        "lenet5": "autoprune.tasks.zoo.small:lenet5",
        "mlp": "autoprune.tasks.zoo.small:mlp",
        "tiny_transformer": "autoprune.tasks.zoo.small:tiny_transformer",
        "depthwise_cnn": "autoprune.tasks.zoo.varied:depthwise_cnn",
        "inverted_cnn": "autoprune.tasks.zoo.varied:inverted_cnn",
        "vgg": "autoprune.tasks.zoo.varied:vgg",
        "inception": "autoprune.tasks.zoo.varied:inception",
        "mixer": "autoprune.tasks.zoo.varied:mixer",
        "resnet18": "autoprune.tasks.zoo.resnet:resnet18",
        "resnet20": "autoprune.tasks.zoo.resnet:resnet20",
        "resnet50": "autoprune.tasks.zoo.resnet:resnet50",
        "mobilenet_v2": "autoprune.tasks.zoo.mobilenet:mobilenet_v2",
        "vit_small": "autoprune.tasks.zoo.transformer:vit_small",
        "lstm_classifier": "autoprune.tasks.zoo.recurrent:lstm_classifier",
        "char_lstm": "autoprune.tasks.zoo.recurrent:char_lstm",
    },
)


def build_model(
    name: str, args: Mapping[str, Any], *, in_channels: int, size: int, classes: int, seed: int
) -> nn.Module:
    """Builds the zoo's model called `name` for ``(batch, in_channels, size, size)`` images, initialised from `seed`.

    Raises:
        ConfigError: unknown model, one that is not of images, or an argument it does not take.
    """
    return _build(name, args, {"in_channels": in_channels, "size": size, "classes": classes}, seed, "images")


def build_sequence_model(name: str, args: Mapping[str, Any], *, features: int, classes: int, seed: int) -> nn.Module:
    """Builds the zoo's model called `name` for padded ``(batch, steps, features)`` and lengths, like `build_model`."""
    return _build(name, args, {"features": features, "classes": classes}, seed, "sequences")


def build_text_model(name: str, args: Mapping[str, Any], *, characters: int, seed: int) -> nn.Module:
    """Builds the zoo's model called `name` for characters ``(batch, steps)`` as int64, like `build_model`."""
    return _build(name, args, {"characters": characters}, seed, "text")


def _build(name: str, args: Mapping[str, Any], data: Mapping[str, int], seed: int, kind: str) -> nn.Module:
    """What a model is told of its `data`, of this `kind`, says which models are made for it."""
    if not _fits(name, data):
        fitting = ", ".join(model for model in MODELS if _fits(model, data))
        raise ConfigError(f"model {name!r} is not one of {kind}. Those of {kind}: {fitting}.")
    taken = inspect.signature(MODELS.get(name)).parameters
    told = {key: value for key, value in data.items() if key in taken}  # convolutions take images of any size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS.create(Choice(name, {**args, **told}))


def _fits(name: str, data: Mapping[str, int]) -> bool:
    parameters = inspect.signature(MODELS.get(name)).parameters
    return _INPUTS & parameters.keys() <= data.keys()


_INPUTS = {"in_channels", "features", "characters"}  # what one item of an input is made of


def image_model(
    model: str | Mapping[str, Any], widths: Sequence[int] | None, blocks: int | None
) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a task's model: a name, or a table of it and its arguments, and what is set apart.

    Raises:
        ConfigError: the table has no name, or an argument is given twice.
    """
    choice = Choice.of(model)
    given = {name: value for name, value in {"widths": widths, "blocks": blocks}.items() if value is not None}
    if twice := sorted(given.keys() & choice.args.keys()):
        raise ConfigError(f"{twice[0]} is given twice: with the model's arguments and beside them.")
    return choice.name, {**choice.args, **given}


__all__ = ["MODELS", "build_model", "build_sequence_model", "build_text_model", "image_model", "positive"]
