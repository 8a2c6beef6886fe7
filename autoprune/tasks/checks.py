"""A user's model, batches and loss, tried once before anything that takes long."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence, Sized
from functools import cache
from itertools import islice
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from autoprune.errors import AutopruneError, ConfigError
from autoprune.masks import Batches, Loss
from autoprune.model.arguments import Arguments, call_with
from autoprune.model.copies import check_weights
from autoprune.model.given import called, check_loss, inputs_and_target, kind, read
from autoprune.model.weights import weighted_layers
from autoprune.tasks.batches import drawing_alike

LOOKED_AT = 8  # batches, of data that are not held in memory
TRIED = 4  # of them


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
        # A DataLoader with persistent workers begins anew with the iterator that it has.
        if not isinstance(batches, DataLoader):
            with called(f"{what} cannot be read"):
                once, again = iter(batches), iter(batches)
            if once is again:
                raise ConfigError(
                    f"{what} must be iterable again and again, but each iteration of this {type(batches).__name__} "
                    "goes on with the same iterator: let its __iter__ begin anew."
                )
        for _, inputs, target in read(batches, what):
            return inputs, target
    raise AutopruneError(f"{what} is empty.")


def check_model(model: Any) -> None:
    """Raises AutopruneError for what is no model, or has no weights yet."""
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else kind(model)
        raise AutopruneError(f"the model is {given}: give a torch.nn.Module, such as an instance of a class of models.")
    check_weights(model)


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
    """Computes a loss and its gradient, on a copy of the model in training mode, and looks through what is cheap.

    That is the size of every batch where it is known, and else the first batches, of which some are tried.

    Raises:
        AutopruneError: it fails, the loss is not one finite number with a gradient, or a batch is too small.
    """
    first, target = first_pair(what, batches)
    trains_on_one = cache(lambda: Arguments.of(first).samples < 2 or _trains_on_one(model, first))

    def check_size(batch: str, samples: int | None) -> None:
        if samples == 0:
            raise AutopruneError(f"{batch} of {what} holds no sample: leave it out.")
        if samples == 1 and not trains_on_one():
            raise AutopruneError(
                f"{batch} of {what} holds one sample, which batch norm cannot be trained on: leave it out "
                "(DataLoader(..., drop_last=True)), or take another batch size."
            )

    check_size("the first batch", _samples(first))  # one sample is as many as the first batch has
    trained = copy.deepcopy(model).train()
    _try(f"the first batch of {what}", trained, first, target, loss, differentiated=True)
    check_size("the last batch", _last_size(batches))
    held = isinstance(batches, (list, tuple))
    with drawing_alike():
        for number, inputs, target in islice(read(batches, what), None if held else LOOKED_AT):
            batch = f"batch {number}"
            check_size(batch, _samples(inputs))
            if 1 < number <= TRIED:
                _try(f"{batch} of {what}", trained, inputs, target, loss)


def _try(what: str, trained: nn.Module, inputs: Any, target: Any, loss: Loss, *, differentiated: bool = False) -> None:
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(differentiated):
        with called(f"{what} cannot be trained on, loss(model(*inputs), target) fails"):
            value = loss(call_with(trained, inputs), target)
        check_loss(value, differentiated=differentiated)
        if not math.isfinite(value.item()):
            raise AutopruneError(f"the loss of {what} is {value.item()}: look for NaN in the data, or for a log of 0.")
        if differentiated:
            with called(f"{what} cannot be trained on, the loss has no gradient"):
                value.backward()


def _samples(inputs: Any) -> int | None:
    """Of a batch; None where it holds no tensor to count them by."""
    given = Arguments.of(inputs)
    return given.samples if any(x.dim() for x in given.tensors[:1]) else None


def _last_size(batches: Batches) -> int | None:
    """Samples of the last batch, where it is known without reading all."""
    if isinstance(batches, DataLoader):
        sampler = batches.batch_sampler
        if isinstance(batches.dataset, IterableDataset) or type(sampler) is not BatchSampler or sampler.drop_last:
            return None
        return len(cast("Sized", sampler.sampler)) % sampler.batch_size or sampler.batch_size
    if isinstance(batches, Sequence) and (last := inputs_and_target(batches[-1])) is not None:
        return _samples(last[0])
    return None  # or it is no batch, which reading says better


def _trains_on_one(model: nn.Module, inputs: Any) -> bool:
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            Arguments.of(inputs).of_samples(1).call(copy.deepcopy(model).train())
    except ValueError:
        return False
    return True
