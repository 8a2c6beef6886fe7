"""Arguments and options that several commands share, and what is made of them."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from autoprune.errors import ConfigError

if TYPE_CHECKING:  # imported when a command runs: --help does not wait for torch
    from torch import nn

    from autoprune.pipeline.run import Run
    from autoprune.progress import Progress
    from autoprune.target import Target

ConfigPath = Annotated[Path, typer.Argument(help="A TOML config, or the name of one that comes along, e.g. digits.")]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="Where the run is kept and resumed from. [default: runs/<config name>]")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. --set search.episodes=50.")
]

Seed = Annotated[int | None, typer.Option(help="Of everything that is drawn: the config's key seed.", min=0)]


def completed_precision(incomplete: str) -> list[str]:
    """Completes a precision."""
    from autoprune.precision import PRECISIONS, RUN_PRECISIONS

    return [name for name in dict.fromkeys((*PRECISIONS, *RUN_PRECISIONS)) if name.startswith(incomplete)]


Precision = Annotated[
    str | None,
    typer.Option(
        help="Of the repacked model: float32, int8, or mixed (int8 where it costs little); of a function's also bf16 "
        "(where that is faster), of a config's also planned (layer by layer, as the search chooses): key precision.",
        autocompletion=completed_precision,
    ),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object in place of the report.")]

# Of the commands that search.
Workers = Annotated[
    int | None, typer.Option(help="Processes that evaluate trials. They change no result. [default: one a core]", min=1)
]
Ray = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="A Ray cluster that evaluates trials: auto, HOST:PORT; local starts one."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what would be done, what is in reach and how long it takes; change nothing."),
]
Minutes = Annotated[
    float | None,
    typer.Option(help="Of the search, at most; the best plan so far is taken. A stopped run goes on with the rest."),
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
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="FUNCTION|FILE",
        help="Of a function's model in int8: package.module:function that yields batches of its inputs, or a file of "
        "them, .npy or .safetensors.",
    ),
]
Save = Annotated[Path | None, typer.Option(help="Where a function's repacked model is written.")]
ValueBits = Annotated[
    int | None,
    typer.Option(help="With --save: 8 writes rounded weights, a file about a quarter the size. [default: 32]"),
]


def completed_over(incomplete: str) -> list[str]:
    """Completes what a speed-up can be over; `autoprune.target` has these names too, and waits for torch."""
    return [name for name in ("best", "repacked", "eager") if name.startswith(incomplete)]


_TARGET = "Target, in place of the config's"  # the panel of --help


@dataclass(frozen=True)
class TargetOptions:
    """What the pruned model must reach, in place of the config's target as a whole: `Target`."""

    speedup: Annotated[
        float | None,
        typer.Option(help="At least so many times as fast, measured here; above 1.", rich_help_panel=_TARGET),
    ] = None
    over: Annotated[
        str | None,
        typer.Option(
            metavar="BASELINE",
            help="What --speedup is over: the best dense engine, the dense model repacked, or torch eager. "
            "[default: best]",
            rich_help_panel=_TARGET,
            autocompletion=completed_over,
        ),
    ] = None
    latency_ms: Annotated[
        float | None,
        typer.Option(help="At most so many milliseconds an inference, measured here.", rich_help_panel=_TARGET),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES", help="Of the packed file, at most: 500kB, 1.5MB, 64KiB.", rich_help_panel=_TARGET
        ),
    ] = None
    macs: Annotated[
        int | None,
        typer.Option(help="At most so many multiply-adds of one sample.", rich_help_panel=_TARGET),
    ] = None
    sparsity: Annotated[float | None, typer.Option(help="Share of zeros, in (0, 1).", rich_help_panel=_TARGET)] = None
    accuracy_drop: Annotated[
        float | None,
        typer.Option(help="At most this drop: 0.01 is a point of accuracy.", rich_help_panel=_TARGET),
    ] = None

    @property
    def given(self) -> dict[str, Any]:
        """The options that were given, by name."""
        values = {f"--{field.name.replace('_', '-')}": getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def target(self) -> Target | None:
        """The target; None where no option was given.

        Raises:
            ConfigError: a figure is out of its range, or what a speed-up is over is given without one.
        """
        from autoprune.target import Target

        if self.speedup is None:
            only_for("--speedup", {"--over": self.over})
        if not self.given:
            return None
        return Target(
            speedup=self.speedup,
            accuracy_drop=self.accuracy_drop,
            sparsity=self.sparsity,
            latency_ms=self.latency_ms,
            size_bytes=None if self.size is None else size_in_bytes(self.size),
            macs=self.macs,
            over=self.over or "best",  # type: ignore[arg-type]  # checked there
        )


@dataclass(frozen=True)
class ReportOptions:
    """How a command that ends with a report says so."""

    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 where the target was missed.")] = False
    as_json: AsJson = False
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False

    @property
    def progress(self) -> Progress:
        from autoprune.progress import SILENT

        return SILENT if self.quiet else console()


_UNITS = {"": 1, "b": 1} | {
    prefix + tail: base**power
    for power, prefix in enumerate(("k", "m", "g"), start=1)
    for tail, base in (("b", 1000), ("ib", 1024))
}


def size_in_bytes(text: str) -> int:
    """A size as people write it, such as ``500kB``, ``1.5 MB``, ``64KiB`` or ``20000``, in bytes; k is 1000, Ki 1024.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in _UNITS:
        raise ConfigError(f"--size is a number of bytes, such as 500kB, 1.5MB or 64KiB, not {text!r}.")
    return int(float(found[1]) * _UNITS[found[2]])


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the fields of its parameters that are dataclasses, such as `TargetOptions`, as options."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type[Any]] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}  # type: ignore[misc]
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        of_fields = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=of_fields[field.name]
                )
            )

    @functools.wraps(command)
    def expanded(**options: Any) -> None:
        made = {
            name: kind(**{field.name: options.pop(field.name) for field in fields(kind)})
            for name, kind in groups.items()
        }
        command(**options, **made)

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def changes(target: TargetOptions, seed: int | None, precision: str | None) -> list[str]:
    """These options as overrides of a config.

    Raises:
        ConfigError: the target cannot be used.
    """
    asked = target.target()
    given = [] if seed is None else [f"seed={seed}"]
    given += in_precision(precision)
    if asked is not None:
        table = ", ".join(f"{name} = {json.dumps(value)}" for name, value in asked.to_json().items())
        given.append(f"target={{{table}}}")
    return given


def in_precision(precision: str | None) -> list[str]:
    """The option --precision as overrides of a config."""
    return [] if precision is None else [f"precision={json.dumps(precision)}"]


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
    from autoprune.tasks.functions import user_model

    return user_model("model", function)


def checked_minutes(minutes: float | None) -> float | None:
    """The option --minutes; raises ConfigError unless it is above 0."""
    if minutes is not None and not 0.0 < minutes < float("inf"):
        raise ConfigError(f"--minutes must be above 0, not {minutes:g}.")
    return minutes


def console() -> Progress:
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
    minutes: float | None = None,
    finished: bool = False,
    progress: Progress | None = None,
) -> Run:
    """The run of a config, its directory locked; not that of a `finished` run that is only read."""
    from autoprune.config import load_config
    from autoprune.pipeline.run import Run

    loaded = load_config(config, overrides or [])
    directory = run_dir or Path("runs") / config.stem
    made = Run(
        loaded,
        directory,
        progress=progress or console(),
        fresh_table=fresh_table,
        workers=workers,
        ray=ray,
        minutes=checked_minutes(minutes),
    )
    if directory.exists() and not (finished and (directory / "report.md").exists()):
        made.lock.take()  # at once: a new directory is made, and locked, when the task has proved to work
    return made
