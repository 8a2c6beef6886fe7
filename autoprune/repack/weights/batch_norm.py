"""A batch norm in eval mode as what it multiplies and adds, and that in the weights of the layer before it."""

from __future__ import annotations

import torch
from torch import Tensor


def affine(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies each channel by and adds.

    Args:
        mean: its running mean, ``(channels,)``.
        variance: its running variance, likewise.
        weight: its scale, likewise; None where it has none.
        bias: likewise.
        eps: added to the variance.

    Returns:
        Scale and shift in float64, ``(channels,)``.
    """
    scale = torch.rsqrt(variance.double() + eps)
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    return scale, shift if bias is None else shift + bias.double()


def folded(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight ``(filters, ...)`` and bias of a layer whose filters are scaled and shifted; zeros stay zeros."""
    moved = shift if bias is None else bias.double() * scale + shift
    scaled = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return scaled.to(weight.dtype), moved.to(weight.dtype)
