"""EvoPress (Sieberling et al. 2024): evolution by level switches that keep the target, screened by cheap scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from autoprune.agents.base import BATCH, Agent, OnTrial
from autoprune.checks import check_counts
from autoprune.envs.curves import GRID, SPARSITIES
from autoprune.envs.knapsack import Indices, columns_up_to
from autoprune.envs.problem import Problem
from autoprune.envs.prune import PruneEnv
from autoprune.envs.rewards import as_trial
from autoprune.errors import ConfigError
from autoprune.plan import Plan

_TRIES = 20  # at a switch that keeps the target
_MOST_SWITCHES = 3  # in one child


class EvoPressAgent(Agent):
    """Keeps one plan; of its children the best that is better takes its place.

    A child differs from its parent by a few switches: one layer is pruned some levels further, another one gets back as
    many levels as the target allows. Of all children those are evaluated that lose least by the sensitivity curves,
    which cost no evaluation. The first plan treats every layer alike. Levels are the solver's sparsities.

    Args:
        offspring: children of a generation.
        survivors: of them that are evaluated; as many as `offspring`: all.
    """

    replays: ClassVar[bool] = True

    def __init__(self, offspring: int = 16, survivors: int = 4) -> None:
        check_counts("agent 'evopress'", {"offspring": offspring, "survivors": survivors}, most=BATCH)
        if survivors > offspring:
            raise ConfigError(f"agent 'evopress': survivors must be at most offspring, {offspring}, not {survivors}.")
        self.offspring, self.survivors = offspring, survivors

    def search(
        self, env: PruneEnv, episodes: int, seed: int, on_trial: OnTrial, directory: Path | None, done: int
    ) -> None:
        problem, levels = env.problem, _Levels(env.problem)
        parent = levels.start(env)
        best = env.tried(levels.plan(parent))
        on_trial(best)
        generation, tried = 0, 1
        while tried < episodes:
            draws = np.random.default_rng([seed, generation])
            children = [levels.mutated(parent, draws) for _ in range(self.offspring)]
            children = levels.least_loss(children, min(self.survivors, episodes - tried))
            plans = [levels.plan(child) for child in children]
            for child, plan, measured in zip(children, plans, problem.evaluate.in_order(plans), strict=True):
                trial = as_trial(problem, plan, measured)
                if not trial.failed and (best.failed or trial.rank > best.rank):
                    best, parent = trial, child
                on_trial(trial)
            generation, tried = generation + 1, tried + len(children)


class _Levels:
    """Plans as the level of each layer, (layers,): places in the list of sparsities."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self._columns = problem, columns_up_to(problem.max_sparsity)
        self._base = problem.uniform(0.0)

    def plan(self, levels: Indices) -> Plan:
        """The plan of these levels, in the problem's pattern and by its criterion."""
        sparsities = SPARSITIES[self._columns[levels]].tolist()
        return self._base.with_sparsities(dict(zip(self._problem.inventory.names, sparsities, strict=True)))

    def start(self, env: PruneEnv) -> Indices:
        """Every layer alike, on the target; where none has to be kept, the solver's levels."""
        count = len(self._problem.inventory.layers)
        if not self._problem.target.limits:
            solved = env.solved()
            wanted = [round(solved.layers[name].sparsity * GRID) for name in self._problem.inventory.names]
            return np.searchsorted(self._columns, wanted).astype(np.int64)
        alike = (np.full(count, level, np.int64) for level in range(len(self._columns)))
        last = np.full(count, len(self._columns) - 1, np.int64)
        return next((levels for levels in alike if self._problem.meets(self.plan(levels))), last)

    def mutated(self, parent: Indices, draws: np.random.Generator) -> Indices:
        """A child: one to three switches, few more often than many."""
        child = parent.copy()
        for _ in range(int(draws.integers(1, _MOST_SWITCHES + 1, 2).min())):
            child = self._switched(child, draws)
        return child

    def _switched(self, levels: Indices, draws: np.random.Generator) -> Indices:
        """One layer pruned further and another one less, on the target still; as it was where that cannot be found."""
        top = len(self._columns) - 1
        for _ in range(_TRIES):
            further, less = draws.integers(len(levels), size=2)
            step = int(draws.integers(1, _MOST_SWITCHES + 1))
            if further == less or levels[further] == top or levels[less] == 0:
                continue
            moved = levels.copy()
            moved[further] = min(top, levels[further] + step)
            if not self._problem.target.limits:
                moved[less] = max(0, levels[less] - step)
                return moved
            for level in range(levels[less]):  # as much as the target allows
                moved[less] = level
                if self._problem.meets(self.plan(moved)):
                    return moved
        return levels

    def least_loss(self, children: Sequence[Indices], count: int) -> list[Indices]:
        """Those whose layers lose least, one by one; equal children once, where there are enough others."""
        rows = np.arange(len(self._base.layers))
        lost = [float(self._problem.curves.loss[rows, self._columns[child]].sum()) for child in children]
        order = np.argsort(lost, kind="stable")
        first = {children[index].tobytes(): index for index in reversed(order)}
        distinct = [index for index in order if first[children[index].tobytes()] == index]
        again = [index for index in order if first[children[index].tobytes()] != index]
        return [children[index] for index in [*distinct, *again][:count]]
