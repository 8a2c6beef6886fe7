"""Run action: what shares the plan's budget among the layers while a method trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from autoprune.allocation import make_allocation
from autoprune.envs.actions.method_argument import MethodOption


class AllocationRule(MethodOption):
    """Picks one of `options`, each a name, or a table with a ``name`` and the allocation's arguments."""

    arguments: ClassVar[tuple[str, ...]] = ("allocation",)

    def __init__(
        self,
        options: Sequence[str | Mapping[str, Any]] = ("planned", "erk", "lamp", {"name": "global", "normalise": True}),
    ) -> None:
        for option in options:
            make_allocation(option)  # raises on a name or an argument that is none
        super().__init__(options)
