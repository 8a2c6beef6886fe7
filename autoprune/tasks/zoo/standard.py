"""Standard models at their published shapes with random weights: what engines are timed and tested on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.errors import ConfigError, did_you_mean
from autoprune.tasks.zoo.initialise import randomise_norms_
from autoprune.tasks.zoo.mobilenet import mobilenet_v2
from autoprune.tasks.zoo.resnet import resnet18, resnet20, resnet50
from autoprune.tasks.zoo.transformer import WORDS, bert_mini, vit_small


@dataclass(frozen=True)
class Standard:
    """One model, and the shape of one of its inputs: an image, or `words` below this many in a row."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    words: int | None = None


STANDARD = {
    "resnet18": Standard(resnet18, (3, 224, 224)),
    "resnet50": Standard(resnet50, (3, 224, 224)),
    "mobilenet_v2": Standard(mobilenet_v2, (3, 224, 224)),
    "resnet20": Standard(resnet20, (3, 32, 32)),
    "vit_small": Standard(vit_small, (3, 224, 224)),
    "bert_mini": Standard(bert_mini, (128,), WORDS),
}


def standard_model(name: str, seed: int = 0) -> nn.Module:
    """The model called `name` in eval mode, weights and norms drawn from `seed`.

    Raises:
        ConfigError: unknown model.
    """
    standard = _get(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise_norms_(standard.build(), seed).eval()


def standard_input(name: str, batch: int, seed: int = 0) -> Tensor:
    """What the model called `name` is given: float32 images (batch, 3, H, W), or int64 word numbers (batch, tokens).

    Raises:
        ConfigError: unknown model.
    """
    standard = _get(name)
    generator, shape = torch.Generator().manual_seed(seed), (batch, *standard.shape)
    if standard.words is None:
        return torch.randn(shape, generator=generator)
    return torch.randint(standard.words, shape, generator=generator)


def _get(name: str) -> Standard:
    if name not in STANDARD:
        raise ConfigError(f"unknown standard model {name!r}. {did_you_mean(name, STANDARD)}")
    return STANDARD[name]
