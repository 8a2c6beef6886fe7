"""The command line that all benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from autoprune.errors import did_you_mean

RESULTS = Path(__file__).parents[1] / "results"
Value = TypeVar("Value")


def command_line(name: str, about: str | None) -> argparse.ArgumentParser:
    """The parser of ``python -m benchmarks NAME``, with what every benchmark takes.

    Args:
        name: of the benchmark.
        about: its module's docstring, the text of ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="where rows are kept and pages are written; default benchmarks/results",
    )
    return parser


def add_seeds(parser: argparse.ArgumentParser, default: int | None = None, usual: str = "") -> None:
    """Adds ``--seeds N``: seeds 0 to N - 1.

    Args:
        parser: of a benchmark.
        default: how many; None where it depends on other options.
        usual: says on what, in that case.
    """
    parser.add_argument("--seeds", type=int, default=default, help=f"how many; default {usual or default}")


def add_report(parser: argparse.ArgumentParser) -> None:
    """Adds ``--report``."""
    parser.add_argument("--report", action="store_true", help="measure nothing: write the page of what is there")


def listed(kind: Callable[[str], Value]) -> Callable[[str], tuple[Value, ...]]:
    """Parses ``1,4,8``, for argparse, which tells of a value that `kind` does not take."""

    def numbers(text: str) -> tuple[Value, ...]:
        return tuple(kind(part.strip()) for part in text.split(","))

    return numbers


def among(allowed: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """Parses names with commas between, for argparse; of one that is not `allowed` the nearest that is gets told."""

    def known(name: str) -> str:
        if name not in allowed:
            raise argparse.ArgumentTypeError(f"unknown: {name!r}. {did_you_mean(name, allowed)}")
        return name

    return listed(known)
