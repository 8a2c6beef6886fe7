"""A layer as a matrix product: the columns its weight multiplies, convolution or not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.model.inventory import conv_padding

CHUNK = 1 << 23  # numbers unfolded at a time


def input_columns(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """What each row of the weight is multiplied with, some samples at a time.

    Args:
        module: a Conv2d or Linear.
        x: its input, ``(samples, ...)``.

    Yields:
        ``(samples, conv_groups, in / conv_groups * kh * kw, positions)``, in the weight's order.
    """
    if not isinstance(module, nn.Conv2d):
        for part in x.split(max(1, CHUNK * len(x) // max(1, x.numel()))):
            yield part.reshape(len(part), -1, x.shape[-1]).transpose(1, 2)[:, None]
        return
    kernel = module.kernel_size[0] * module.kernel_size[1]
    for part in x.split(max(1, CHUNK * len(x) // max(1, x.numel() * kernel))):
        unfolded = functional.unfold(
            part, module.kernel_size, dilation=module.dilation, padding=conv_padding(module), stride=module.stride
        )
        yield unfolded.reshape(len(part), module.groups, -1, unfolded.shape[-1])


def output_rows(module: nn.Module, y: Tensor) -> Tensor:
    """A layer's output, or its gradient, ``(samples, conv_groups, out / conv_groups, positions)``."""
    if not isinstance(module, nn.Conv2d):
        return y.reshape(len(y), -1, y.shape[-1]).transpose(1, 2)[:, None]
    return y.reshape(len(y), module.groups, y.shape[1] // module.groups, -1)


def joined(values: Tensor) -> Tensor:
    """``(samples, conv_groups, n, positions)`` as ``(conv_groups, n, samples * positions)``."""
    return values.permute(1, 2, 0, 3).flatten(2)


def input_moments(module: nn.Module, x: Tensor) -> Tensor:
    """Sum over samples and positions of ``c c^T``, for columns c: ``(conv_groups, columns, columns)``, float64."""
    columns = (joined(part) for part in input_columns(module, x))
    return torch.stack([(c @ c.transpose(1, 2)).double() for c in columns]).sum(0)


def squared_gradients(module: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
    """Sum over samples of the squared gradient of the weight, in its shape.

    Args:
        module: a Conv2d or Linear.
        x: its input, ``(samples, ...)``.
        gradient: of its output.
    """
    rows, done = output_rows(module, gradient), 0
    weight = module.weight
    assert isinstance(weight, Tensor)
    total = weight.new_zeros(weight.shape)
    for columns in input_columns(module, x):
        for sample in columns:
            total += (rows[done] @ sample.transpose(1, 2)).square().reshape(weight.shape)
            done += 1
    return total
