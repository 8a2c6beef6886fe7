"""The command that writes C libraries: build."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # imported when a command runs: --help does not wait for torch
    from autoprune.repack.runtime.program import Shapes


TARGETS = ("host", "x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64", "aarch64-dotprod", "armv7", "riscv64", "wasm32")
"""The targets; `autoprune.repack.aot.targets` has these names too, and waits for torch."""


def completed_target(incomplete: str) -> list[str]:
    """Completes a target."""
    return [name for name in TARGETS if name.startswith(incomplete)]


def build(
    file: Annotated[
        Path,
        typer.Argument(help="What autoprune repack --save wrote, or a run directory.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option(help="The folder to write; with several targets it gets one for each.", show_default=False)
    ],
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help=f"The processor: {', '.join(TARGETS)}; repeatable. [default: host]",
            autocompletion=completed_target,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the model, in files and in C. [default: that of the file or the run]")
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            help="Of the input: 1,3,224,224; of several inputs 1,16/1,16. Repeatable: the library takes each of them. "
            "[default: the example's]",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(help="That may work on one inference.", min=1)] = 1,
) -> None:
    """Compile a repacked model into a C library for any processor, with callers in C, CMake, Python or JavaScript.

    Example: autoprune build fast.safetensors --out built

    Example: autoprune build runs/digits --target aarch64 --target wasm32 --out built --name digits --shape 1,1,32,32
    """
    from autoprune.errors import FileError
    from autoprune.pipeline.application import REPACKED
    from autoprune.repack import load
    from autoprune.repack.aot.library import build_all
    from autoprune.report.build_table import build_text

    asked = list(dict.fromkeys(targets or ["host"]))
    folders = {target: out / target if len(asked) > 1 else out for target in asked}
    path = file / REPACKED if file.is_dir() else file
    if not path.exists():
        raise FileError(
            f"the repacked model not found: {path}. Give a file that autoprune repack --save wrote, or the directory "
            "of a run that is complete."
        )
    named = name or (file.resolve().name if file.is_dir() else file.stem)
    given = None if shapes is None else [_shapes(text) for text in shapes]
    built = build_all(load(path), folders, given, name=named, threads=threads)
    typer.echo(build_text(built))


def _shapes(text: str) -> Shapes:
    """``1,16/1,16`` as the shapes of two inputs."""
    from autoprune.bench import parse_shape

    return tuple(parse_shape(each, "--shape") for each in text.split("/"))
