"""`python -m benchmarks kills`: it sees what is lost, doubled and left, and who lives on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kills


def lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_is_lost_doubled_or_left_is_counted(tmp_path: Path) -> None:
    model = kills.Job("run", tmp_path / "undisturbed")
    trials: list[dict[str, object]] = [{"reward": 1.0, "checksum": "a"}, {"reward": 2.0, "checksum": "b"}]
    lines(model.directory / "search" / "trials.jsonl", trials)
    lines(model.directory / "search" / "evaluations.jsonl", [{"key": "x", "score": 0.5}])
    for name in ("plan.json", "masked.safetensors", "sensitivity.json"):
        (model.directory / name).write_text(name)
    (model.cache / "family").mkdir(parents=True)
    (model.cache / "dense-digits-1.safetensors").touch()
    shutil.copytree(model.folder, tmp_path / "killed")
    job = kills.Job("run", tmp_path / "killed")
    right = {"lost or doubled": 0, "files half written": 0, "processes left": 0}
    assert kills.findings(job, model) == right
    lines(job.directory / "search" / "trials.jsonl", [trials[0], {**trials[1], "checksum": "c"}])
    assert kills.findings(job, model) == right  # checksums are chained: nothing but what they say counts
    lines(job.directory / "search" / "trials.jsonl", trials[:1])
    lines(job.directory / "search" / "evaluations.jsonl", [{"key": "x", "score": 0.5}] * 2)
    (job.directory / "plan.json").write_text("another")
    (job.directory / "search" / ".agent.json.7-140.part").touch()
    assert kills.findings(job, model) == {**right, "lost or doubled": 3, "files half written": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_who_lives_on_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = kills.Job("run", tmp_path)
    monkeypatch.setattr(kills, "GRACE_S", 0.1)
    mark = {**os.environ, kills.MARK: str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", "input()"], env=mark, stdin=subprocess.PIPE) as left:
        assert kills.alive_after(job) is None
        assert job.processes() == {left.pid}
        left.kill()
        left.wait()
    assert kills.alive_after(job) is not None


def test_the_page_counts_kills_by_stage() -> None:
    seen = [("run", 0, "search", 3.0, 0.25), ("run", 0, "search", 9.0, None), ("train", 0, "tasks", 1.0, 1.5)]
    text = kills.report([kills.Kill(*each) for each in seen], {"run-0": {"lost or doubled": 2, "left": 1}}, seed=3)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    assert ["run", "search", "2", "beyond 5", "1"] in rows
    assert ["train", "tasks", "1", "1.50", "0"] in rows
    assert ["run-0", "2", "1"] in rows
    assert "--kills 3 --seed 3" in text
