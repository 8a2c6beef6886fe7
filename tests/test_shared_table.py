"""One latency table serves all targets and run directories of a model on this machine."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoprune.config import parse_config
from autoprune.errors import FileError, StaleTable
from autoprune.evaluation import profile
from autoprune.files import read_json, write_json
from autoprune.latency.machine import machine_identity
from autoprune.latency.table import TABLE_VERSION, LatencyTable
from autoprune.pipeline import preparation, retarget
from autoprune.pipeline.run import Run
from autoprune.registry import Choice
from autoprune.testing import fake_table
from tests.helpers import SMALL_TOML

Open = Callable[..., Run]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The dense times of the tables that were measured: each takes a millisecond more."""
    times: list[float] = []

    def profile_table(subject: Any, patterns: Any, settings: Any, *_: Any, **__: Any) -> LatencyTable:
        table = fake_table(subject.inventory, patterns)
        times.append(table.dense_ms + len(times))
        return replace(table, dense_ms=times[-1], settings=settings, machine=machine_identity())

    monkeypatch.setattr(profile, "cache_folder", lambda: tmp_path / "cache")  # the dense model is the tests' own
    monkeypatch.setattr(preparation, "profile_table", profile_table)
    monkeypatch.setattr(retarget, "profile_table", profile_table)
    return times


@pytest.fixture
def opened(tmp_path: Path, measured: list[float]) -> Open:
    """A run with a target, in a directory of this name."""

    def open_run(name: str, target: str, *, fresh: bool = False, **latency: int) -> Run:
        sections = tomllib.loads(f"target = {target}\n{SMALL_TOML}")
        sections["task"]["widths"] = [8]
        sections["latency"] = {**sections.get("latency", {}), **latency}
        return Run(parse_config(sections, "test"), tmp_path / name, fresh_table=fresh)

    return open_run


def test_another_target_in_another_directory_measures_no_table_again(opened: Open, measured: list[float]) -> None:
    first = opened("first", "{speedup = 2.0}")
    assert not first.preparation.table_is_known
    table = first.preparation.table
    second = opened("second", "{accuracy_drop = 0.1}")
    assert second.preparation.table_is_known
    assert second.preparation.table == table
    assert len(measured) == 1
    assert (first.directory / "latency.json").read_bytes() == (second.directory / "latency.json").read_bytes()


def test_what_the_table_holds_for_is_measured_apart(opened: Open, measured: list[float]) -> None:
    for number, latency in enumerate(({}, {"batch": 2}, {"profile_samples": 7})):
        assert opened(f"run-{number}", "{speedup = 2.0}", **latency).preparation.table
    assert len(measured) == 3


def test_a_release_that_measures_otherwise_takes_no_table_of_an_older_one(
    opened: Open, measured: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert opened("old", "{speedup = 2.0}").preparation.table
    monkeypatch.setattr(profile, "TABLE_VERSION", TABLE_VERSION + 1)
    assert not opened("new", "{speedup = 2.0}").preparation.table_is_known


def test_a_table_that_is_measured_anew_is_everyones(opened: Open, measured: list[float]) -> None:
    assert opened("first", "{speedup = 2.0}").preparation.table.dense_ms == measured[0]
    assert opened("first", "{speedup = 2.0}", fresh=True).preparation.table.dense_ms == measured[1]
    assert opened("third", "{speedup = 2.0}").preparation.table.dense_ms == measured[1]
    assert len(measured) == 2


def test_the_table_of_another_machine_is_refused(opened: Open, tmp_path: Path) -> None:
    assert opened("first", "{speedup = 2.0}").preparation.table
    (path,) = (tmp_path / "cache").glob("latency-*.json")
    table = read_json(path, "the table")
    write_json(path, {**table, "machine": {**table["machine"], "cpu": "Z80"}})
    with pytest.raises(StaleTable, match="Z80"):
        _ = opened("second", "{speedup = 2.0}").preparation.table


def test_without_a_cache_every_run_measures(
    opened: Open, measured: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise FileError("the cache cannot be written.")

    monkeypatch.setattr(profile, "check_cache", none)
    for name in ("first", "second"):
        run = opened(name, "{speedup = 2.0}")
        assert not run.preparation.table_is_known
        assert run.preparation.table
    assert len(measured) == 2


def test_hooks_without_a_file_share_the_table(opened: Open, measured: list[float]) -> None:
    run = opened("first", "{speedup = 2.0}")
    inputs = run.task.example_inputs(1)
    pattern = Choice("group", {"size": 8})
    made = [retarget.latency_table(run.dense, inputs, run.prepared.inventory, pattern) for _ in range(2)]
    assert made[0] == made[1]
    assert len(measured) == 1
