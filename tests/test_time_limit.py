"""A search that is given so many minutes: it stops, its best plan so far is taken, and it can go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoprune.agents import AGENTS
from autoprune.agents.harness import search
from autoprune.cli.options import checked_minutes
from autoprune.config import parse_config
from autoprune.envs import PruneEnv
from autoprune.errors import ConfigError, FileError
from autoprune.files import read_json, read_lines, write_json
from autoprune.pipeline.run import Run
from autoprune.pipeline.time_limit import TimeLimit
from autoprune.registry import Choice
from autoprune.testing import FakeClock, fake_problem, save_fake_table

CONFIG = parse_config(
    {
        "task": {"name": "digits", "widths": [8, 16]},
        "dense": {"epochs": 1, "learning_rate": 0.1},
        "target": {"accuracy_drop": 0.5},
        "env": {"min_saving": 0.0, "recovery": "none", "timing": "table"},
        "search": {"agent": "random", "episodes": 5},
    },
    "test",
)


def test_the_time_of_all_processes_counts(tmp_path: Path) -> None:
    path = tmp_path / "minutes.json"
    assert not TimeLimit(path, None, FakeClock(1e6)).over()
    assert not path.exists(), "no limit, nothing to remember"
    first = TimeLimit(path, 1.0, FakeClock(25.0))
    assert [first.over(), first.over()] == [False, False]  # 50 seconds; then it is killed
    again = TimeLimit(path, None, FakeClock(9.0))
    assert again.minutes == 1.0
    assert [again.over(), again.over()] == [False, True]
    assert TimeLimit(path, None, FakeClock(0.0)).over(), "over is over"
    assert not TimeLimit(path, 2.0, FakeClock(1.0)).over(), "but for who gives more"
    write_json(path, {"minutes": 1.0})
    with pytest.raises(FileError, match="give --minutes again"):
        TimeLimit(path, 1.0, FakeClock())


@pytest.mark.parametrize("agent", ["random", "cma_es"])  # one goes on, the other plays all episodes again
def test_a_search_ends_with_its_time_and_is_not_played_again(agent: str, tmp_path: Path) -> None:
    def limited(minutes: float | None) -> int:
        limit = TimeLimit(tmp_path / "minutes.json", minutes, FakeClock(10.0))
        made, env = AGENTS.create(Choice(agent)), PruneEnv(fake_problem())
        return len(search(made, env, 20, 0, directory=tmp_path, over=limit.over).trials)

    assert limited(1.0) == 6
    before = (tmp_path / "trials.jsonl").read_bytes()
    assert limited(None) == 6
    assert (tmp_path / "trials.jsonl").read_bytes() == before
    assert limited(10.0) == 20
    assert (tmp_path / "trials.jsonl").read_bytes().startswith(before)


@pytest.mark.slow
def test_a_run_takes_the_best_plan_that_it_had_time_for(tmp_path: Path) -> None:
    run = Run(CONFIG, tmp_path / "run", clock=FakeClock(2.0), minutes=0.1)  # three evaluations
    save_fake_table(run)
    found = run.searched
    assert len(found.trials) == 1, "one episode is always played"
    tried = [trial for trials in found.rules.values() for trial in trials]
    assert len(tried) == 3
    assert found.best.reward == max(trial.reward for trial in (*tried, *found.trials))
    evaluations = run.directory / "search" / "evaluations.jsonl"
    assert len(read_lines(evaluations, "the evaluations")) <= 4
    assert Run(CONFIG, run.directory, clock=FakeClock(2.0)).searched == found, "in another process, too"
    more = Run(CONFIG, run.directory, clock=FakeClock(2.0), minutes=60.0).searched
    assert len(more.trials) == 5
    assert sum(map(len, more.rules.values())) > 3
    run.searched.best.plan.save(run.directory / "plan.json")
    assert Run(CONFIG, run.directory, minutes=90.0).searched.trials == more.trials
    assert read_json(run.directory / "search" / "minutes.json", "the time")["minutes"] == 60.0


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_minutes_are_above_zero(minutes: float) -> None:
    with pytest.raises(ConfigError, match="--minutes must be above 0"):
        checked_minutes(minutes)
