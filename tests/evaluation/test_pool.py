"""Evaluation in processes: the same measurements in the same order, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from autoprune.agents import AGENTS
from autoprune.agents.base import Agent
from autoprune.agents.harness import search
from autoprune.envs import Problem, PruneEnv
from autoprune.envs.trial import Trial
from autoprune.errors import AutopruneError, ConfigError
from autoprune.evaluation.measurement import CachedEvaluate, Evaluate, Evaluated
from autoprune.evaluation.pool import ProcessPool, cores
from autoprune.plan import Plan
from autoprune.registry import Choice
from autoprune.testing import fake_problem

PROBLEM = fake_problem()
PLANS = [PROBLEM.uniform(0.1 * (index + 1)) for index in range(6)]


@dataclass(frozen=True)
class Troubled(Evaluate):
    """Fake measurements; some plans raise, or kill the process that evaluates them: always, or the first time.

    `folder` gets a file an evaluation, named after the plan's index and the process.
    """

    folder: Path
    raising: tuple[int, ...] = ()
    deadly: tuple[int, ...] = ()
    deadly_once: tuple[int, ...] = ()
    slow_s: float = 0.0

    def __call__(self, plan: Plan) -> Evaluated:
        index = PLANS.index(plan)
        first = not list(self.folder.glob(f"{index}-*"))
        (self.folder / f"{index}-{os.getpid()}").touch()
        time.sleep(self.slow_s)
        if index in self.deadly or (first and index in self.deadly_once):
            os.kill(os.getpid(), signal.SIGKILL)
        if index in self.raising:
            raise AutopruneError(f"plan {index} cannot be had")
        return PROBLEM.evaluate(plan)

    def evaluated(self) -> list[int]:
        return sorted(int(path.name.split("-")[0]) for path in self.folder.iterdir())

    def processes(self) -> set[int]:
        return {int(path.name.split("-")[1]) for path in self.folder.iterdir()}


@dataclass(frozen=True)
class Unsendable(Evaluate):
    lock: object = field(default_factory=threading.Lock)

    def __call__(self, plan: Plan) -> Evaluated:
        return PROBLEM.evaluate(plan)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(PROBLEM.evaluate, 2) as made:
        yield made


@pytest.mark.slow
def test_what_nobody_waits_for_any_more_disturbs_nothing(pool: ProcessPool) -> None:
    next(pool.in_order(PLANS))
    assert pool.all(PLANS) == PROBLEM.evaluate.all(PLANS)


@pytest.mark.slow
def test_measurements_are_those_of_one_process_in_the_plans_order(pool: ProcessPool) -> None:
    wanted = [PROBLEM.evaluate(plan) for plan in PLANS]
    assert pool.all(PLANS) == wanted
    assert pool.all(PLANS[::-1]) == wanted[::-1]
    assert sorted(pool.as_done(PLANS)) == list(enumerate(wanted))
    assert pool.all([]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "random", "uniform"])
def test_the_number_of_workers_changes_no_trial(name: str, pool: ProcessPool) -> None:
    def found(evaluate: Evaluate) -> tuple[Trial, ...]:
        problem = Problem(**{**vars(PROBLEM), "evaluate": evaluate})
        agent: Agent = AGENTS.create(Choice(name, {"net": [8]} if name == "ppo" else {}))
        return search(agent, PruneEnv(problem), 19, seed=3).trials

    assert found(CachedEvaluate(pool)) == found(PROBLEM.evaluate)


@pytest.mark.parametrize(("plans", "workers"), [(1, 2), (3, 1)])
def test_one_plan_or_one_worker_needs_no_process(plans: int, workers: int, tmp_path: Path) -> None:
    evaluate = Troubled(tmp_path)
    with ProcessPool(evaluate, workers) as pool:
        pool.all(PLANS[:plans])
        pool(PLANS[0])
    assert evaluate.processes() == {os.getpid()}


@pytest.mark.slow
def test_a_worker_killed_in_mid_trial_loses_nothing(tmp_path: Path) -> None:
    """Nor does a plan that kills every worker: it is an error, and what is done is kept."""
    evaluate = Troubled(tmp_path / "seen", deadly=(5,), deadly_once=(1,))
    evaluate.folder.mkdir()
    record = tmp_path / "evaluations.jsonl"
    with ProcessPool(evaluate, 2) as pool, pytest.raises(AutopruneError, match=r"3 workers died .* status -9 .*--"):
        CachedEvaluate(pool, record).all(PLANS)
    assert evaluate.evaluated() == [0, 1, 1, 2, 3, 4, 5, 5, 5]
    kept = {json.loads(line)["key"] for line in record.read_text().splitlines()}
    assert kept == {plan.key for plan in PLANS[:5]}
    assert CachedEvaluate(PROBLEM.evaluate, record).all(PLANS) == PROBLEM.evaluate.all(PLANS)
    assert CachedEvaluate(Troubled(tmp_path / "none"), record).all(PLANS[:5]) == PROBLEM.evaluate.all(PLANS[:5])


@pytest.mark.slow
def test_what_a_worker_raises_the_caller_gets(tmp_path: Path) -> None:
    with ProcessPool(Troubled(tmp_path, raising=(1,)), 2) as pool, pytest.raises(AutopruneError, match="plan 1 cannot"):
        pool.all(PLANS)


def test_no_worker_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 worker at least, not 0"):
        ProcessPool(PROBLEM.evaluate, 0)
    assert cores() >= 1


def test_a_task_that_cannot_be_sent_says_what_to_do() -> None:
    with ProcessPool(Unsendable(), 2) as pool, pytest.raises(ConfigError, match="--workers 1"):
        pool.all(PLANS)


def test_the_record_asks_for_each_unknown_plan_once(tmp_path: Path) -> None:
    evaluate = Troubled(tmp_path)
    cached = CachedEvaluate(evaluate)
    cached(PLANS[2])
    wanted = [PLANS[index] for index in (1, 2, 1, 0, 2)]
    assert cached.all(wanted) == PROBLEM.evaluate.all(wanted)
    assert evaluate.evaluated() == [0, 1, 2]


SCRIPT = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it
sys.path.insert(0, sys.argv[1])
from tests.evaluation.test_pool import PLANS, Troubled
from autoprune.evaluation.pool import ProcessPool

ProcessPool(Troubled(Path(sys.argv[2]), slow_s=600), 2).all(PLANS)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_caller(how: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    evaluate = Troubled(tmp_path / "seen")
    evaluate.folder.mkdir()
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, str(tmp_path / "script.py"), root, str(evaluate.folder)]
    caller = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    assert _soon(lambda: len(evaluate.evaluated()) == 2)
    os.killpg(caller.pid, how) if how == signal.SIGINT else caller.send_signal(how)
    caller.wait(60)
    assert _soon(lambda: not any(Path(f"/proc/{worker}").exists() for worker in evaluate.processes()))


def _soon(done: object, seconds: float = 60.0) -> bool:
    assert callable(done)
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(done())


@pytest.mark.parametrize(
    ("files", "allowed"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "20000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "9000000 100000"}, 8),
        ({"cpu.max": ""}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({}, 8),
    ],
)
def test_no_more_workers_than_a_container_has_time_for(
    files: dict[str, str], allowed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores(tmp_path) == allowed
