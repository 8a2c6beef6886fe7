"""`autoprune prune --method`: any training method by name, to a sparsity or a measured speed-up, without a search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from autoprune.cli import app
from autoprune.config import parse_config
from autoprune.errors import AutopruneError, ConfigError, InfeasibleTarget
from autoprune.evaluation.finetune import budget_cost
from autoprune.evaluation.recovery import Subject
from autoprune.latency.cost import LatencyCost
from autoprune.masks import sparsity, weight_of
from autoprune.plan import Plan
from autoprune.run import Run
from autoprune.testing import fake_table

TOML = """
target = {speedup = 2.0}
[task]
name = "digits"
widths = [8, 16]
[dense]
epochs = 1
learning_rate = 0.1
[latency]
samples = 3
search_samples = 3
profile_samples = 3
engines = ["eager"]
[env]
min_saving = 0.0
[finetune.settings]
epochs = 1
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(TOML)
    return tmp_path / "small.toml"


def prune(config: Path, *args: str) -> Result:
    return CliRunner().invoke(app, ["prune", str(config), *args])


def test_a_method_prunes_to_a_sparsity_and_the_table_says_what_it_brought(config: Path) -> None:
    result = prune(config, "--method", "adaptive", "--sparsity", "0.75", "--set", "finetune.method.look_ahead=0")
    assert result.exit_code == 0, result.output
    assert "dense, torch eager" in result.output
    assert "given, not searched for" in result.output
    folder = Path("runs/small-adaptive")
    assert not (folder / "search").exists()
    assert not (folder / "latency.json").exists(), "nothing asked for the latency table"
    assert list((folder / "tensorboard" / "finetune").glob("events*"))
    plan = Plan.load(folder / "plan.json")
    assert str(plan.training) == "adaptive(look_ahead=0)"
    run = Run(parse_config(json.loads((folder / "config.json").read_text()), "test"), folder)
    weights = {name: run.inventory[name].weights for name in plan.layers}
    shares = {name: sparsity(weight_of(run.masked, name)) for name in plan.layers}
    assert len({round(share, 2) for share in shares.values()}) > 1, "the method found the layers' shares"
    cut = sum(shares[name] * weights[name] for name in weights) / sum(weights.values())
    assert cut == pytest.approx(0.75, abs=0.02)


def test_a_method_prunes_to_a_speedup_that_is_measured(config: Path) -> None:
    result = prune(config, "--method", "gradual", "--speedup", "1.05", "--run-dir", "fast")
    assert result.exit_code == 0, result.output
    assert (Path("fast") / "latency.json").exists()
    assert "at least 1.05x faster" in result.output


def test_a_speedup_out_of_reach_is_refused_with_the_best_there_is(config: Path) -> None:
    result = prune(config, "--method", "gradual", "--speedup", "900")
    assert isinstance(result.exception, InfeasibleTarget)
    assert "predicts" in str(result.exception)
    assert not Path("runs/small-gradual/plan.json").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--method", "adaptve", "--sparsity", "0.9"], "Did you mean 'adaptive'"),
        (["--method", "gradual", "--sparsity", "90"], r"target.sparsity is a fraction in \(0, 1\)"),
        (["--method", "gradual", "--sparsity", "0.9", "--speedup", "2"], "not both"),
        (["--sparsity", "0.9"], "--sparsity is for --method alone"),
        (["--method", "gradual", "--plan", "plan.json"], "exclude each other"),
        (["--method", "gradual", "--set", "target={accuracy_drop = 0.1}"], "needs --sparsity or --speedup"),
        (["--method", "gradual", "--sparsity", "0.9", "--pattern", "grup"], "Did you mean 'group'"),
        (["--method", "adaptive", "--sparsity", "0.5", "--pattern", "n:m"], "allows one sparsity alone"),
    ],
)
def test_bad_input_is_said(config: Path, args: list[str], said: str) -> None:
    result = prune(config, *args)
    assert isinstance(result.exception, AutopruneError)
    with pytest.raises(AutopruneError, match=said):
        raise result.exception


def test_a_search_does_not_aim_at_a_sparsity(config: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(config), "--set", "target={sparsity = 0.5}"])
    assert isinstance(result.exception, ConfigError)
    assert "prune without a search" in str(result.exception)


def test_the_budget_counts_what_is_asked(config: Path) -> None:
    result = prune(config, "--method", "gradual", "--sparsity", "0.5")
    assert result.exit_code == 0, result.output
    folder = Path("runs/small-gradual")
    run = Run(parse_config(json.loads((folder / "config.json").read_text()), "test"), folder)
    subject, plan = run.subject, run.plan
    assert subject.budget == "weights"
    assert budget_cost(subject, plan)(run.inventory)({}) == sum(layer.weights for layer in run.inventory.layers)
    by_macs = Subject(**{**vars(subject), "budget": "macs"})
    assert budget_cost(by_macs, plan)(run.inventory)({}) == sum(layer.macs for layer in run.inventory.layers)
    timed = Subject(**{**vars(subject), "budget": "latency"})
    with pytest.raises(AutopruneError, match="needs the latency table"):
        budget_cost(timed, plan)
    table = fake_table(run.inventory, (run.config.env.pattern,))
    cost = budget_cost(Subject(**{**vars(timed), "table": table}), plan)(run.inventory)
    assert isinstance(cost, LatencyCost)
    shares = {name: layer.sparsity for name, layer in plan.layers.items()}
    assert cost(shares) == pytest.approx(table.predict_ms(plan))
    assert cost({}) > cost(shares)
