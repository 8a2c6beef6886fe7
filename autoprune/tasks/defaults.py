"""Which loss and evaluation fit a model and its data, where nobody names them: told by the first batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.model.arguments import Arguments, call_with, inside, prediction
from autoprune.model.classes import IMAGE, class_axis
from autoprune.model.given import TARGETS
from autoprune.model.inventory import eval_mode
from autoprune.tasks.losses import alike, cross_entropy, described_tensor, loss_named

_SAME = 1e-3  # of two losses, relative: sums in another order


@dataclass(frozen=True)
class First:
    """The first batch of a model's training data, and what the model says to it in eval mode."""

    inputs: Any
    target: Any
    output: Any
    own_loss: Tensor | None = None  # of models that are given their target, and return a loss

    @property
    def prediction(self) -> Any:
        return prediction(self.output)


@dataclass(frozen=True)
class Fit:
    """A row of a registry, or a user's function, and why it was taken where nobody named it."""

    name: str
    why: str | None = None

    def __str__(self) -> str:
        return self.name if self.why is None else f"{self.name}, as {self.why}"


def first_of(model: nn.Module, inputs: Any, target: Any) -> First:
    """Runs the model on the first batch, and a second time with its target where it takes one."""
    with eval_mode(model), torch.inference_mode():
        output = call_with(model, inputs)
        own = None
        if target is not None and isinstance(inputs, Mapping) and target_argument(model) is not None:
            held = inside(call_with(model, with_target(model, inputs, target))) or {}
            own = held.get("loss") if isinstance(held.get("loss"), Tensor) else None
    return First(inputs, target, output, own)


def target_argument(model: nn.Module) -> str | None:
    """What the model calls its target, where it is given one to compute its loss."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in TARGETS if name in parameters), None)


def with_target(model: nn.Module, inputs: Any, target: Any) -> Arguments:
    """The inputs with the target among them.

    Raises:
        AutopruneError: the model takes none.
    """
    name, given = target_argument(model), Arguments.of(inputs)
    if name is None:
        raise AutopruneError(
            "the loss 'model' needs a model that is given its target: its forward has no argument "
            f"{' or '.join(TARGETS)}. Name another loss."
        )
    return Arguments(*given.args, **given.kwargs, **{name: target})


def next_tokens(target: Tensor) -> Tensor:
    """Targets (N, T) of a model that shifts them itself: at each place the token after it, none at the last."""
    return torch.cat([target[:, 1:], torch.full_like(target[:, :1], -100)], dim=1)


def shifts_targets(first: First) -> bool:
    """Whether the model's own loss is of the next token, as that of causal language models of Hugging Face is."""
    target, output = first.target, first.prediction
    if first.own_loss is None or not isinstance(target, Tensor) or target.dim() != 2 or target.shape[1] < 2:
        return False
    if not isinstance(output, Tensor) or class_axis(output, target) is None:
        return False
    own = float(first.own_loss)
    plain, shifted = (float(cross_entropy(output, y)) for y in (target, next_tokens(target)))
    return _close(own, shifted) and not _close(own, plain)


def fitting_loss(first: First) -> Fit:
    """The loss of the registry for a model's first batch.

    Raises:
        AutopruneError: it cannot be told.
    """
    target, output = first.target, first.prediction
    if target is None:
        return Fit("none", "the data has no targets")
    if first.own_loss is not None:
        for name in ("cross_entropy", "mse", "bce_with_logits"):
            if (value := _loss_of(name, first)) is not None and _close(float(first.own_loss), value):
                return Fit(name, "that is the model's own loss")
        return Fit("model", "the model gives a loss of its own")
    if not isinstance(target, Tensor) or not isinstance(output, Tensor):
        raise AutopruneError(f"targets are {described_tensor(target)}, the model gives {described_tensor(output)}")
    both = alike(output, target)
    if both is not None and (target.is_floating_point() or target.dtype == torch.bool):
        if not _are_labels(target) or (target.is_floating_point() and _all_alike(target)):
            return Fit("mse", f"targets are {described_tensor(target)}, as the output is")
        if bool(((both[0] >= 0) & (both[0] <= 1)).all()):
            raise AutopruneError(
                "targets are labels of 0 and 1, and all outputs lie between 0 and 1, as behind a sigmoid. Give a model "
                "of logits, without it, or name the loss (task.loss, --loss): 'mse', or a function of your own"
            )
        return Fit("bce_with_logits", "targets are labels of 0 and 1, of the output's shape")
    if class_axis(output, target) is not None:
        return Fit("cross_entropy", f"targets are class indices, {described_tensor(target)}")
    raise AutopruneError(f"targets are {described_tensor(target)}, the model gives {described_tensor(output)}")


def fitting_evaluation(first: First) -> Fit:
    """The evaluation of the registry for a model's first batch: nearness to the dense model where no other fits."""
    target, output = first.target, first.prediction
    if isinstance(target, Tensor) and isinstance(output, Tensor):
        axis = class_axis(output, target)
        both = alike(output, target)
        if axis == 1 and output.dim() >= IMAGE:
            return Fit("iou", "there is a class for every place")
        if axis is not None:
            predicts = target.dim() == 2 and _are_next_tokens(first.inputs, target)
            return Fit("bits", "targets are the next tokens") if predicts else Fit("accuracy", "targets are classes")
        if both is not None and _are_labels(target) and (not target.is_floating_point() or not _all_alike(target)):
            one = both[1].dim() < 2 or both[1].shape[1] == 1
            return Fit("accuracy", "there is one label") if one else Fit("f1", "there are several labels a sample")
        if both is not None:
            return Fit("mse", "targets are of the output's shape")
    return Fit("fidelity", "no metric fits the targets: it is how near the dense model's output a model is")


def _loss_of(name: str, first: First) -> float | None:
    try:
        return float(loss_named(name)(first.output, first.target))
    except (AutopruneError, RuntimeError):
        return None


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= _SAME * max(abs(one), abs(other), _SAME)


def _are_labels(target: Tensor) -> bool:
    return bool(((target == 0) | (target == 1)).all())


def _all_alike(target: Tensor) -> bool:
    return bool((target == target.flatten()[:1]).all())


def _are_next_tokens(inputs: Any, target: Tensor) -> bool:
    """Whether some input holds the targets, one place later."""
    told = target[:, :-1] >= 0
    return any(
        x.shape == target.shape and not x.is_floating_point() and torch.equal(x[:, 1:][told], target[:, :-1][told])
        for x in Arguments.of(inputs).tensors
    )
