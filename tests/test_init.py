"""`autoprune init`: what it writes runs as it stands."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autoprune.api import apply_config
from autoprune.cli import app
from autoprune.config import load_config
from autoprune.errors import ConfigError
from autoprune.pipeline.run import Run
from autoprune.target import Target
from autoprune.testing import save_fake_table


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that was just begun, and is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    done = CliRunner().invoke(app, ["init", "mine/first"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "cd mine/first" in done.output
    monkeypatch.chdir(tmp_path / "mine" / "first")
    yield Path.cwd()
    sys.modules.pop("my_model", None)


def test_the_starter_runs_as_it_stands(project: Path) -> None:
    config = load_config(Path("autoprune.toml"), ["env.min_saving=0.0"])
    run = Run(config, Path("runs/autoprune"))
    assert run.prepared.dense_score > 0.9
    assert len(run.prepared.inventory.layers) == 5
    save_fake_table(run)
    assert set(run.problem.sensitivity.loss) == set(run.prepared.inventory.names)
    assert run.search.env.reset()
    applied = apply_config(None, config.task.args["model"], config.task.args["data"], Target(speedup=1.5), 1)
    again = Run(applied, Path("runs/applied"))
    assert again.prepared.dense_score == run.prepared.dense_score, "trained once"
    assert (project / "my_model.safetensors").exists()


def test_nothing_is_overwritten(project: Path) -> None:
    (project / "autoprune.toml").unlink()
    (project / "my_model.py").write_text("mine = True\n")
    with pytest.raises(ConfigError, match=r"my_model\.py is there already; nothing was written"):
        CliRunner().invoke(app, ["init"], catch_exceptions=False)
    assert [path.name for path in project.iterdir()] == ["my_model.py"]
    assert (project / "my_model.py").read_text() == "mine = True\n"
