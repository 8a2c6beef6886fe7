"""The activations that an operation may end in, in torch's own functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

SLOPES = (0.001, 0.01, 0.1, 0.2)
"""Of the leaky ReLUs below zero: what models use, a name each, such as ``leaky_relu_0.01``."""

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    **{f"leaky_relu_{slope}": partial(F.leaky_relu, negative_slope=slope) for slope in SLOPES},
}

KEEPS_ZERO = (
    "relu", "relu6", "silu", "gelu", "gelu_tanh", "tanh", "hardswish", *(f"leaky_relu_{slope}" for slope in SLOPES)
)  # fmt: skip
"""Activations of which zero is zero."""


def activate(x: Tensor, name: str | None) -> Tensor:
    """Applies the activation called `name`; none when None."""
    return x if name is None else ACTIVATIONS[name](x)
