"""The model zoo: a file a family, a row an image classifier.

`standard` gives the published ones at their published shapes, ready to be timed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

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
        "resnet18": "autoprune.tasks.zoo.resnet:resnet18",
        "resnet20": "autoprune.tasks.zoo.resnet:resnet20",
        "resnet50": "autoprune.tasks.zoo.resnet:resnet50",
        "mobilenet_v2": "autoprune.tasks.zoo.mobilenet:mobilenet_v2",
        "vit_small": "autoprune.tasks.zoo.transformer:vit_small",
    },
)


def build_model(
    name: str, args: Mapping[str, Any], *, in_channels: int, size: int, classes: int, seed: int
) -> nn.Module:
    """Builds the zoo's model called `name` for ``(batch, in_channels, size, size)`` images, initialised from `seed`.

    Raises:
        ConfigError: unknown model, or an argument it does not take.
    """
    data = {"in_channels": in_channels, "classes": classes}
    if "size" in inspect.signature(MODELS.get(name)).parameters:  # convolutions take any size
        data["size"] = size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS.create(Choice(name, {**args, **data}))


def model_args(widths: Sequence[int] | None, blocks: int | None) -> dict[str, Any]:
    """The arguments that were given; a model that lacks one refuses it."""
    given = {"widths": widths, "blocks": blocks}
    return {name: value for name, value in given.items() if value is not None}


__all__ = ["MODELS", "build_model", "model_args", "positive"]
