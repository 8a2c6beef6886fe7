"""Reading a run's directory runs no code: its report comes from what is stored, and an export asks."""

from __future__ import annotations

import json
import sys
from base64 import b64encode
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from autoprune.cli import app
from autoprune.config import parse_config
from autoprune.errors import AutopruneError, ConfigError, FileError
from autoprune.files import write_json
from autoprune.latency.timer import Latency
from autoprune.metric import ACCURACY, BITS_PER_CHARACTER
from autoprune.model.inventory import KeptDense
from autoprune.pipeline.run import run_in
from autoprune.report.data import MeasuredPoint, PlanRow, ResultRow, SearchRow
from autoprune.report.stored import (
    EAGER,
    MASKED,
    REPACKED,
    Front,
    Record,
    Results,
    read_stored,
    write_page,
    write_stored,
)
from autoprune.target import Target


def row(name: str, score: float, speedup: float) -> ResultRow:
    return ResultRow(name, score, Latency.from_samples([1.0 / speedup] * 3, 1), speedup, speedup / 2, 100, 1000)


RESULTS = Results(
    (row(EAGER, 0.9, 1.0), row(MASKED, 0.88, 0.99), row(REPACKED, 0.88, 3.0)),
    {"batch": 1, "threads": 1},
    {"cpu": "the CPU of then", "torch": "1.2.3"},
)
RECORD = Record(
    title="user: at least 4x faster",
    facts={"seed": "3"},
    target=Target(speedup=4.0),
    metric=ACCURACY,
    plan=(PlanRow("fc", 64, 0.5, "group(size=8)", "magnitude", "jit", 3.0, None),),
    kept_dense=(KeptDense("head", "Linear", "too small"),),
    searches=(SearchRow("ppo", 2, 1.5, 0.9, 0.3, 3.0),),
    sparsities={"fc": 0.5},
    front=Front(
        (MeasuredPoint(0.3, 0.9), MeasuredPoint(0.4, 0.91)), MeasuredPoint(0.3, 0.9), MeasuredPoint(1.0, 0.9), None
    ),
    rewards={"ppo": (0.5, 1.5)},
)
MARKER = """
from pathlib import Path
Path("imported").write_text("yes")
def build(): raise RuntimeError("called")
def loaders(): raise RuntimeError("called")
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a finished run on a user's model, whose functions note that they were imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "marker_project.py").write_text(MARKER)
    sys.modules.pop("marker_project", None)
    folder = tmp_path / "run"
    folder.mkdir()
    task = {"name": "user", "model": "marker_project:build", "data": "marker_project:loaders"}
    (folder / "config.json").write_text(json.dumps(parse_config({"task": task}, "test").to_json()))
    write_stored(folder / "results.json", RESULTS)
    write_stored(folder / "report.json", RECORD)
    return folder


def test_what_is_stored_comes_back(directory: Path) -> None:
    assert read_stored(Results, directory / "results.json", "the results") == RESULTS
    assert read_stored(Record, directory / "report.json", "the record") == RECORD


def test_report_imports_nothing_and_says_where_it_was_measured(directory: Path) -> None:
    done = CliRunner().invoke(app, ["report", "run"], catch_exceptions=False)
    missed = "**The target was missed**: 1.50x of 4x over the best dense engine"
    for text in (missed, "3.00x as fast as dense torch eager", "2.00 points of accuracy worse", "the CPU of then"):
        assert text in done.output
    assert done.output.strip().startswith((directory / "report.md").read_text().strip())
    assert done.output.strip().splitlines()[-1].startswith("The target was missed: "), "the headline stands last, too"
    assert all((directory / name).exists() for name in ("sparsity.png", "front.png", "reward.png"))
    assert not Path("imported").exists()


def test_the_report_is_a_self_contained_html_file_too(directory: Path) -> None:
    write_page(directory)
    page = (directory / "report.html").read_text(encoding="utf-8")
    for name in ("sparsity.png", "front.png", "reward.png"):
        assert b64encode((directory / name).read_bytes()).decode() in page
    assert "the CPU of then" in page
    assert "user: at least 4x faster" in page


def test_a_run_without_a_search_has_fewer_figures(directory: Path) -> None:
    write_stored(
        directory / "report.json",
        Record("user", {}, Target(sparsity=0.5), BITS_PER_CHARACTER, (), (), (), {"fc": 0.5}),
    )
    page = write_page(directory)
    assert "0.0200 bits per character worse" in page
    assert "front.png" not in page


def test_export_asks_before_it_calls_what_a_config_names(directory: Path) -> None:
    export = ["export", "run", "--out", "model.onnx"]
    with pytest.raises(ConfigError, match=r"marker_project:build and marker_project:loaders.*--run-code"):
        CliRunner().invoke(app, export, catch_exceptions=False)
    assert not Path("imported").exists()
    with pytest.raises(AutopruneError, match="called"):
        CliRunner().invoke(app, [*export, "--run-code"], catch_exceptions=False)
    assert Path("imported").exists()
    with pytest.raises(ConfigError, match="--run-code is for a run directory alone"):
        CliRunner().invoke(app, ["export", "a:b", "--input", "1", "--out", "x", "--run-code"], catch_exceptions=False)


def test_the_model_of_a_program_is_not_looked_for(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({"task": "given"}))
    with pytest.raises(ConfigError, match=r"made by autoprune\.compress"):
        run_in(directory, run_code=True)


@pytest.mark.parametrize(
    ("name", "document", "said"),
    [
        ("report.json", None, "has no report yet"),
        ("results.json", None, "results not found"),
        ("report.json", {}, "record of the run is corrupt.*title"),
        ("results.json", {"rows": [], "protocol": {}, "machine": {}}, "no row 'dense, torch eager'"),
        ("results.json", {"rows": [{"name": "repacked", "score": "high"}], "protocol": {}, "machine": {}}, "score"),
    ],
)
def test_what_is_missing_or_corrupt_is_one_error(
    directory: Path, name: str, document: dict[str, object] | None, said: str
) -> None:
    (directory / name).unlink()
    if document is not None:
        write_json(directory / name, document)
    with pytest.raises(FileError, match=said):
        write_page(directory)


def test_numbers_come_back_to_the_last_bit(tmp_path: Path) -> None:
    exact = [float(x) for x in torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))]
    rows = tuple(ResultRow(str(at), score=value) for at, value in enumerate(exact))
    write_stored(tmp_path / "results.json", Results(rows, {}, {}))
    back = read_stored(Results, tmp_path / "results.json", "the results").rows
    assert [each.score for each in back] == exact
