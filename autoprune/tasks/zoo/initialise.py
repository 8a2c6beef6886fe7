"""First weights, and norms that look as if they had been trained."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def he_(model: Model) -> Model:
    """Draws every convolution from He's normal distribution (He et al. 2015), in place; biases become 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def randomise_norms_(model: Model, seed: int) -> Model:
    """Gives every batch and layer norm an affine map, and batch norms running statistics, drawn from `seed`, in place.

    A new norm is close to the identity, so a mistake in folding one would not show.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(size: int) -> torch.Tensor:
        return 0.1 * torch.randn(size, generator=generator)

    def scale(size: int) -> torch.Tensor:
        return 0.5 + torch.rand(size, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                continue
            module.weight.copy_(scale(module.weight.numel()))
            module.bias.copy_(normal(module.bias.numel()))
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.copy_(normal(module.num_features))
                module.running_var.copy_(scale(module.num_features))
    return model
