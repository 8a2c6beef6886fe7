"""The baseline of every report: the uniform rule at exactly the speed-up an agent reached."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from autoprune.agents.base import always, run_episode
from autoprune.envs.prune import PruneEnv
from autoprune.envs.rewards import terminal_reward
from autoprune.envs.trial import Trial
from autoprune.evaluation.measurement import Failure, Measurement

CLOSE = 0.02  # measured speed-ups this near to each other count as the same
SLOWEST = 1.01  # a target must be above 1
_CORRECTIONS = 6  # of the predicted speed-up: a measurement is noisy, and several bracket the figure


def uniform_at(env: PruneEnv, speedup: float) -> Trial | None:
    """The best uniform plan whose *measured* speed-up is `speedup`, within CLOSE below or any amount above.

    Every combination of the actions' other choices is tried, each recalibrated until its measurement meets the
    figure. None when no uniform plan is that fast. The reward is scored against `speedup`.
    """
    env = env.alike()
    reachable = env.reachable_speedup()
    if reachable <= SLOWEST:
        return None
    grid = list(itertools.product(*(component.anchors() for component in env.actions.components)))
    fast: list[Trial] = []
    for units in grid:
        action = np.array(units, dtype=np.float32)
        predicted = speedup
        for _ in range(_CORRECTIONS):
            trial = _trial_at(env, action, min(max(SLOWEST, predicted), reachable))
            if isinstance(trial.evaluated, Failure):
                break
            measured = trial.evaluated.speedup
            if measured >= speedup * (1 - CLOSE):
                fast.append(trial)
            if abs(measured / speedup - 1) <= CLOSE:
                break
            predicted *= (speedup / measured) ** 0.7
    if not fast:
        return None
    best = max(fast, key=lambda trial: trial.measurement.score)
    return replace(best, reward=reward_at(env, best.measurement, speedup))


def reward_at(env: PruneEnv, measured: Measurement, speedup: float) -> float:
    """The reward of a measured plan had the target been `speedup` over torch eager."""
    return terminal_reward(env.problem.at(max(SLOWEST, speedup)), measured).total


def _trial_at(env: PruneEnv, action: NDArray[np.float32], predicted: float) -> Trial:
    """The trial of one action in every step, projected to a speed-up that the latency table predicts."""
    return run_episode(env.of(env.problem.at(predicted)), always(action))
