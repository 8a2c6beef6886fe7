"""Run action: what a penalised method penalises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from autoprune.envs.actions.method_argument import MethodOption
from autoprune.errors import ConfigError, did_you_mean
from autoprune.training.proximal import PENALTIES


class Penalty(MethodOption):
    """Picks the penalty of a method that has one; its strength is the action `method_strength`."""

    arguments: ClassVar[tuple[str, ...]] = ("penalty",)

    def __init__(self, options: Sequence[str] = ("half", "l1", "none")) -> None:
        for option in options:
            if option not in PENALTIES:
                raise ConfigError(f"action 'penalty': unknown penalty {option!r}. {did_you_mean(option, PENALTIES)}")
        super().__init__(options)
