"""Many problems as one environment: every episode draws a problem and a target, for a policy that is to fit any."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np

from autoprune.envs.observation import LIMIT, length
from autoprune.envs.problem import Problem
from autoprune.envs.prune import Action, Observation, PruneEnv, Start
from autoprune.errors import AutopruneError
from autoprune.evaluation.measurement import Evaluate, Measurement
from autoprune.registry import Choice
from autoprune.target import Target

WORTH = 1.1  # times faster the fastest plan must be than all weights kept, or there is nothing to decide
FRACTIONS = (0.03, 0.06, 0.1, 0.15, *(round(0.2 + 0.05 * i, 2) for i in range(16)))
LEAST, MOST = 0.01, 0.3  # drop of the solver's plan: with less nothing is at stake, with more nothing is left
_FLOOR = 0.2  # of a reward: below it, advantages are not blown up

Evaluations = Mapping[str, Evaluate]


@dataclass(frozen=True, eq=False)
class TaskTarget:
    """A problem on a target at which it matters what is pruned.

    Attributes:
        name: of the problem.
        problem: with the target.
        fraction: where the target stands between the slowest and the fastest plan; 0 for a drop of the score.
    """

    name: str
    problem: Problem
    fraction: float = 0.0


def speedup_at(problem: Problem, fraction: float) -> float:
    """The speed-up a fraction of the way from all weights kept to `max_sparsity` everywhere, by the table."""
    slowest, fastest = (problem.table.predict_speedup(problem.uniform(s)) for s in (0.0, problem.max_sparsity))
    return max(1.01, slowest + fraction * (fastest - slowest))


def task_targets_of(
    name: str, problem: Problem, fractions: Sequence[float] = FRACTIONS, drops: Sequence[float] = ()
) -> list[TaskTarget]:
    """The targets of a problem whose solver's plan, really evaluated, loses something but not all.

    Args:
        name: of the problem.
        problem: whatever its target.
        fractions: of the way to the fastest plan, where speed-ups are asked for.
        drops: of the score that are allowed, where the fastest plan is asked for.
    """
    if speedup_at(problem, 1.0) < WORTH * speedup_at(problem, 0.0):
        return []
    targets = [(Target(speedup=speedup_at(problem, fraction), over="eager"), fraction) for fraction in fractions]
    targets += [(Target(accuracy_drop=drop), 0.0) for drop in drops]
    found: list[TaskTarget] = []
    for target, fraction in targets:
        aimed = replace(problem, target=target)
        plan = PruneEnv(aimed, (Choice("coefficient"),)).solved()
        measured = problem.evaluate(plan)
        if isinstance(measured, Measurement) and LEAST <= problem.dense_score - measured.score <= MOST:
            found.append(TaskTarget(name, aimed, fraction))
    return found


def advantage(reward: float, baseline: float) -> float:
    """What a reward is worth more than that of the solver's plan, in units of what that one loses."""
    return (reward - baseline) / _scale(baseline)


def _scale(baseline: float) -> float:
    return _FLOOR + abs(baseline)


class FamilyEnv(gymnasium.Env[Observation, Action]):
    """Episodes of `PruneEnv` over many task targets.

    The reward is an advantage: what the plan is worth more than the solver's on the same task target, in units of what
    that one loses. So tasks count alike, whatever their scores, and 0 is the best rule known.

    Args:
        task_targets: drawn from alike by problem, then by target.
        actions: as of `PruneEnv`.
        cheap: problem's name -> a surrogate of its evaluation.
        measured_share: of the episodes that are evaluated for real.
        seed: of what is drawn.
        curves: whether the layers' curves are observed.
        start: as of `PruneEnv`; likewise `shaping` and `gamma`.

    Raises:
        AutopruneError: there are no task targets.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - Gymnasium declares it so

    def __init__(
        self,
        task_targets: Sequence[TaskTarget],
        actions: Sequence[Choice],
        cheap: Evaluations,
        *,
        measured_share: float = 0.0,
        seed: int = 0,
        curves: bool = True,
        start: Start = "knapsack",
        shaping: float = 0.0,
        gamma: float = 1.0,
    ) -> None:
        if not task_targets:
            raise AutopruneError(
                "no task of the family has a target at which pruning costs between "
                f"{100 * LEAST:g} and {100 * MOST:g} points: draw more tasks, or allow a higher env.max_sparsity."
            )
        self._by_name: dict[str, list[TaskTarget]] = {}
        for task_target in task_targets:
            self._by_name.setdefault(task_target.name, []).append(task_target)
        self.action_choices = tuple(actions)
        self._cheap, self._share = cheap, measured_share
        self._settings: tuple[Any, ...] = (shaping, gamma, start, curves)
        self.gamma, self.shaping, self.start, self.curves = gamma, shaping, start, curves
        self._made: dict[tuple[int, bool], tuple[PruneEnv, float]] = {}  # shared by copies
        self._envs: dict[tuple[int, bool], tuple[PruneEnv, float]] = {}  # own
        first = self._environment(task_targets[0], cheaply=True)[0]
        self.action_space: gymnasium.spaces.Box = first.action_space  # type: ignore[assignment]  # as PruneEnv's
        self.observation_space = gymnasium.spaces.Box(-LIMIT, LIMIT, (length(len(actions)),), np.float32)
        self.steps_per_episode = round(
            float(
                np.mean(
                    [
                        1 + len(task_target.problem.inventory.layers) * first.actions.of_layers
                        for task_target in task_targets
                    ]
                )
            )
        )
        self._draws = np.random.default_rng(seed)
        self._env, self._baseline, self._task_target, self._cheaply = first, 0.0, task_targets[0], True

    def twin(self, seed: int) -> FamilyEnv:
        """Another environment of the same family, with draws of its own; what takes long to make is made once."""
        twin = copy.copy(self)
        twin._envs = {}
        twin.reseed((seed,))
        return twin

    def reseed(self, seed: Sequence[int]) -> None:
        """Draws from here on as an environment made with this seed would."""
        self._draws = np.random.default_rng(list(seed))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.reseed((seed,))
        names = list(self._by_name)
        targets = self._by_name[names[self._draws.integers(len(names))]]
        self._task_target = targets[self._draws.integers(len(targets))]
        self._cheaply = self._draws.random() >= self._share
        self._env, self._baseline = self._environment(self._task_target, self._cheaply)
        return self._env.reset()

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        observation, reward, plan = self._env.advance(action)
        scale = _scale(self._baseline)
        if plan is None:
            return observation, reward / scale, False, False, {}
        trial = self._env.tried(plan)
        info: dict[str, Any] = {
            "trial": trial.to_json(),
            "name": self._task_target.name,
            "measured": not self._cheaply,
            "advantage": advantage(trial.reward, self._baseline),
        }
        if not self._cheaply and isinstance(trial.evaluated, Measurement):
            predicted = self._cheap[self._task_target.name](plan)
            if isinstance(predicted, Measurement):
                info["surrogate_error"] = abs(predicted.score - trial.evaluated.score)
        return observation, (float(trial.reward + reward) - self._baseline) / scale, True, False, info

    def _environment(self, task_target: TaskTarget, cheaply: bool) -> tuple[PruneEnv, float]:
        """The environment of a task target, and the reward of the solver's plan in it."""
        key = (id(task_target), cheaply)
        if key not in self._made:
            problem = (
                replace(task_target.problem, evaluate=self._cheap[task_target.name]) if cheaply else task_target.problem
            )
            env = PruneEnv(problem, self.action_choices, *self._settings)
            self._made[key] = env, env.tried(env.solved()).reward
        if key not in self._envs:
            env, baseline = self._made[key]
            self._envs[key] = copy.copy(env), baseline  # an episode's state is its own; the rest never changes
        return self._envs[key]
