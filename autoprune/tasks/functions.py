"""Functions of the user's own, named in a config as ``package.module:function``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import nn

from autoprune.errors import ConfigError, did_you_mean
from autoprune.model.given import described, kind


def is_path(name: str | None) -> bool:
    """Whether `name` names a function of the user's own, and no row of a registry."""
    return name is not None and ":" in name


def user_model(argument: str, path: str) -> nn.Module:
    """What the function named by `path`, ``package.module:function``, returns.

    Args:
        argument: what the user calls it, for messages.
        path: is imported from the current folder too.

    Raises:
        ConfigError: it cannot be imported or called, or returns no module.
    """
    built = result_of(argument, path)
    if not isinstance(built, nn.Module):
        raise ConfigError(f"{argument}={path!r} must return a torch.nn.Module, not {kind(built)}.")
    return built


def named(argument: str, path: str) -> Any:
    """What is called `path`, ``package.module:name``: a function, or a value of another kind.

    Raises:
        ConfigError: it cannot be imported.
    """
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
    if not hasattr(module, function_name):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        hint = did_you_mean(function_name, names) if names else "It defines no function."
        raise ConfigError(f"{argument}={path!r}: {module_name} has no function {function_name!r}. {hint}")
    return getattr(module, function_name)


def function(argument: str, path: str) -> Callable[..., Any]:
    """The function named by `path`; likewise."""
    value = named(argument, path)
    if not callable(value):
        raise ConfigError(f"{argument}={path!r} must be a function, not {kind(value)}.")
    return cast("Callable[..., Any]", value)


def result_of(argument: str, path: str) -> Any:
    """What the function named by `path` returns when it is called without arguments; likewise."""
    called = function(argument, path)
    try:
        return called()
    except Exception as error:
        raise ConfigError(f"{argument}={path!r} failed when called without arguments: {described(error)}.") from error
