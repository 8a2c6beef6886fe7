"""Evaluation in processes: plans go to whichever worker is free, and a worker that dies loses nothing but time."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from autoprune.errors import ConfigError
from autoprune.evaluation.measurement import Evaluate, Evaluated
from autoprune.plan import Plan
from autoprune.processes.workers import Workers


def cores(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may use: those it may run on, and no more than its container's share of time is worth.

    Args:
        groups: where Linux tells of control groups; a container sees its own there.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    first, second = groups / "cpu" / "cpu.cfs_quota_us", groups / "cpu" / "cpu.cfs_period_us"
    try:
        now = groups / "cpu.max"  # since the second version: the share, or max, and the period
        share, period = (now.read_text().split() if now.exists() else (first.read_text(), second.read_text()))[:2]
        return max(1, min(count, math.ceil(int(share) / int(period)))) if int(share) > 0 else count
    except (OSError, ValueError, ArithmeticError):
        return count  # there is no limit


class Pool(Evaluate):
    """An evaluation with workers of its own; a context manager that ends them."""

    @abstractmethod
    def close(self) -> None:
        """Ends the workers, whatever they are doing; a later evaluation starts them again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _OneThread:
    """An evaluation in a worker: one torch thread, where it does not say otherwise."""

    evaluate: Evaluate

    def __call__(self, plan: Plan) -> Evaluated:
        torch.set_num_threads(1)
        return self.evaluate(plan)


class ProcessPool(Pool):
    """Several plans are evaluated in processes of this machine, a single one in the caller's.

    The workers start with the first evaluation of several plans. Each gets the evaluation once, as it is then.

    Args:
        evaluate: evaluates a single plan, and all of them where there is one worker.
        workers: at most so many processes; 1 makes none.
        each: what a worker evaluates with, one torch thread each if it does not say otherwise; None: `evaluate`.

    Raises:
        ConfigError: there is no worker.
        AutopruneError: while evaluating: a plan's workers died again and again; or what a worker raised.
    """

    def __init__(self, evaluate: Evaluate, workers: int, each: Evaluate | None = None) -> None:
        if workers < 1:
            raise ConfigError(f"there must be 1 worker at least, not {workers}.")
        self._evaluate, self._count = evaluate, workers
        self._workers = Workers(_OneThread(each or evaluate), workers, named=lambda plan: plan.key)

    def __call__(self, plan: Plan) -> Evaluated:
        return self._evaluate(plan)

    def as_done(self, plans: Sequence[Plan]) -> Iterator[tuple[int, Evaluated]]:
        """Yields (index, measurement) in the order of completion; plans begin in their own order."""
        if min(self._count, len(plans)) < 2:
            return self._evaluate.as_done(plans)
        return self._workers.as_done(plans)

    def close(self) -> None:
        """Kills the workers, whatever they are doing: they keep nothing that a kill could lose."""
        self._workers.close()
