"""Arguments and options that several commands share, and what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.errors import ConfigError

if TYPE_CHECKING:  # imported when a command runs: --help does not wait for torch
    from torch import nn

    from autoprune.pipeline.run import Run
    from autoprune.report.console import Console

ConfigPath = Annotated[Path, typer.Argument(help="A TOML config, e.g. configs/digits.toml.")]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="Where the run is kept and resumed from. [default: runs/<config name>]")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. --set search.episodes=50.")
]

# Of the commands that search.
Workers = Annotated[
    int | None, typer.Option(help="Processes that evaluate trials. They change no result. [default: one a core]", min=1)
]
Ray = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="A Ray cluster that evaluates trials: auto, HOST:PORT; local starts one."),
]

# Of the commands that take a run's config or a model's function.
ConfigOrFunction = Annotated[
    str, typer.Argument(help="A TOML config, or package.module:function returning an nn.Module.", show_default=False)
]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="SHAPE", help="Of a function's model: 1,3,224,224, batch first; once an input."),
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option("--dtype", metavar="TYPE", help="float32 or int64: one for all inputs, or one each."),
]
Threads = Annotated[
    int | None, typer.Option(help="Threads of one inference of a function's model. [default: 1]", min=1)
]
Save = Annotated[Path | None, typer.Option(help="Where a function's repacked model is written.")]
ValueBits = Annotated[
    int | None,
    typer.Option(help="With --save: 8 writes rounded weights, a file about a quarter the size. [default: 32]"),
]


def is_function(target: str) -> bool:
    """Whether `target` reads as ``package.module:function`` and not as a path."""
    return ":" in target and not target.endswith(".toml") and not Path(target).exists()


def only_for(what: str, options: dict[str, object]) -> None:
    """Options that would be ignored are an error."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name} is for {what} alone; leave it out, or give {what}.")


def model_of(function: str) -> nn.Module:
    """What ``package.module:function`` returns."""
    from autoprune.tasks.user import user_model

    return user_model("model", function)


def console() -> Console:
    """Progress on stderr."""
    from autoprune.report.console import Console

    return Console()


def open_run(
    config: Path,
    run_dir: Path | None,
    overrides: list[str] | None,
    *,
    fresh_table: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    finished: bool = False,
) -> Run:
    """The run of a config, its directory locked; not that of a `finished` run that is only read."""
    from autoprune.config import load_config
    from autoprune.pipeline.run import Run

    loaded = load_config(config, overrides or [])
    directory = run_dir or Path("runs") / config.stem
    made = Run(loaded, directory, progress=console(), fresh_table=fresh_table, workers=workers, ray=ray)
    if directory.exists() and not (finished and (directory / "report.md").exists()):
        made.lock.take()  # at once: a new directory is made, and locked, when the task has proved to work
    return made
