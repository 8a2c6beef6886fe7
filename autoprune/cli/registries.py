"""Commands that list what a config may name, such as agents and methods, and the completion of these names."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from autoprune.registry import Registry

LISTED: Mapping[str, tuple[str, str, str]] = {
    "agents": ("autoprune.agents", "AGENTS", "that search for a plan: search.agent"),
    "methods": ("autoprune.training", "TRAINING", "of sparse training: finetune.method, prune --method"),
    "patterns": ("autoprune.patterns", "PATTERNS", "of weights that are kept or cut together: env.pattern"),
    "tasks": ("autoprune.tasks", "TASKS", "of a model and its data: task"),
    "criteria": ("autoprune.criteria", "CRITERIA", "of how important a weight is: env.criterion"),
    "engines": ("autoprune.latency.engines", "ENGINES", "that run the dense model, to compare with: latency.engines"),
    "devices": ("autoprune.evaluation.devices", "DEVICES", "that latency is measured on: device"),
}
"""Command -> the package of its registry, its name there, what its rows are and where a config names them."""


def names(listed: str) -> list[str]:
    """The rows of a registry, read from its source: completion does not wait for torch, which importing it loads."""
    spec = importlib.util.find_spec(LISTED[listed][0])
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) == 2)
    rows = next(node.args[1] for node in calls if isinstance(node.func, ast.Name) and node.func.id == "Registry")
    return list(ast.literal_eval(rows))


def completed(listed: str) -> Callable[[str], list[str]]:
    """Completes a name of a registry."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names(listed) if name.startswith(incomplete)]

    return complete


def completed_list(listed: str) -> Callable[[str], list[str]]:
    """Completes the last of several names that commas part."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in names(listed) if name.startswith(last)]

    return complete


def listing(listed: str) -> Callable[[], None]:
    """The command that prints a registry as a table."""
    package, attribute, what = LISTED[listed]

    def command() -> None:
        from autoprune.report.table import markdown_table

        registry = getattr(importlib.import_module(package), attribute)
        rows = [row_of(registry, name) for name in registry]
        typer.echo(markdown_table(("name", "what it is", "arguments", "installed"), rows, left=4))

    command.__name__ = listed
    command.__doc__ = f"List {listed} {what}.\n\nExample: autoprune {listed}"
    return command


def row_of(registry: Registry[Any], name: str) -> tuple[str, str, str, str]:
    """A row of the table: the name, the docstring's first line, arguments with defaults, and what is missing."""
    from autoprune.errors import AutopruneError, ConfigError, MissingExtra

    try:
        member = registry.get(name)
    except MissingExtra as error:
        return name, "", "", _command(error)
    summary = (inspect.getdoc(member) or "").partition("\n")[0]
    arguments = ", ".join(map(_argument, inspect.signature(member).parameters.values()))
    try:
        made = member()
        missing = made.available() if hasattr(made, "available") else None
    except (ConfigError, TypeError):  # it has arguments without a default
        missing = None
    except AutopruneError as error:
        missing = _command(error)
    return name, summary, arguments, missing or "yes"


def _argument(parameter: inspect.Parameter) -> str:
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"


def _command(error: Exception) -> str:
    """The command that an error names, which installs what is missing; else the error's own words."""
    found = re.search(r": ([\w-]+ (?:install|pack) .+)", str(error))
    return str(error) if found is None else found[1].rstrip(".")
