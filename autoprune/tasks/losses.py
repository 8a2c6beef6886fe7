"""The losses that a config names, as ``loss(model(*inputs), target)``. One function and one row a loss.

A model's output may be nested: its `prediction` is what counts. Targets below 0 of class indices are ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from autoprune.errors import AutopruneError
from autoprune.masks import Loss
from autoprune.model.arguments import inside, prediction
from autoprune.model.classes import class_axis
from autoprune.model.given import kind
from autoprune.registry import Registry

LOSSES: Registry[Loss] = Registry(
    "loss",
    {
        "cross_entropy": "autoprune.tasks.losses:cross_entropy",
        "mse": "autoprune.tasks.losses:mse",
        "l1": "autoprune.tasks.losses:l1",
        "huber": "autoprune.tasks.losses:huber",
        "bce_with_logits": "autoprune.tasks.losses:bce_with_logits",
        "model": "autoprune.tasks.losses:model",
        "none": "autoprune.tasks.losses:none",
    },
)


def loss_named(name: str) -> Loss:
    """A row of the registry; raises ConfigError with the nearest name on a miss."""
    return cast("Loss", LOSSES.get(name))


def cross_entropy(output: Any, target: Tensor) -> Tensor:
    """Of class indices, integers, from logits with one more axis, the classes: see `class_axis`."""
    logits, indices = class_logits("cross_entropy", output, target)
    return functional.cross_entropy(logits, torch.where(indices < 0, -100, indices))


def mse(output: Any, target: Tensor) -> Tensor:
    """The mean square of the error; the target is of the output's shape, or lacks its last axis of 1."""
    return _elementwise(functional.mse_loss, "mse", output, target)


def l1(output: Any, target: Tensor) -> Tensor:
    """The mean absolute error; shapes as of `mse`."""
    return _elementwise(functional.l1_loss, "l1", output, target)


def huber(output: Any, target: Tensor) -> Tensor:
    """Half the square of errors below 1, linear beyond; shapes as of `mse`."""
    return _elementwise(functional.huber_loss, "huber", output, target)


def bce_with_logits(output: Any, target: Tensor) -> Tensor:
    """Several labels a sample, each 0 or 1, from a logit each; shapes as of `mse`."""
    return _elementwise(functional.binary_cross_entropy_with_logits, "bce_with_logits", output, target)


def model(output: Any, target: Any) -> Tensor:
    """The model's own loss: what its output holds at ``loss``, for models that are given their target."""
    own = (inside(output) or {}).get("loss")
    if not isinstance(own, Tensor):
        raise AutopruneError(
            "the loss 'model' is the loss in the model's output, as output.loss or output['loss'], which "
            f"{kind(output)} has not: name another loss."
        )
    return own


def none(output: Any, target: Tensor) -> Tensor:
    """How far the output is from the dense model's, which is the target: the square of the error over its variance."""
    return mse(output, target) / target.float().var(correction=0).clamp(min=1e-12)


def alike(output: Any, target: Any) -> tuple[Tensor, Tensor] | None:
    """The prediction and the target in one shape and type, where they can be; a last axis of 1 may be left out."""
    value = prediction(output)
    if not isinstance(value, Tensor) or not isinstance(target, Tensor):
        return None
    if value.shape == (*target.shape, 1):
        value = value.squeeze(-1)
    elif target.shape == (*value.shape, 1):
        target = target.squeeze(-1)
    return (value, target.to(value.dtype)) if value.shape == target.shape else None


def alike_for(name: str, output: Any, target: Any) -> tuple[Tensor, Tensor]:
    """`alike`; raises AutopruneError where the loss or evaluation of this name cannot take them."""
    both = alike(output, target)
    if both is None:
        raise AutopruneError(
            f"{name} takes targets of the output's shape; targets are {described_tensor(target)}, the model gave "
            f"{described_tensor(prediction(output))}."
        )
    return both


def class_logits(name: str, output: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Logits (samples, classes) and class indices (samples,) of a prediction and its target.

    Raises:
        AutopruneError: the loss or evaluation of this name cannot take them.
    """
    logits = prediction(output)
    axis = class_axis(logits, target) if isinstance(logits, Tensor) else None
    if axis is None:
        raise AutopruneError(
            f"{name} takes class indices, integers, and logits of their shape and one more axis, the classes; targets "
            f"are {described_tensor(target)}, the model gave {described_tensor(logits)}."
        )
    return logits.movedim(axis, -1).flatten(0, -2), target.long().flatten()


def described_tensor(value: Any) -> str:
    """A tensor's shape and type, or the type of what is none."""
    if not isinstance(value, Tensor):
        return kind(value)
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def _elementwise(loss: Callable[[Tensor, Tensor], Tensor], name: str, output: Any, target: Any) -> Tensor:
    return loss(*alike_for(name, output, target))
