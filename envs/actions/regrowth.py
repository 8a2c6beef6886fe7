"""Run action: whether what was cut goes on learning and can return."""

from __future__ import annotations

from typing import ClassVar

from autoprune.envs.actions.method_argument import MethodOption


class Regrowth(MethodOption):
    """Off or on: `splice` of the method proximal."""

    arguments: ClassVar[tuple[str, ...]] = ("splice",)

    def __init__(self) -> None:
        super().__init__((False, True))
