"""Inputs like the examples, of other values and extents: what a repacked model is compared with the original on.

Two inputs that were one tensor when the model was captured, or an extent that equalled another by chance, show only
where they differ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from autoprune.errors import AutopruneError
from autoprune.model.copies import has_memory
from autoprune.repack.outputs import same_output

Shapes = Sequence[tuple[int, ...]]
SEEDS = 2  # a model that decides by a threshold may tip over in one draw, but hardly in all


def agrees(
    original: Callable[..., Any],
    made: Callable[..., Any],
    inputs: tuple[Any, ...],
    shapes: Shapes | None = None,
    same: Callable[[Any, Any], bool] = same_output,
) -> bool | None:
    """Whether `made` computes what `original` does for other values than the examples'.

    Args:
        original: the model, in eval mode.
        made: called like it.
        inputs: the examples.
        shapes: of the inputs to try; those of the examples when None.
        same: whether what `made` gives, its first argument, is what was wanted.

    Returns:
        None where the original takes no inputs of these shapes.
    """
    for seed in range(SEEDS):
        tried = _tried(original, inputs, shapes, seed)
        if tried is None:
            return None
        given, wanted = tried
        try:
            with torch.inference_mode():
                if same(made(*fresh(given)), wanted):
                    return True
        except AutopruneError:  # what is made cannot, and the original can
            return False
    return False


def fresh(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies: a model may change what it is given."""
    return tuple(x.detach().clone() if isinstance(x, Tensor) else copy.deepcopy(x) for x in inputs)


def probes(inputs: tuple[Any, ...], shapes: Shapes | None = None, seed: int = 0) -> Iterator[tuple[Any, ...]]:
    """Inputs of `shapes`: of drawn values, then of the examples' own in another order, then in their own.

    The first tell most; a model that indexes, sorts or divides by what it is given may take the later ones alone.
    What is no dense tensor stays as it is.
    """
    wanted = shapes or [tuple(x.shape) if has_memory(x) else () for x in inputs]
    generator = torch.Generator().manual_seed(seed)

    def plain(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return _repeated(x, shape)

    def turned(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return _repeated(x.flip(0) if x.dim() else x, shape)

    def drawn(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return _drawn(x, shape, generator)

    for make in (drawn, turned, plain):
        yield tuple(
            make(x.detach(), shape) if has_memory(x) else fresh((x,))[0]
            for x, shape in zip(inputs, wanted, strict=True)
        )


def _tried(
    original: Callable[..., Any], inputs: tuple[Any, ...], shapes: Shapes | None, seed: int
) -> tuple[tuple[Any, ...], Any] | None:
    """The first probe that the model takes, and what it gives."""
    for given in probes(inputs, shapes, seed):
        try:
            with torch.inference_mode():
                return given, original(*fresh(given))
        except Exception:  # the model is the user's: it may raise anything for values it does not take
            continue
    return None


def _repeated(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The entries of `x`, along every axis from the beginning again where it ends."""
    for axis, extent in enumerate(shape):
        if extent != x.shape[axis]:
            if not x.shape[axis]:
                return x.new_zeros(shape)
            x = x.index_select(axis, torch.arange(extent) % x.shape[axis])
    return x.clone()


def _drawn(x: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Entries of `x` by chance: such values the model takes. Where all are one value, others near it."""
    if not x.numel():
        return _near(x.new_zeros(shape), generator) if x.is_floating_point() else x.new_zeros(shape)
    flat = x.reshape(-1)
    made = flat[torch.randint(len(flat), shape, generator=generator)]
    if bool((flat == flat[0]).all()) and bool(flat[0].isfinite()):
        made = _near(made, generator)
    if x.dim() and (x.dtype == torch.bool or not bool(x.isfinite().all())):
        made[..., :1] = _repeated(x, shape)[..., :1]  # a mask that leaves nothing would hide everything
    return made


def _near(x: Tensor, generator: torch.Generator) -> Tensor:
    by_chance = torch.rand(x.shape, generator=generator)
    if x.dtype == torch.bool:
        return x ^ (by_chance < 0.25)
    if x.is_floating_point() or x.is_complex():
        return x + (x.abs() + (x == 0)) * (by_chance - 0.5).to(x.dtype)
    return torch.where(by_chance < 0.5, x, torch.where(x > 0, x - 1, x + 1))
