"""`--dry-run`: what a run would do, what is in reach, and that nothing is changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import autoprune
from autoprune.cli import app
from autoprune.config import load_config
from autoprune.errors import ConfigError, InfeasibleTarget
from autoprune.evaluation import profile
from autoprune.pipeline import search
from autoprune.pipeline.run import Run
from autoprune.testing import save_fake_table
from tests.helpers import SMALL_TOML

TOML = f"""
target = {{accuracy_drop = 0.5}}
{SMALL_TOML}
[env]
min_saving = 0.0
recovery = "none"
"""
PROJECT = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(128, 4),
    )

def loaders():
    torch.manual_seed(1)
    def batch(): return torch.randn(16, 1, 16, 16), torch.randint(0, 4, (16,))
    return [batch() for _ in range(3)], [batch() for _ in range(2)]
"""


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the directory of a run that got as far as its latency table."""
    cache = tmp_path_factory.mktemp("tables")
    monkeypatch.setattr(profile, "cache_folder", lambda: cache)  # another test may have measured the same
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "small.toml"
    config.write_text(TOML)
    run = Run(load_config(config), tmp_path / "runs" / "small")
    save_fake_table(run)
    run.lock.close()
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--dry-run"])


def test_a_dry_run_says_what_a_run_would_do_and_changes_nothing(folder: Path) -> None:
    before = contents(folder)
    done = call("run", "small.toml")
    assert done.exit_code == 0, done.output
    rows = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in done.stdout.splitlines() if "|" in line}
    assert "50 points of accuracy" in rows["target"]
    assert "weights" in rows["pruned"]
    assert "eager" in rows["dense engines"]
    assert "(best)" in rows["dense engines"]
    assert rows["latency table"].startswith("read: ")
    assert "over the best dense engine" in rows["repacking alone"]
    assert "predicted, with every layer at sparsity 0.95" in rows["in reach"]
    assert rows["latency table"].endswith("% of the time of dense torch eager")
    for part in ("dense engines", "search, at most", "fine-tuning", "final table"):
        assert part in rows["minutes, about"]
    assert "Nothing was changed in runs/small: this was measured in a temporary folder." in done.stdout
    assert contents(folder) == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there a signal ends a process without asking it")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_dry_run_that_is_stopped_leaves_no_folder(folder: Path, name: str, heard: None) -> None:
    places = folder / "temporary"
    places.mkdir()
    command = [sys.executable, "-m", "autoprune", "run", "small.toml", "--set", "dense.epochs=100000", "--dry-run"]
    environment = {**os.environ, "TMPDIR": str(places), "PYTHONPATH": str(Path(autoprune.__file__).parents[1])}
    with subprocess.Popen(
        [*command, "--run-dir", "new"], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while process.poll() is None and not any(places.glob("autoprune-*")):
                time.sleep(0.05)
            told = _stopped(process, getattr(signal, name))
        finally:
            process.kill()
    number = getattr(signal, name)
    assert process.returncode in (128 + number, -number), told  # which a shell tells alike
    assert "stopped; give the same command again" in told
    assert "Traceback" not in told
    assert not any(places.glob("autoprune-*"))


@pytest.fixture
def heard() -> Iterator[None]:
    """No signal is ignored by the processes that a test starts, as under nohup, or in a shell's background."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _stopped(process: subprocess.Popen[str], number: int) -> str:
    """What it says when it is told to stop, again where a library swallowed what the signal raised."""
    for _ in range(6):
        process.send_signal(number)
        try:
            return process.communicate(timeout=30)[1]
        except subprocess.TimeoutExpired:
            continue
    pytest.fail("it goes on")


@pytest.mark.slow
def test_engines_whose_times_are_known_are_not_prepared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(load_config(folder / "small.toml"), folder / "runs" / "small")
    took_s = run.search.all_baselines.prepared_s
    run.lock.close()
    assert took_s > 0.0
    monkeypatch.setattr(search, "prepare_engines", lambda *_: pytest.fail("the engines were prepared"))
    said = json.loads(call("run", "small.toml", "--json").stdout)
    assert said["minutes"]["dense engines"] == took_s / 60


@pytest.mark.slow
def test_a_target_out_of_reach_is_measured_and_refused(folder: Path) -> None:
    done = call("run", "small.toml", "--speedup", "900", "--over", "eager", "--run-dir", "other")
    assert isinstance(done.exception, InfeasibleTarget), done.output
    assert "**the target is out of reach**" in done.stdout
    assert "x measured" in done.stdout
    assert not Path("other").exists()
    done = call("run", "small.toml", "--speedup", "900", "--over", "eager", "--run-dir", "other", "--json", "--quiet")
    assert done.exit_code == 2
    said = json.loads(done.stdout)
    assert said["error"] == said["out_of_reach"]
    assert done.stderr == f"error: {said['error']}\n"


def test_the_directory_of_another_config_is_refused(folder: Path) -> None:
    done = call("run", "small.toml", "--seed", "5")
    assert isinstance(done.exception, ConfigError)
    assert "these keys differ: seed" in str(done.exception)


@pytest.mark.slow
def test_a_method_needs_no_search_and_no_more_minutes_than_given_are_told(folder: Path) -> None:
    done = call("prune", "small.toml", "--method", "gradual", "--sparsity", "0.5", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["minutes"].keys() == {"latency table", "dense engines", "fine-tuning", "final table"}
    assert said["target"] == {"sparsity": 0.5}
    assert said["out_of_reach"] is None
    assert said["run_dir"] == "runs/small-gradual"
    assert not Path("runs/small-gradual").exists()
    masks = json.loads(call("prune", "small.toml", "--json").stdout)
    assert masks["minutes"].keys() == {"search, at most"}
    short = json.loads(call("run", "small.toml", "--json", "--minutes", "0.0001", "--workers", "1").stdout)
    assert short["minutes"]["search, at most"] == 0.0001
    refused = call("prune", "small.toml", "--method", "gradual")
    assert isinstance(refused.exception, ConfigError), "a drop alone leaves no plan to make"


@pytest.mark.slow
def test_apply_has_a_dry_run_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    (folder / "my_dry_project.py").write_text(PROJECT)
    options = [part for line in ("latency.samples=3", "latency.profile_samples=3") for part in ("--set", line)]
    engines = ["--set", 'latency.engines=["eager"]', "--set", "env.min_saving=0.0"]
    own = ["--model", "my_dry_project:build", "--data", "my_dry_project:loaders", "--speedup", "1.01"]
    done = call("apply", *own, *options, *engines, "--over", "eager")
    assert done.exit_code == 0, done.output
    assert "Dry run of user" in done.stdout
    assert not Path("runs/applied").exists()
