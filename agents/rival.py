"""The uniform rule at exactly the speed-up an agent reached: the comparison every report carries."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from autoprune.agents.base import run_episode
from autoprune.envs.prune import PruneEnv
from autoprune.envs.rewards import terminal_reward
from autoprune.envs.trial import Trial
from autoprune.evaluation.measurement import Failure, Measurement
from autoprune.target import Target

CLOSE = 0.02  # measured speed-ups this near to each other count as the same
SLOWEST = 1.01  # a target must be above 1
_CORRECTIONS = 6  # a measurement is noisy: several aims bracket the figure


def uniform_at(env: PruneEnv, speedup: float) -> Trial | None:
    """The best uniform plan whose *measured* speed-up is `speedup`, within CLOSE below or any amount above.

    Every combination of the actions' other choices is tried, each aimed again until its measurement meets the
    figure. None when no uniform plan is that fast. The reward is scored against `speedup`.
    """
    env = env.alike()
    reachable = env.reachable_speedup()
    if reachable <= SLOWEST:
        return None
    grid = list(itertools.product(*(component.anchors() for component in env.actions.components)))
    found: list[Trial] = []
    for units in grid:
        action = np.array(units, dtype=np.float32)
        aim = speedup
        for _ in range(_CORRECTIONS):
            trial = _aimed(env, action, min(max(SLOWEST, aim), reachable))
            if isinstance(trial.evaluated, Failure):
                break
            measured = trial.evaluated.speedup
            if measured >= speedup * (1 - CLOSE):
                found.append(trial)
            if abs(measured / speedup - 1) <= CLOSE:
                break
            aim *= (speedup / measured) ** 0.7
    if not found:
        return None
    best = max(found, key=lambda trial: trial.measurement.score)
    return replace(best, reward=reward_at(env, best.measurement, speedup))


def reward_at(env: PruneEnv, measured: Measurement, speedup: float) -> float:
    """The reward of a measured plan had the target been `speedup`."""
    return terminal_reward(replace(env.problem, target=Target(speedup=max(SLOWEST, speedup))), measured).total


def _aimed(env: PruneEnv, action: NDArray[np.float32], aim: float) -> Trial:
    return run_episode(env.of(replace(env.problem, target=Target(speedup=aim))), lambda _, __: action)
