"""``autoprune/Prune-v0``: step 0 sets the run's hyper-parameters, then one step a layer, then the plan is measured.

Without an action that chooses for layers, an episode is step 0 alone: a search for a recipe.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from autoprune.envs.actions import ACTIONS, ActionSpace
from autoprune.envs.actions.group_size import GroupSize
from autoprune.envs.curves import Decided
from autoprune.envs.knapsack import solve
from autoprune.envs.observation import LIMIT, NAMES, Observer, length
from autoprune.envs.partial_plan import PartialPlan
from autoprune.envs.problem import Problem
from autoprune.envs.projection import (
    check_feasible,
    check_limits,
    fastest,
    freed,
    meet_limits,
    project,
    release_useless,
)
from autoprune.envs.rewards import as_trial, potential
from autoprune.envs.trial import Trial
from autoprune.errors import AutopruneError, ConfigError, did_you_mean
from autoprune.metric import number
from autoprune.plan import Plan
from autoprune.registration import ENV_ID
from autoprune.registry import Choice

_ROUNDING = 1e-6  # that an action in float32 may be out of its range by
START_SPARSITY = 0.5  # where an episode starts when no speed-up target says better


class ActionError(AutopruneError, gymnasium.error.InvalidAction):
    """An action that is not in the action space."""


class StepError(AutopruneError, gymnasium.error.ResetNeeded):
    """A step outside of an episode."""


Observation = NDArray[np.float32]
Action = NDArray[np.float32]
Start = Literal["uniform", "knapsack"]
STARTS: tuple[Start, ...] = get_args(Start)
DEFAULT_ACTIONS = (Choice("criterion"), Choice("sparsity"), Choice("group_size"))


def check_episodes(shaping: object, gamma: object, start: object, curves: object) -> tuple[float, float]:
    """`shaping` and `gamma` as floats; raises ConfigError where one of the four is nothing that episodes can have."""
    weight, discount = number(shaping), number(gamma)
    if weight is None or not 0.0 <= weight < math.inf:
        raise ConfigError(f"shaping is a number from 0 up, not {shaping!r}.")
    if discount is None or not 0.0 < discount <= 1.0:
        raise ConfigError(f"gamma, a discount, is above 0 and at most 1, not {gamma!r}.")
    if start not in STARTS:
        raise ConfigError(f"an episode cannot start from {start!r}. {did_you_mean(str(start), STARTS)}")
    if not isinstance(curves, bool):
        raise ConfigError(f"curves is true or false, not {curves!r:.60}.")
    return weight, discount


class PruneEnv(gymnasium.Env[Observation, Action]):
    """One episode makes and measures one plan.

    Observation: `observation.NAMES` and the previous action, fixed length, scale-free. Action: ``Box[-1, 1]``, one
    entry a component of `actions`. Reward: potential-based shaping on the way, the measured one at the end. The last
    step's ``info["trial"]`` holds the plan, its measurement and the reward's terms as JSON.

    Args:
        problem: what to prune and how to evaluate it. Picklable when its `evaluate` is.
        actions: the components an agent may choose, by registry row, or created already.
        shaping: weight of the shaping, 0 or more; 0 leaves the terminal reward alone. The optimal policy is the same.
        gamma: the discount, in (0, 1], the agent is trained with; shaping needs the same one.
        start: the plan an episode starts with, on the target: every layer alike, or the solver's (`envs.knapsack`).
            Where an action guides the solver, it is the solver's.
        curves: whether the layers' curves are observed.

    Raises:
        ConfigError: there is no problem, or an argument is out of its range.
        InfeasibleTarget: before any episode, when no plan can reach the target.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - Gymnasium declares it so

    def __init__(
        self,
        problem: Problem | None = None,
        actions: Sequence[Choice | str] | ActionSpace = DEFAULT_ACTIONS,
        shaping: float = 1.0,
        gamma: float = 1.0,
        start: Start = "uniform",
        curves: bool = True,
    ) -> None:
        if not isinstance(problem, Problem):
            raise ConfigError(
                f"the environment needs a problem (autoprune.envs.Problem, such as a run's), not {problem!r:.60}: "
                f'gymnasium.make("{ENV_ID}", problem=run.problem), or task="digits" in its place.'
            )
        weight, discount = check_episodes(shaping, gamma, start, curves)
        self.problem = problem
        self.actions = actions if isinstance(actions, ActionSpace) else created_actions(actions)
        self.actions.check_precision(problem.precision)
        self.action_choices = self.actions.choices
        self.shaping, self.gamma = weight, discount
        self.start: Start = "knapsack" if self.actions.solved else start
        self.curves = curves
        self.action_space: spaces.Box = self.actions.box  # type: ignore[assignment]  # narrower than Gymnasium's
        size = length(len(self.actions.components))
        self.observation_space = spaces.Box(-LIMIT, LIMIT, (size,), np.float32)
        self._start = PartialPlan.of(self._starting_plan())
        self._observer = Observer(problem, self._start, curves)
        self._names = problem.inventory.names
        self._plan, self._step, self._decided, self._potential = self._start, self.steps_per_episode, Decided(), 0.0
        self._previous = np.zeros(len(self.actions.components), np.float32)

    def of(self, problem: Problem) -> PruneEnv:
        """The same environment of another problem."""
        return PruneEnv(problem, self.actions, self.shaping, self.gamma, self.start, self.curves)

    def alike(self) -> PruneEnv:
        """The same environment, but for layers' actions whose 0 treats every layer alike."""
        pairs = zip(self.action_choices, self.actions.components, strict=True)
        actions = [choice for choice, component in pairs if not component.solved]
        actions += [Choice("sparsity")] * self.actions.solved
        if self.actions.solved and len(self.problem.precisions) > 1 and not self.actions.plans_precision:
            actions.append(Choice("precision"))  # which the solver has chosen so far
        return PruneEnv(self.problem, actions, self.shaping, self.gamma, "uniform", self.curves)

    @property
    def observation_names(self) -> tuple[str, ...]:
        """What each number of an observation is: `observation.NAMES`, then the previous action's."""
        return (*NAMES, *(f"previous {name}" for name in self.action_names))

    @property
    def action_names(self) -> tuple[str, ...]:
        """What each number of an action chooses."""
        return self.actions.names

    @property
    def steps_per_episode(self) -> int:
        """Step 0 and, where actions choose for layers, one a layer."""
        return 1 + len(self.problem.inventory.layers) * self.actions.of_layers

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self._plan, self._step, self._decided, self._potential = self._start, 0, Decided(), 0.0
        self._previous = np.zeros(len(self.actions.components), np.float32)
        return self._observe(), {}

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        observation, reward, plan = self.advance(action)
        if plan is None:
            return observation, reward, False, False, {}
        trial = self.tried(plan)
        return observation, float(trial.reward + reward), True, False, {"trial": trial.to_json()}

    def advance(self, action: Action) -> tuple[Observation, float, Plan | None]:
        """A step without the evaluation, for those who evaluate many plans at once.

        Returns:
            The observation, the shaping's reward, and after the last step the finished plan: its terminal reward
            (`envs.rewards.as_trial`) is to be added.

        Raises:
            ActionError: the action is not in the action space.
            StepError: the episode has not begun, or is over.
        """
        if self._step >= self.steps_per_episode:
            raise StepError("there is no episode to take a step in: call reset() first, and again after the last step.")
        units = units_of(action, self.action_space, self.action_names)
        before = self._potential
        if self._step == 0:
            self._plan = self.actions.decode(units, "run", self.problem, self._plan, None)
        else:
            name = self._names[self._step - 1]
            self._plan = self.actions.decode(units, "layer", self.problem, self._plan, name)
            self._decided = self.problem.curves.decide(self._decided, self._plan.layers[name])
        self._previous = units
        self._step += 1
        if self._step < self.steps_per_episode:
            self._potential = potential(self.problem, self._decided)
            reward = self.shaping * (self.gamma * self._potential - before)
            return self._observe(), float(reward), None
        # The potential of a terminal state is 0, whatever was reached: that is what leaves the best policy alone.
        return self._observe(), float(-self.shaping * before), self.finished(self._plan)

    def tried(self, plan: Plan) -> Trial:
        """The trial of a plan, wherever it comes from: evaluated, with its reward."""
        return as_trial(self.problem, plan, self.problem.evaluate(plan))

    def finished(self, partial: PartialPlan) -> Plan:
        """The plan that is measured: on the budget when there is one, useless sparsity given back."""
        problem = self.problem
        if self.actions.solved:
            return freed(solve(problem, partial), problem)
        if not problem.target.limits:
            return release_useless(partial.plan, problem.table)
        return project(partial.plan, problem)

    def solved(self, greedily: bool = False) -> Plan:
        """What the solver makes of the sensitivity curves as they are."""
        return solve(self.problem, PartialPlan.of(self.problem.uniform(START_SPARSITY)), greedily)

    def reachable_speedup(self) -> float:
        """The best speed-up the latency table predicts for any pattern the actions can set, and any precision."""
        problem = self.problem
        return max(fastest(plan, problem.table, problem.max_sparsity) for plan in self._uniforms())

    def _uniforms(self) -> list[Plan]:
        sized = [component.patterns for component in self.actions.components if isinstance(component, GroupSize)]
        patterns = [self.problem.pattern, *(pattern for patterns in sized for pattern in patterns)]
        ways = itertools.product(patterns, self.problem.precisions)
        return [
            replace(self.problem, pattern=pattern, layer_precision=precision).uniform(START_SPARSITY)
            for pattern, precision in ways
        ]

    def _starting_plan(self) -> Plan:
        problem = self.problem
        if problem.required_speedup is not None:
            reachable, required = self.reachable_speedup(), problem.required_speedup
            over = problem.baseline_speedup
            check_feasible(reachable / over, required / over, problem.baseline_name, problem.max_sparsity)
        check_limits(problem)
        if self.start == "knapsack":
            return self.solved()
        uniform = problem.uniform(START_SPARSITY)
        return meet_limits(uniform, problem) if problem.target.limits else uniform

    def _observe(self) -> Observation:
        return self._observer.observe(self._decided, min(self._step, self.steps_per_episode - 1), self._previous)


def units_of(action: Any, space: spaces.Box, names: Sequence[str]) -> Action:
    """An action of a box from -1 to 1 as float32, its entries called `names`; raises ActionError where it is none."""
    try:
        units = np.asarray(action.detach() if isinstance(action, Tensor) else action)
    except (ValueError, TypeError, RuntimeError) as error:  # of lists of unequal lengths; of a tensor elsewhere
        raise ActionError(f"an action is an array of {len(names)} numbers, which this is not: {error}.") from None
    if units.dtype.kind not in "fiu" or units.shape != space.shape:
        raise ActionError(
            f"an action is an array of {len(names)} numbers, one each for {', '.join(names)}, not "
            f"{units.dtype} of shape {units.shape}."
        )
    exact = units.astype(np.float64)  # the least of the integers of a type has no absolute value among them
    if not (np.abs(exact) <= 1.0 + _ROUNDING).all():
        raise ActionError(f"an action's numbers are from -1 to 1, not {units.tolist()}.")
    return np.clip(exact, -1.0, 1.0).astype(np.float32)


def created_actions(actions: Sequence[Choice | str]) -> ActionSpace:
    """The components of these names; raises ConfigError where there are none, or one is unknown or there twice."""
    if isinstance(actions, str) or not isinstance(actions, Sequence):
        raise ConfigError(f"actions is a list of names or choices, not {actions!r}.")
    choices = [Choice.of(action) for action in actions]
    return ActionSpace([(choice, ACTIONS.create(choice)) for choice in choices])
