"""CMA-ES over whole episodes, by the library cmaes: a search that starts somewhere and narrows down."""

from __future__ import annotations

import math

import numpy as np
from cmaes import CMA
from numpy.typing import NDArray

from autoprune.agents.base import Actor, OnTrial, run_episodes
from autoprune.envs.prune import PruneEnv

Numbers = NDArray[np.float64]


def evolve(env: PruneEnv, start: Numbers, spread: float, episodes: int, seed: int, on_trial: OnTrial) -> None:
    """Runs `episodes` episodes, the first of them `start` itself.

    Args:
        env: the problem, as episodes.
        start: the actions of a whole episode, (steps, components), in [-1, 1].
        spread: standard deviation of the first generation.
        episodes: how many.
        seed: of what is drawn.
        on_trial: takes each trial.
    """
    read = _read(env)
    mean = start[read].astype(np.float64)
    bounds = np.tile([-1.0, 1.0], (len(mean), 1))
    generation = 4 + math.floor(3 * math.log(max(2, len(mean))))
    if len(mean) < 2:
        raise ValueError("CMA-ES needs two numbers to choose at least")
    search = CMA(mean=mean, sigma=spread, bounds=bounds, seed=seed % 2**32, population_size=generation)
    for begun in range(0, episodes, generation):
        asked = [mean if begun + place == 0 else search.ask() for place in range(min(generation, episodes - begun))]
        rewards = []
        for trial in run_episodes(env, [_acting(env, read, values) for values in asked]):
            on_trial(trial)
            rewards.append(-trial.reward)
        if len(asked) == generation:
            search.tell(list(zip(asked, rewards, strict=True)))


def _read(env: PruneEnv) -> NDArray[np.bool_]:
    """Which numbers of an episode's actions are read: (steps, components)."""
    of_run = np.array([component.scope == "run" for component in env.actions.components])
    return np.array([of_run if step == 0 else ~of_run for step in range(env.steps_per_episode)])


def _acting(env: PruneEnv, read: NDArray[np.bool_], values: Numbers) -> Actor:
    actions = np.zeros(read.shape, np.float32)
    actions[read] = values

    def act(observation: NDArray[np.float32], step: int) -> NDArray[np.float32]:
        return np.asarray(actions[step])

    return act
