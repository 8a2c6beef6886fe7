"""A user's model, batches and loss, tried once before anything that takes long."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, IterableDataset

from autoprune.errors import AutopruneError, ConfigError
from autoprune.masks import Batches, Loss
from autoprune.model.arguments import Arguments, call_with
from autoprune.model.inventory import weighted_layers


def kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def told(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def first_pair(what: str, batches: Any) -> tuple[Any, Any]:
    """The first ``(inputs, target)``; a shuffling loader draws as if it had not been read.

    Raises:
        ConfigError: `batches` cannot be iterated again and again.
        AutopruneError: it is empty, or gives something else.
    """
    if isinstance(batches, Iterator) or not hasattr(batches, "__iter__"):
        raise ConfigError(
            f"{what} must be iterable again and again, such as a DataLoader or a list, not {kind(batches)}."
        )
    with torch.random.fork_rng(devices=[]):
        batch = next(iter(batches), None)
    if batch is None:
        raise AutopruneError(f"{what} is empty.")
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        count = f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else ""
        raise AutopruneError(
            f"{what} must give (inputs, target) pairs, not {kind(batch)}{count}: several inputs go into a tuple, "
            "((x1, x2), target), and what is neither must be left out."
        )
    return batch[0], batch[1]


def check_model(model: nn.Module) -> None:
    """Raises AutopruneError for a model that has no weights yet."""
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(parameter):
            raise AutopruneError(f"{name} has no shape yet: call the model once, so that its lazy modules are made.")
        if parameter.is_meta:
            raise AutopruneError(f"{name} is on the meta device and has no values: load the model's weights first.")


def unfreeze_(model: nn.Module) -> nn.Module:
    """Lets what is pruned be trained: each layer's weight, and everything in a model that is frozen as a whole."""
    floating = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    if not any(parameter.requires_grad for parameter in floating):
        for parameter in floating:
            parameter.requires_grad_(True)
    for layer in weighted_layers(model).values():
        if isinstance(weight := getattr(layer, "weight", None), nn.Parameter) and weight.is_floating_point():
            weight.requires_grad_(True)
    return model


def check_training(what: str, model: nn.Module, batches: Any, loss: Loss) -> None:
    """Computes one loss and its gradient, on a copy of the model in training mode.

    Raises:
        AutopruneError: it fails, the loss is not one finite number with a gradient, or the last batch is too small.
    """
    inputs, target = first_pair(what, batches)
    _backward(f"the first batch of {what}", model, inputs, target, loss)
    last = _last_size(batches)
    if last == 1 and Arguments.of(inputs).samples > 1 and not _trains_on_one(model, inputs):
        raise AutopruneError(
            f"the last batch of {what} holds one sample, which batch norm cannot be trained on: leave it out "
            "(DataLoader(..., drop_last=True)), or take another batch size."
        )


def _backward(what: str, model: nn.Module, inputs: Any, target: Any, loss: Loss) -> None:
    trained = copy.deepcopy(model).train()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            value = loss(call_with(trained, inputs), target)
    except Exception as error:  # the model and the loss are the user's: they may raise anything
        raise AutopruneError(
            f"{what} cannot be trained on, loss(model(*inputs), target) fails: {told(error)}."
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        given = f"a tensor of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else kind(value)
        raise AutopruneError(f"the loss must be one number, a tensor such as a mean over the batch; it gave {given}.")
    if not math.isfinite(value.item()):
        raise AutopruneError(f"the loss of {what} is {value.item()}: look for NaN in the data, or for a log of 0.")
    if not value.requires_grad:
        raise AutopruneError(
            "the loss has no gradient: compute it from the model's output, in torch, without detach()."
        )
    try:
        value.backward()
    except RuntimeError as error:
        raise AutopruneError(f"{what} cannot be trained on, the loss has no gradient: {told(error)}.") from error


def _last_size(batches: Batches) -> int | None:
    """Samples of the last batch, where it is known without reading all."""
    if isinstance(batches, DataLoader):
        if batches.batch_size is None or batches.drop_last or isinstance(batches.dataset, IterableDataset):
            return None
        return len(cast("Sized", batches.sampler)) % batches.batch_size or batches.batch_size
    return Arguments.of(batches[-1][0]).samples if isinstance(batches, Sequence) else None


def _trains_on_one(model: nn.Module, inputs: Any) -> bool:
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            Arguments.of(inputs).of_samples(1).call(copy.deepcopy(model).train())
    except ValueError:
        return False
    return True
