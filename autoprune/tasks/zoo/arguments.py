"""Checks of what a model of the zoo is built from."""

from __future__ import annotations

from autoprune.errors import ConfigError


def positive(what: str, *values: int) -> None:
    """Raises ConfigError unless every value is a positive integer."""
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{what} must be a positive integer, not {value!r}.")
