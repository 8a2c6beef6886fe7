"""``autoprune/Prune-v0``: step 0 sets the run's hyper-parameters, then one step a layer, then the plan is measured.

Without an action that chooses for layers, an episode is step 0 alone: a search for a recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from autoprune.envs.actions import ACTIONS, ActionSpace
from autoprune.envs.actions.group_size import GroupSize
from autoprune.envs.observation import LIMIT, Observer, length
from autoprune.envs.problem import Problem
from autoprune.envs.projection import check_feasible, fastest, meet, meet_sparsity, project, release_useless
from autoprune.envs.rewards import as_trial, potential
from autoprune.plan import Plan
from autoprune.registry import Choice

START_SPARSITY = 0.5  # where an episode starts when no speed-up target says better

Observation = NDArray[np.float32]
Action = NDArray[np.float32]


class PruneEnv(gymnasium.Env[Observation, Action]):
    """One episode makes and measures one plan.

    Observation: `observation.NAMES` and the previous action, fixed length, scale-free. Action: ``Box[-1, 1]``, one
    entry a component of `actions`. Reward: potential-based shaping on the way, the measured one at the end. The last
    step's ``info["trial"]`` holds the plan, its measurement and the reward's terms as JSON.

    Args:
        problem: what to prune and how to evaluate it. Picklable when its `evaluate` is.
        actions: the components an agent may choose, by registry row.
        shaping: weight of the shaping; 0 leaves the terminal reward alone. The optimal policy is the same.
        gamma: the discount the agent is trained with; shaping needs the same one.

    Raises:
        InfeasibleTarget: before any episode, when no plan can reach the target.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - Gymnasium declares it so

    def __init__(
        self,
        problem: Problem,
        actions: Sequence[Choice] = (Choice("criterion"), Choice("sparsity"), Choice("group_size")),
        shaping: float = 1.0,
        gamma: float = 1.0,
    ) -> None:
        self.problem = problem
        self.action_choices = tuple(actions)
        self.actions = ActionSpace([(choice.name, ACTIONS.create(choice)) for choice in actions])
        self.shaping, self.gamma = shaping, gamma
        self.action_space: spaces.Box = self.actions.box  # type: ignore[assignment]  # narrower than Gymnasium's
        size = length(len(self.actions.components))
        self.observation_space = spaces.Box(-LIMIT, LIMIT, (size,), np.float32)
        self._observer = Observer(problem)
        self._start = self._starting_plan()
        self._plan = self._start
        self._step = 0
        self._previous = np.zeros(len(self.actions.components), np.float32)

    @property
    def steps_per_episode(self) -> int:
        """Step 0 and, where actions choose for layers, one a layer."""
        return 1 + len(self.problem.inventory.layers) * self.actions.of_layers

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self._plan, self._step = self._start, 0
        self._previous = np.zeros(len(self.actions.components), np.float32)
        return self._observe(), {}

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        names = self.problem.inventory.names
        before = self._potential()
        if self._step == 0:
            self._plan = self.actions.decode(action, "run", self.problem, self._plan, None)
        else:
            self._plan = self.actions.decode(action, "layer", self.problem, self._plan, names[self._step - 1])
        self._previous = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        self._step += 1
        if self._step < self.steps_per_episode:
            reward = self.shaping * (self.gamma * self._potential() - before)
            return self._observe(), float(reward), False, False, {}
        plan = self.finished(self._plan)
        trial = as_trial(self.problem, plan, self.problem.evaluate(plan))
        # The potential of a terminal state is 0, whatever was reached: that is what leaves the best policy alone.
        return self._observe(), float(trial["reward"] - self.shaping * before), True, False, {"trial": trial}

    def finished(self, plan: Plan) -> Plan:
        """The plan that is measured: on the budget when there is one, useless sparsity given back."""
        problem = self.problem
        if problem.target.sparsity is not None:
            return meet_sparsity(plan, problem.inventory, problem.target.sparsity, problem.max_sparsity)
        if problem.target.speedup is None:
            return release_useless(plan, problem.table)
        return project(plan, problem.table, problem.target.speedup, problem.max_sparsity)

    def reachable_speedup(self) -> float:
        """The best speed-up the latency table predicts for any pattern the actions can set."""
        problem = self.problem
        return max(fastest(plan, problem.table, problem.max_sparsity) for plan in self._uniforms())

    def _uniforms(self) -> list[Plan]:
        sized = [component.patterns for component in self.actions.components if isinstance(component, GroupSize)]
        patterns = [self.problem.pattern, *(pattern for patterns in sized for pattern in patterns)]
        return [replace(self.problem, pattern=pattern).uniform(START_SPARSITY) for pattern in patterns]

    def _starting_plan(self) -> Plan:
        problem, speedup = self.problem, self.problem.target.speedup
        if problem.target.sparsity is not None:
            return self.finished(problem.uniform(problem.target.sparsity))
        uniform = problem.uniform(START_SPARSITY)
        if speedup is None:
            return uniform
        check_feasible(self.reachable_speedup(), speedup, problem.max_sparsity)
        return meet(uniform, problem.table, speedup, problem.max_sparsity)

    def _potential(self) -> float:
        return potential(self.problem, self._plan, max(0, self._step - 1))

    def _observe(self) -> Observation:
        return self._observer.observe(self._plan, min(self._step, self.steps_per_episode - 1), self._previous)
