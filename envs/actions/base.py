"""What an action component is, and how components share one ``Box[-1, 1]``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, Literal, TypeVar

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from autoprune.envs.partial_plan import PartialPlan
from autoprune.envs.problem import Problem
from autoprune.errors import ConfigError
from autoprune.precision import RunPrecision
from autoprune.registry import Choice

Scope = Literal["run", "layer"]
Option = TypeVar("Option")


class ActionComponent(ABC):
    """One number of the action, in [-1, 1], and what it changes in a plan.

    Attributes:
        scope: ``run`` components are read at step 0, ``layer`` components at each layer's step.
        needs_training: whether the choice only shows in a score whose recovery trains.
        plans_precision: whether it sets layers' precisions, which a problem must leave to plans.
        solved: whether the choice guides the solver, which then makes the plan that is measured.
        after: components whose choice this one builds on: they come before it where both are listed.
    """

    scope: ClassVar[Scope]
    needs_training: ClassVar[bool] = False
    plans_precision: ClassVar[bool] = False
    solved: ClassVar[bool] = False
    after: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def decode(self, unit: float, problem: Problem, partial: PartialPlan, layer: str | None) -> PartialPlan:
        """Returns `partial` with this component's choice made, for `layer`, or for the run when it is None."""

    @abstractmethod
    def anchors(self) -> tuple[float, ...]:
        """The units a rule that treats every layer alike would try."""


def pick(options: Sequence[Option], unit: float) -> Option:
    """Cuts [-1, 1] into equal parts, one an option."""
    return options[min(len(options) - 1, int((unit + 1.0) / 2.0 * len(options)))]


def centres(count: int) -> tuple[float, ...]:
    """The middle unit of each of `count` equal parts of [-1, 1]."""
    return tuple((2 * i + 1) / count - 1.0 for i in range(count))


def between(low: float, high: float, unit: float, log: bool = False) -> float:
    """From `low` at -1 to `high` at 1, evenly or on a log scale, to two digits."""
    share = (unit + 1.0) / 2.0
    value = low * (high / low) ** share if log else low + (high - low) * share
    return float(f"{value:.2g}")


class ActionSpace:
    """The concatenation of components: which entries of an action are whose.

    Args:
        components: each with the registry row it was created from.

    Raises:
        ConfigError: there is none, one is listed twice, or before one that it builds on.
    """

    def __init__(self, components: Sequence[tuple[Choice, ActionComponent]]) -> None:
        names = [choice.name for choice, _ in components]
        if len(set(names)) != len(names):
            raise ConfigError(f"an action component is listed twice: {', '.join(names)}.")
        if not components:
            raise ConfigError("the environment needs an action such as 'sparsity': nothing to learn otherwise.")
        for place, (choice, component) in enumerate(components):
            if late := [other for other in component.after if other in names[place:]]:
                raise ConfigError(f"the action {choice.name!r} builds on {late[0]!r}: list {late[0]!r} before it.")
        self.choices = tuple(choice for choice, _ in components)
        self.names = tuple(names)
        self.components = tuple(component for _, component in components)

    @cached_property
    def of_layers(self) -> bool:
        """Whether anything is chosen a layer at a time."""
        return any(component.scope == "layer" for component in self.components)

    @cached_property
    def solved(self) -> bool:
        """Whether a solver makes the plan from what is chosen."""
        return any(component.solved for component in self.components)

    @cached_property
    def plans_precision(self) -> bool:
        """Whether the layers' precisions are chosen."""
        return any(component.plans_precision for component in self.components)

    def check_precision(self, run: RunPrecision) -> None:
        """Raises ConfigError where layers' precisions are chosen that repacked models of this precision do not heed."""
        for name, component in zip(self.names, self.components, strict=True):
            if component.plans_precision and run != "planned":
                raise ConfigError(
                    f"the action {name!r} needs precision 'planned', in which each layer has its own; {run!r} is of "
                    "all layers."
                )

    @property
    def box(self) -> spaces.Box:
        return spaces.Box(-1.0, 1.0, (len(self.components),), np.float32)

    def decode(
        self, action: NDArray[np.float32], scope: Scope, problem: Problem, partial: PartialPlan, layer: str | None
    ) -> PartialPlan:
        """Applies the entries of `action`, in [-1, 1], that belong to `scope`; the others are not read in this step."""
        for unit, component in zip(action, self.components, strict=True):
            if component.scope == scope:
                partial = component.decode(float(unit), problem, partial, layer)
        return partial
