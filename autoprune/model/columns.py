"""A layer as a matrix product: the columns its weight multiplies, convolution or not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from autoprune.model.uses import Use

CHUNK = 1 << 23  # numbers unfolded at a time


def input_columns(use: Use, x: Tensor) -> Iterator[Tensor]:
    """What each row of the weight is multiplied with, some samples at a time.

    Args:
        use: of the weight, by a product of matrices, a conv1d or a conv2d.
        x: its input, ``(samples, ...)``.

    Yields:
        ``(samples, conv_groups, in / conv_groups * kh * kw, positions)``, in the weight's order.
    """
    if use.kind == "linear":
        for part in x.split(max(1, CHUNK * len(x) // max(1, x.numel()))):
            yield _rows(part)
        return
    kernel, stride, padding, dilation = use.window
    x = x.unsqueeze(2) if use.kind == "conv1d" else x
    for part in x.split(max(1, CHUNK * len(x) // max(1, x.numel() * kernel[0] * kernel[1]))):
        unfolded = functional.unfold(part, kernel, dilation=dilation, padding=padding, stride=stride)
        yield unfolded.unflatten(1, (use.conv_groups, unfolded.shape[1] // use.conv_groups))


def output_rows(use: Use, y: Tensor) -> Tensor:
    """The output, or its gradient, ``(samples, conv_groups, out / conv_groups, positions)``."""
    if use.kind == "linear":
        return _rows(y)
    return y.reshape(len(y), use.conv_groups, y.shape[1] // use.conv_groups, y.shape[2:].numel())


def _rows(values: Tensor) -> Tensor:
    """``(samples, ..., n)`` as ``(samples, 1, n, positions)``; there may be no sample."""
    positions = values.shape[1:-1].numel()
    return values.reshape(len(values), positions, values.shape[-1]).transpose(1, 2)[:, None]


def joined(values: Tensor) -> Tensor:
    """``(samples, conv_groups, n, positions)`` as ``(conv_groups, n, samples * positions)``."""
    return values.permute(1, 2, 0, 3).flatten(2)


def input_moments(use: Use, x: Tensor) -> Tensor:
    """Sum over samples and positions of ``c c^T``, for columns c: ``(conv_groups, columns, columns)``, float64."""
    columns = (joined(part) for part in input_columns(use, x))
    return torch.stack([(c @ c.transpose(1, 2)).double() for c in columns]).sum(0)


def squared_gradients(use: Use, x: Tensor, gradient: Tensor) -> Tensor:
    """Sum over samples of the squared gradient of the weight, in its shape.

    Args:
        use: of the weight, by a product of matrices, a conv1d or a conv2d.
        x: its input, ``(samples, ...)``.
        gradient: of its output, likewise.
    """
    rows, done = output_rows(use, gradient), 0
    total = torch.zeros(use.weight.shape)
    for columns in input_columns(use, x):
        for sample in columns:
            total += (rows[done] @ sample.transpose(1, 2)).square().reshape(total.shape)
            done += 1
    return total
