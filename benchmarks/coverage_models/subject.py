"""A model of somebody else's, and how its users call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.model.arguments import Arguments


@dataclass(frozen=True)
class Subject:
    """A model and its calls.

    Attributes:
        model: with random weights, in eval mode.
        call: as its users call it, with one sample.
        batch: the same with two samples; None where there are no samples.
        size: the same with another image size or sequence length; None where the model is made for one.
    """

    model: nn.Module
    call: Arguments
    batch: Arguments | None
    size: Arguments | None


def of_images(model: nn.Module, size: tuple[int, ...], other: tuple[int, ...] | None) -> Subject:
    """A model of one tensor.

    Args:
        model: any.
        size: its extents without the batch, e.g. ``(3, 224, 224)``.
        other: likewise, the other size.
    """
    sizes = [(1, *size), (2, *size), *([(1, *other)] if other else [])]
    call, batch, *rest = (Arguments(torch.randn(each)) for each in sizes)
    return Subject(model.eval(), call, batch, rest[0] if rest else None)


def of_tokens(
    model: nn.Module, vocabulary: int, tokens: int, other: int | None, arguments: Callable[[Tensor], Arguments]
) -> Subject:
    """A model of token numbers.

    Args:
        model: any.
        vocabulary: how many tokens there are.
        tokens: of the sequence.
        other: of the other sequence.
        arguments: the call with token numbers ``(batch, tokens)``.
    """
    sizes = [(1, tokens), (2, tokens), *([(1, other)] if other else [])]
    call, batch, *rest = (arguments(torch.randint(vocabulary, each)) for each in sizes)
    return Subject(model.eval(), call, batch, rest[0] if rest else None)
