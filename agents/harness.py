"""The harness every agent runs in: one budget, one trial log, one way to stop and go on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from autoprune.agents.base import Agent, succeeded
from autoprune.agents.halving import of_highest_fidelity
from autoprune.envs.prune import PruneEnv
from autoprune.envs.trial import Trial
from autoprune.errors import FileError
from autoprune.files import append_line, keep_lines, read_lines
from autoprune.latency.timer import torch_threads
from autoprune.plan import Plan
from autoprune.randomness import own_randomness

NOTABLE = 0.01  # of reward, a tenth of a point of accuracy: less is no improvement


@dataclass(frozen=True)
class SearchResult:
    """A search's outcome.

    Attributes:
        trials: all of the agent's, in order.
        halved: of successive halving, rung by rung; their rewards are of higher fidelities.
        finalists: the best trials, timed again, where the clock decides: the luckiest of many short timings looks best.
        rules: rule -> the trials of the plans it made before the agent began.
    """

    trials: tuple[Trial, ...]
    halved: tuple[Trial, ...] = ()
    finalists: tuple[Trial, ...] = ()
    rules: Mapping[str, tuple[Trial, ...]] = field(default_factory=dict)

    @property
    def all(self) -> tuple[Trial, ...]:
        """The rules' trials, then the agent's."""
        return (*itertools.chain.from_iterable(self.rules.values()), *self.trials)

    @property
    def best(self) -> Trial:
        """The best finalist; without any, the best of the highest fidelity. The earlier one of equals.

        Raises:
            NumericalError: all trials failed.
        """
        trials = self.finalists or of_highest_fidelity(succeeded([*self.all, *self.halved]))
        return max(trials, key=lambda trial: trial.rank)

    @property
    def plan(self) -> Plan:
        return self.best.plan


class TrialLog:
    """The trials of one search, a JSON line each: the agent's, then those of successive halving."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Trial]:
        lines = read_lines(self.path, "the trial log")
        try:
            return [Trial.from_json(line) for line in lines]
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"the trial log is corrupt: {self.path} ({error}). Delete it to search again.") from None

    def keep_first(self, count: int) -> None:
        """Drops the trials after `count`: a resumed learner plays them again, from the cache."""
        keep_lines(self.path, count)

    def append(self, trial: Trial) -> None:
        append_line(self.path, trial.to_json())


class _Stopped(Exception):
    """Ends an agent's search where nothing improves, or its time is over."""


def stalled(trials: Sequence[Trial], known_best: float) -> int:
    """How many of the last trials were no better, by `NOTABLE`, than the best before them."""
    best, since = known_best, 0
    for trial in trials:
        since = 0 if trial.reward > best + NOTABLE else since + 1
        best = max(best, trial.reward)
    return since


def _never() -> bool:
    return False


def search(
    agent: Agent,
    env: PruneEnv,
    episodes: int,
    seed: int,
    *,
    directory: Path | None = None,
    on_trial: Callable[[int, Trial], None] | None = None,
    on_resumed: Callable[[Sequence[Trial]], None] | None = None,
    patience: int | None = None,
    known_best: float = -math.inf,
    over: Callable[[], bool] = _never,
) -> SearchResult:
    """Runs `agent` for `episodes` episodes, resuming what `directory` holds.

    Args:
        agent: who chooses the actions.
        env: the problem, as episodes.
        episodes: the whole budget, those of an interrupted search included.
        seed: of everything the agent draws.
        directory: where ``trials.jsonl`` and the agent's checkpoint live; None keeps everything in memory.
        on_trial: called with (index, trial) after each new episode.
        on_resumed: called once, before the first, with the trials of the interrupted search.
        patience: the search stops after so many episodes without a better reward; None: never.
        known_best: the reward of the best plan that was there before.
        over: whether the search's time is over; asked after each episode. One episode is always played.
    """
    log = TrialLog(directory / "trials.jsonl") if directory is not None else None
    trials = [trial for trial in log.read() if trial.fidelity == 0] if log is not None else []
    done, ended = 0, bool(trials) and over()
    if log is not None and directory is not None and not ended:
        done = min(episodes, agent.resumable_episodes(directory, len(trials)))
        if done < len(trials):
            log.keep_first(done)  # those of successive halving go too: their evaluations are remembered
            del trials[done:]
    if on_resumed is not None:
        on_resumed(trials)

    def record(trial: Trial) -> None:
        if log is not None:
            log.append(trial)
        trials.append(trial)
        if on_trial is not None:
            on_trial(len(trials) - 1, trial)
        if over() or (patience is not None and stalled(trials, known_best) >= patience):
            raise _Stopped

    if ended or (patience is not None and stalled(trials, known_best) >= patience):
        return SearchResult(tuple(trials))
    # stable-baselines3 seeds the global generators; and networks this small run slower on two threads than on one.
    with own_randomness(), torch_threads(1), suppress(_Stopped):
        agent.search(env, episodes, seed, record, directory, done)
    return SearchResult(tuple(trials))
