"""Packages that only some of the work needs, and which extra of the installation brings them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from autoprune.errors import MissingExtra


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Around imports that `what` needs, which `extra` installs.

    Raises:
        MissingExtra: a package is missing; the message says which, and how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "autoprune"):
            raise
        raise MissingExtra(f'{what} needs {package}: pip install "autoprune[{extra}]".') from error
