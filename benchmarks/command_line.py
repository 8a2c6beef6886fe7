"""What the benchmarks' command lines share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from typing import TypeVar

from autoprune.errors import did_you_mean

Value = TypeVar("Value")


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
