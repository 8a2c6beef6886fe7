"""Evaluation in processes: plans go to whichever worker is free, and a worker that dies loses nothing but time."""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import threading
import traceback
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING, Any, Self

import cloudpickle
import torch

from autoprune.errors import AutopruneError, ConfigError
from autoprune.evaluation.measurement import Evaluate, Measurement
from autoprune.plan import Plan

RETRIES = 2  # of a plan whose worker died
if TYPE_CHECKING:
    Channel = connection.Connection[Any, Any]


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
class _Worker:
    """A process, and this side of the pipe to it."""

    process: SpawnProcess
    channel: Channel

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.channel.close()


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
        self._evaluate, self._each, self._count = evaluate, each or evaluate, workers
        self._workers: list[_Worker] = []
        self._sent: bytes | None = None

    def __call__(self, plan: Plan) -> Measurement:
        return self._evaluate(plan)

    def as_done(self, plans: Sequence[Plan]) -> Iterator[tuple[int, Measurement]]:
        """Yields (index, measurement) in the order of completion; plans begin in their own order."""
        if min(self._count, len(plans)) < 2:
            yield from self._evaluate.as_done(plans)
            return
        done = False
        try:
            yield from self._spread(plans)
            done = True
        finally:
            if not done:  # workers hold plans that nobody waits for any more
                self.close()

    def _spread(self, plans: Sequence[Plan]) -> Iterator[tuple[int, Measurement]]:
        todo = deque(range(len(plans)))
        deaths = dict.fromkeys(todo, 0)
        while len(self._workers) < min(self._count, len(plans)):
            self._started()
        idle = list(self._workers)
        busy: dict[Channel, tuple[_Worker, int]] = {}
        while todo or busy:
            while todo and idle:
                worker, index = idle.pop(), todo.popleft()
                busy[worker.channel] = worker, index
                _send(worker.channel, plans[index])
            ready = connection.wait(list(busy))
            for channel in [channel for channel in busy if channel in ready]:
                worker, index = busy.pop(channel)
                try:
                    outcome = worker.channel.recv()
                except (EOFError, OSError):
                    worker.end()
                    self._workers.remove(worker)
                    deaths[index] += 1
                    _check_deaths(plans[index], deaths[index], worker.process.exitcode)
                    todo.appendleft(index)
                    idle.append(self._started())
                    continue
                idle.append(worker)
                if isinstance(outcome, Exception):
                    raise outcome
                yield index, outcome

    def _started(self) -> _Worker:
        if self._sent is None:
            self._sent = _picklable(self._each)
            atexit.register(self.close)  # before multiprocessing waits for what is still running
        context = get_context("spawn")  # a fork would copy locks that torch's threads hold
        ours, theirs = context.Pipe()
        # Not a daemon: a user's DataLoader may have workers of its own.
        process = context.Process(target=_work, args=(theirs, self._sent), name="autoprune worker")
        process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours))
        return self._workers[-1]

    def close(self) -> None:
        """Kills the workers, whatever they are doing: they keep nothing that a kill could lose."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        if self._sent is not None:
            self._sent = None
            atexit.unregister(self.close)


def _picklable(evaluate: Evaluate) -> bytes:
    try:
        sent: bytes = cloudpickle.dumps(evaluate)
    except Exception as error:  # what may be wrong with a user's objects is without end
        raise ConfigError(
            f"the task cannot be sent to other processes ({error}). Use one worker (--workers 1), or give a model and "
            "data that can be pickled."
        ) from error
    return sent


def _send(channel: Channel, plan: Plan) -> None:
    try:
        channel.send(plan)
    except OSError:
        return  # it died waiting: reading from it tells


def _check_deaths(plan: Plan, deaths: int, status: int | None) -> None:
    if deaths > RETRIES:
        raise AutopruneError(
            f"{deaths} workers died evaluating the same plan, the last with status {status} (-9: killed, perhaps for "
            f"memory; else see what it wrote above). Use fewer workers (--workers). The plan: {plan.key}"
        )


def _work(channel: Channel, sent: bytes) -> None:
    """A worker's life: a plan comes, its measurement or what was raised goes back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the caller ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    evaluate: Evaluate = pickle.loads(sent)  # noqa: S301 - the caller's memory, not a file
    while True:
        try:
            plan: Plan = channel.recv()
        except (EOFError, OSError):
            return
        channel.send(_outcome(evaluate, plan))


def _outcome(evaluate: Evaluate, plan: Plan) -> Measurement | Exception:
    try:
        return evaluate(plan)
    except AutopruneError as error:
        return error
    except Exception:
        return RuntimeError(f"a worker failed:\n{traceback.format_exc()}")  # the error itself may not be picklable


def _end_with_parent() -> None:
    """A caller that is killed cannot end its workers, and a trial may take long."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
