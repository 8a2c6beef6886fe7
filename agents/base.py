"""What an agent is: something that spends a budget of episodes of the environment looking for a good plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from autoprune.envs.prune import PruneEnv
from autoprune.envs.rewards import as_trial
from autoprune.envs.trial import Trial
from autoprune.errors import NumericalError
from autoprune.evaluation.measurement import Failure
from autoprune.plan import Plan

OnTrial = Callable[[Trial], None]
OnFigures = Callable[[int, Mapping[str, float]], None]  # (index of the last episode, what a learner shows of itself)
Actor = Callable[[NDArray[np.float32], int], NDArray[np.float32]]  # (observation, step) -> action
BATCH = 64  # plans made before the first of them is measured: many times the workers of a machine


class Agent(ABC):
    """Searches by running episodes; the harness keeps the trials.

    Attributes:
        replays: whether a resumed search makes its state anew by playing every episode again, from the record of
            evaluated plans.
    """

    replays: ClassVar[bool] = False

    @abstractmethod
    def search(
        self, env: PruneEnv, episodes: int, seed: int, on_trial: OnTrial, directory: Path | None, done: int
    ) -> None:
        """Runs episodes `done` .. `episodes` and calls `on_trial` after each, in order.

        Args:
            env: the problem, as episodes.
            episodes: the whole budget.
            seed: of everything the agent draws.
            on_trial: takes each trial.
            directory: where a learner keeps its checkpoint; None keeps none.
            done: episodes that an earlier, interrupted call has already reported.
        """

    def resumable_episodes(self, directory: Path, logged: int) -> int:
        """How many of the `logged` episodes need not be run again; all of them for an agent without memory."""
        return 0 if self.replays else logged

    def watch(self, on_figures: OnFigures) -> None:  # noqa: B027 - only learners have any
        """Has a learner tell its losses and the like while it searches, by their tags; others have none."""

    def save_policy(self, directory: Path, env: PruneEnv) -> bool:
        """Writes the learned policy, if there is one, and says whether there was."""
        return False


def succeeded(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that have a measurement: those a plan is chosen from.

    Raises:
        NumericalError: none has.
    """
    reasons = [trial.evaluated.reason for trial in trials if isinstance(trial.evaluated, Failure)]
    if trials and len(reasons) == len(trials):
        raise NumericalError(
            f"all {len(trials)} trials failed, so that there is no plan to choose. The first: {reasons[0]} The "
            "others are in the trial log. Ask for a lower target, or recover otherwise before scoring (env.recovery)."
        )
    return [trial for trial in trials if not trial.failed]


def always(action: NDArray[np.float32]) -> Actor:
    """Takes the same action in every step."""
    return lambda observation, step: action


def run_episode(env: PruneEnv, act: Actor) -> Trial:
    """Plays one episode and returns its trial."""
    return next(run_episodes(env, [act]))


def run_episodes(env: PruneEnv, actors: Iterable[Actor]) -> Iterator[Trial]:
    """Plays an episode an actor, evaluating many plans at once; yields the trials in the actors' order.

    Only for actors that learn nothing from each other's trials: plans are made before those in front are measured.
    """
    waiting = iter(actors)
    while plans := [finished_plan(env, act) for act in islice(waiting, BATCH)]:
        for plan, measured in zip(plans, env.problem.evaluate.in_order(plans), strict=True):
            yield as_trial(env.problem, plan, measured)


def finished_plan(env: PruneEnv, act: Actor) -> Plan:
    """Plays one episode without evaluating its plan, and returns that."""
    observation, _ = env.reset()
    for step in count():
        observation, _, plan = env.advance(act(observation, step))
        if plan is not None:
            return plan
    raise AssertionError("an episode ends")
