"""A run whose latency is measured on a device that runs no torch, which is lost again and again."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from autoprune.cli import app
from autoprune.config import Config, parse_config
from autoprune.errors import ConfigError, DeviceError, StaleTable
from autoprune.evaluation.devices import DEVICES
from autoprune.files import read_json, read_lines
from autoprune.pipeline.forecast import forecast
from autoprune.pipeline.results import report_of, results
from autoprune.pipeline.run import Run
from autoprune.report.run_report import write_report
from autoprune.report.summary import Summary
from tests.helpers import SMALL_TOML, CountingDevice


def config(**changes: object) -> Config:
    return parse_config(
        {
            "task": {"name": "digits", "widths": [8, 16]},
            "dense": {"epochs": 1, "learning_rate": 0.1},
            "device": "counting",
            "target": {"speedup": 1.5},
            "latency": {"samples": 12, "search_samples": 3, "profile_samples": 3},
            "env": {"actions": ["sparsity"], "min_saving": 0.0, "recovery": "none"},
            "search": {"agent": "random", "episodes": 3, "rules": False, "finalists": 2},
            "finetune": {"settings": {"epochs": 1, "learning_rate": 0.05}},
            **changes,
        },
        "test",
    )


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the registry makes the device one that configs may name."""
    monkeypatch.setattr(DEVICES, "_rows", {**DEVICES._rows, "counting": "tests.helpers:CountingDevice"})
    monkeypatch.setattr(CountingDevice, "measured", [])


def finish(directory: Path) -> str:
    run = Run(config(), directory)
    try:
        run.settle()
        return write_report(report_of(run))
    finally:
        run.lock.close()


@pytest.mark.slow
def test_a_run_on_a_device_that_is_lost_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials, lost, seen = tmp_path / "search" / "evaluations.jsonl", 0, list[object]()
    while True:
        monkeypatch.setattr(CountingDevice, "lost_after", len(CountingDevice.measured) + 7)
        before = read_lines(trials, "trials") if trials.exists() else []
        try:
            page = finish(tmp_path)
            break
        except DeviceError:
            lost += 1
            if trials.exists():
                assert read_lines(trials, "trials")[: len(before)] == before
            seen.append(len(CountingDevice.measured))
        assert lost < 40, seen
    assert lost >= 2
    assert CountingDevice.measured.count("layers") == 8, "cells of the table that were measured are kept"
    final = [each for each in CountingDevice.measured if each == "dense, repacked, repacked"]
    assert len(final) == 2, "12 rounds are two parts, and each is measured once"
    _says_where_it_was_measured(tmp_path, page)


def _says_where_it_was_measured(directory: Path, page: str) -> None:
    assert "as fast as the dense model repacked, timed in the same run on a counter, " in page
    assert "torch eager, " not in page.split("##")[0]
    assert "| device " in page
    assert "over dense" in page
    summary = Summary.read(directory)
    said = summary.to_json()
    assert said["device"] == "a counter"
    assert said["speedup_over_eager"] is None
    assert said["speedup_over_best"] >= 1.5
    assert not summary.missed
    rows = {row.name: row for row in summary.rows}
    assert rows.keys() == {"dense, torch eager", "dense, repacked", "masked", "repacked"}
    assert [name for name, row in rows.items() if row.latency is not None] == ["dense, repacked", "repacked"]
    assert all(row.score is not None for row in rows.values())
    assert read_json(directory / "results.json", "results")["machine"] == {"device": "a counter"}
    assert read_json(directory / "baselines.json", "baselines")["best"] == "repacked"


@pytest.mark.slow
def test_what_another_device_measured_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(tmp_path)
    monkeypatch.setattr(CountingDevice, "name", "another counter")
    run = Run(config(), tmp_path)
    with pytest.raises(StaleTable, match="device was 'a counter', here it is 'another counter'"):
        _ = run.preparation.table
    before = len(CountingDevice.measured)
    assert results(run)  # the final table is measured again there
    assert len(CountingDevice.measured) > before
    assert read_json(tmp_path / "results.json", "results")["machine"] == {"device": "another counter"}
    run.lock.close()
    with pytest.raises(ConfigError, match="these keys differ: device"):
        Run(config(device="process"), tmp_path)


def test_a_device_that_is_not_there_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: CountingDevice) -> None:
        raise DeviceError("the counter is not there")

    monkeypatch.setattr(CountingDevice, "identity", gone)
    monkeypatch.setattr("autoprune.pipeline.preparation.dense_model", lambda *_: pytest.fail("a model was trained"))
    run = Run(config(), tmp_path)
    with pytest.raises(DeviceError, match="is not there"):
        _ = run.prepared
    run.lock.close()


@pytest.mark.slow
def test_a_dry_run_says_the_device(tmp_path: Path) -> None:
    run = Run(config(), tmp_path)
    found = forecast(run)
    run.lock.close()
    assert "| device" in found.text()
    assert "a counter" in found.text()
    assert found.to_json()["device"] == "a counter"
    assert found.repacking_alone == 1.0
    assert found.unpruned is None
    assert "of the time of the dense model on the counter" in found.text()


@pytest.mark.slow
def test_a_table_is_profiled_and_shown(tmp_path: Path) -> None:
    path, directory = tmp_path / "small.toml", tmp_path / "run"
    path.write_text(f'device = "counting"\n{SMALL_TOML}'.replace('engines = ["eager"]', ""))
    done = CliRunner().invoke(app, ["profile", str(path), "--run-dir", str(directory)])
    assert done.exit_code == 0, done.output
    assert "dense us" in done.stdout
    assert read_json(directory / "latency.json", "the table")["machine"] == {"device": "a counter"}
