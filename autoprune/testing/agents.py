"""Laws of every agent: the seed decides, the budget is kept, and a killed search resumes."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoprune.agents.base import Agent
from autoprune.agents.harness import SearchResult, search
from autoprune.envs.prune import PruneEnv
from autoprune.files import read_lines
from autoprune.testing.law import require
from autoprune.testing.stand_ins import fake_problem


def check_agent(make: Callable[[], Agent], *, episodes: int = 27, seed: int = 5) -> None:
    """Checks an agent in the environment, on a problem with an analytic score and latency.

    Args:
        make: returns a new agent; an agent has state, and every search needs one of its own.
        episodes: of each search. A learner's must reach past a checkpoint at two thirds of them, or its resumption is
            not checked.
        seed: of the searches.

    Raises:
        BrokenLaw: the agent breaks a law; the message says which.
    """
    whole = check_search(make, episodes, seed)
    check_search_resumes(make, whole, episodes, seed)


def check_search(make: Callable[[], Agent], episodes: int, seed: int) -> SearchResult:
    """Checks that the seed alone decides a search, and that the budget is kept; returns the search.

    Raises:
        BrokenLaw: the agent breaks a law.
    """
    state = _random_state()
    first, second = (search(make(), PruneEnv(fake_problem()), episodes, seed) for _ in range(2))
    require(_random_state() == state, make(), "leaves the caller's randomness alone")
    require(first.trials == second.trials, make(), "makes the same trials for the same seed")
    require(1 <= len(first.trials) <= episodes, make(), f"reports from 1 to {episodes} trials for {episodes} episodes")
    return first


def check_search_resumes(make: Callable[[], Agent], whole: SearchResult, episodes: int, seed: int) -> None:
    """Checks that a search killed at three quarters ends as `whole`, which never stopped, in memory and in its log.

    Raises:
        BrokenLaw: it ends otherwise.
    """
    last = len(whole.trials) * 3 // 4

    def kill(index: int, _: object) -> None:
        if index == last:
            raise _Killed

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        with suppress(_Killed):
            search(make(), PruneEnv(fake_problem()), episodes, seed, directory=directory, on_trial=kill)
        resumed = search(make(), PruneEnv(fake_problem()), episodes, seed, directory=directory)
        logged = read_lines(directory / "trials.jsonl", "the trials")
    require(resumed.trials == whole.trials, make(), "resumes a killed search as if it had never stopped")
    written = logged == [trial.to_json() for trial in whole.trials]
    require(written, make(), "reports each trial once, in order, whether killed or not")


class _Killed(Exception):
    """Stands for a killed process."""


def _random_state() -> tuple[Any, ...]:
    numpy_state = np.random.get_state()
    return (random.getstate(), str(numpy_state), torch.get_rng_state().tolist())
