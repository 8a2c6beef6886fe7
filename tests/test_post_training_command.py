"""`autoprune prune --post-training`: the whole job without labels, search and training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from autoprune.cli import app
from autoprune.config import parse_config
from autoprune.errors import AutopruneError, ConfigError
from autoprune.files import read_json
from autoprune.masks import sparsity
from autoprune.model.weights import weight_of
from autoprune.pipeline import application
from autoprune.pipeline.choices import create_choices
from autoprune.pipeline.run import Run
from autoprune.plan import Plan
from tests.helpers import SMALL_TOML

TOML = f"""
target = {{speedup = 2.0}}
{SMALL_TOML}
[env]
actions = ["sparsity"]
min_saving = 0.0
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(TOML)
    return tmp_path / "small.toml"


def prune(config: Path, *args: str) -> Result:
    return CliRunner().invoke(app, ["prune", str(config), *args])


def reopened(folder: Path) -> Run:
    return Run(parse_config(read_json(folder / "config.json", "the config"), "test"), folder)


def test_it_prunes_to_a_sparsity_and_trains_nothing(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(*_: object, **__: object) -> None:
        raise AssertionError("fine-tuned")

    monkeypatch.setattr(application, "finetune_", trained)
    result = prune(config, "--post-training", "--sparsity", "0.5")
    assert result.exit_code == 0, result.output
    assert "none: pruned after training, criterion obs(steps=4), post_training" in result.output
    assert "fine-tuning epochs" not in result.output
    folder = Path("runs/small-post-training")
    assert not (folder / "latency.json").exists(), "nothing asked for the latency table"
    run = reopened(folder)
    names = list(Plan.load(folder / "plan.json").layers)
    assert [sparsity(weight_of(run.masked, name)) for name in names] == pytest.approx([0.5] * len(names), abs=0.06)
    refitted = [name for name in names if not _is_masked(weight_of(run.masked, name), weight_of(run.dense, name))]
    assert refitted == names, "what is kept made up for what was cut"
    again = prune(config, "--post-training", "--sparsity", "0.5")
    assert "This run is complete" in again.output


def _is_masked(weight: torch.Tensor, dense: torch.Tensor) -> bool:
    return torch.equal(weight, dense * (weight != 0))


@pytest.mark.slow
def test_criterion_pattern_and_fit_are_chosen(config: Path) -> None:
    chosen = ("--criterion", "magnitude", "--pattern", "unstructured", "--set", "env.recovery.reconstruct=none")
    result = prune(config, "--post-training", "--sparsity", "0.5", *chosen, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    run = reopened(Path(said["run_dir"]))
    (layer,) = set(map(str, (each.criterion.name for each in run.plan.layers.values())))
    assert layer == "magnitude"
    assert all(_is_masked(weight_of(run.masked, name), weight_of(run.dense, name)) for name in run.plan.layers)


@pytest.mark.slow
def test_it_prunes_to_a_speedup_that_is_measured(config: Path) -> None:
    args = ("--speedup", "1.05", "--over", "repacked", "--criterion", "magnitude", "--run-dir", "fast")
    result = prune(config, "--post-training", *args)
    assert result.exit_code == 0, result.output
    assert "at least 1.05x faster than the dense model repacked" in result.output


@pytest.mark.slow
def test_a_dry_run_says_how_long_it_takes(config: Path) -> None:
    args = ("--sparsity", "0.5", "--criterion", "magnitude", "--dry-run")
    result = prune(config, "--post-training", *args)
    assert result.exit_code == 0, result.output
    assert "post-training pruning" in result.output
    assert "fine-tuning" not in result.output
    assert not Path("runs/small-post-training").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--post-training", "--method", "gradual", "--sparsity", "0.5"], "--method and --post-training exclude each"),
        (["--post-training", "--plan", "plan.json"], "--plan and --post-training exclude each other"),
        (["--post-training", "--set", "target={accuracy_drop = 0.1}"], "needs --sparsity or --speedup"),
        (["--post-training", "--sparsity", "0.5", "--criterion", "gradient"], "reads gradients of a loss"),
        (["--post-training", "--sparsity", "0.5", "--criterion", "obss"], "Did you mean 'obs'"),
        (["--post-training", "--sparsity", "0.5", "--criterion", '{name = "obs", steps = 0}'], "steps must be"),
        (["--post-training", "--sparsity", "50"], r"target.sparsity is a fraction in (0, 1)"),
        (["--post-training", "--sparsity", "0.5", "--set", "env.recovery=train"], "trains nothing"),
        (["--post-training", "--sparsity", "0.5", "--set", "search.halving={}"], "trains nothing"),
        (["--criterion", "obs"], "--criterion is for --method or --post-training alone"),
    ],
)  # fmt: skip
def test_bad_input_is_said(config: Path, args: list[str], said: str) -> None:
    result = prune(config, *args)
    assert isinstance(result.exception, AutopruneError)
    assert said in str(result.exception)


def test_a_search_is_refused_before_it_begins_where_a_criterion_reads_gradients() -> None:
    config = parse_config({"task": "digits", "env": {"recovery": "post_training", "criterion": "gradient"}}, "x.toml")
    with pytest.raises(ConfigError, match="'gradient' reads gradients of a loss"):
        create_choices(config)


@pytest.mark.slow
def test_a_method_trains_though_the_config_says_otherwise(config: Path) -> None:
    """What is asked for on the command line takes the place of what the file says."""
    config.write_text(TOML.replace("[finetune.settings]", "[finetune]\npost_training = true\n[finetune.settings]"))
    result = prune(config, "--method", "one_shot", "--sparsity", "0.5")
    assert result.exit_code == 0, result.output
    assert "fine-tuning epochs" in result.output
