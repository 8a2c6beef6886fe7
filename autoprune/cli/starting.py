"""The command that begins a project: init."""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from autoprune.errors import ConfigError

STARTER = ("autoprune.toml", "my_model.py")


def init(
    folder: Annotated[Path, typer.Argument(help="Where they are written; made if it is not there.")] = Path(),
) -> None:
    """Write a config and a module with a model and data, to put your own in. They run as they stand.

    Example: autoprune init

    Example: autoprune init my_project
    """
    from autoprune.files import write_text

    if there := [name for name in STARTER if (folder / name).exists()]:
        raise ConfigError(f"{folder / there[0]} is there already; nothing was written. Give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    source = resources.files("autoprune.cli") / "starter"
    for name in STARTER:
        write_text(folder / name, (source / name).read_text(encoding="utf-8"))
    typer.echo(f"Written: {', '.join(str(folder / name) for name in STARTER)}. Next:\n")
    if folder != Path():
        typer.echo(f"  cd {shlex.quote(str(folder))}")
    typer.echo(f"  autoprune run {STARTER[0]} --dry-run\n  autoprune run {STARTER[0]}")
