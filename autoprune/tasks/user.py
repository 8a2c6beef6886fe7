"""A task of the user's own: two functions named in a config as ``package.module:function``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.errors import AutopruneError, ConfigError, did_you_mean
from autoprune.model.given import described, kind
from autoprune.model.inventory import as_tuple, eval_mode
from autoprune.registry import Choice
from autoprune.tasks.base import Task
from autoprune.tasks.batches import first_batches
from autoprune.tasks.checks import check_model, check_training, first_pair, unfreeze_

CALIBRATION_BATCHES = 4


def user(model: str, data: str) -> Task:
    """A trained classifier and its loaders.

    Args:
        model: names a function without arguments that returns the trained ``nn.Module``.
        data: names one that returns ``(train, validation)`` or ``(train, validation, test)``: re-iterables, such as a
            DataLoader, of ``(inputs, target)`` with class indices as int64. Without a test split, the validation
            split is reported.

    Raises:
        ConfigError: a function cannot be imported, or returns something else.
        AutopruneError: the first batch does not run through the model, or does not fit a classifier.
    """
    built = user_model("model", model)
    loaders = _call("data", data)
    if not isinstance(loaders, (tuple, list)) or len(loaders) not in (2, 3):
        count = f" of {len(loaders)}" if isinstance(loaders, (tuple, list)) else ""
        raise ConfigError(
            f"data={data!r} must return (train, validation) or (train, validation, test), not {kind(loaders)}{count}."
        )
    check_model(built)
    for split, loader in zip(("train", "validation", "test"), loaders, strict=False):
        _check_split(f"the {split} split of data={data!r}", loader, built)
    check_training(f"the train split of data={data!r}", unfreeze_(built), loaders[0], functional.cross_entropy)
    return Task(
        name="user",
        model=built.cpu(),
        train=loaders[0],
        calibration=first_batches(loaders[0], CALIBRATION_BATCHES),
        validation=loaders[1],
        testing=loaders[-1],
        loss=functional.cross_entropy,
        dense_training=None,
    )


def functions_of(task: Choice) -> tuple[str, ...]:
    """The functions that making a config's task imports and calls, as the config names them."""
    return tuple(str(task.args[name]) for name in ("model", "data") if name in task.args) if task.name == "user" else ()


def user_model(argument: str, path: str) -> nn.Module:
    """What the function named by `path`, ``package.module:function``, returns.

    Args:
        argument: what the user calls it, for messages.
        path: is imported from the current folder too.

    Raises:
        ConfigError: it cannot be imported or called, or returns no module.
    """
    built = _call(argument, path)
    if not isinstance(built, nn.Module):
        raise ConfigError(f"{argument}={path!r} must return a torch.nn.Module, not {kind(built)}.")
    return built


def _call(argument: str, path: str) -> Any:
    module_name, _, function_name = path.partition(":") if isinstance(path, str) else ("", "", "")
    if not module_name or not function_name:
        raise ConfigError(
            f"{argument} must be 'package.module:function', such as 'my_project.models:build', not {path!r}."
        )
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{argument}={path!r} cannot be imported: {error}. Run from the folder that holds it, or install it."
        ) from error
    except Exception as error:
        raise ConfigError(f"{argument}={path!r}: importing {module_name} failed: {described(error)}.") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        hint = did_you_mean(function_name, names) if names else "It defines no function."
        raise ConfigError(f"{argument}={path!r}: {module_name} has no function {function_name!r}. {hint}")
    try:
        return function()
    except Exception as error:
        raise ConfigError(f"{argument}={path!r} failed when called without arguments: {described(error)}.") from error


def _check_split(what: str, loader: Any, model: nn.Module) -> None:
    given, target = first_pair(what, loader)
    inputs = as_tuple(given)
    if not isinstance(target, Tensor):
        raise AutopruneError(f"{what} must give (inputs, target) pairs with a tensor as target, not {kind(target)}.")
    if not all(isinstance(x, Tensor) for x in inputs):
        raise AutopruneError(f"{what}: inputs must be a tensor or a tuple of them, not {kind(given)}.")
    if any(x.is_floating_point() and not bool(torch.isfinite(x).all()) for x in inputs):
        raise AutopruneError(f"{what} holds NaN or infinity in its first batch; clean the data.")
    if target.dtype != torch.int64:
        raise AutopruneError(
            f"{what}: targets must be class indices of type int64, not {target.dtype}; use target.long()."
        )
    logits = _run(what, model, inputs)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != target.shape:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else kind(logits)
        raise AutopruneError(
            f"{what}: for targets of shape {tuple(target.shape)} the model must give logits of that "
            f"shape and one more dimension, the classes; it gave {got}."
        )
    if int(target.min()) < 0 or int(target.max()) >= logits.shape[-1]:
        raise AutopruneError(
            f"{what}: targets must be class indices from 0 to {logits.shape[-1] - 1}, the model's classes, "
            f"not {int(target.min())} to {int(target.max())}."
        )


def _run(what: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    try:
        with eval_mode(model), torch.inference_mode():
            return model(*inputs)
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise AutopruneError(
            f"{what} does not run through the model: inputs of shape {shapes}: {described(error)}."
        ) from error
