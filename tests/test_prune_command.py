"""`autoprune prune --method`: any training method by name, to a sparsity or a measured speed-up, without a search."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from autoprune.cli import app
from autoprune.config import load_config, parse_config
from autoprune.errors import AutopruneError, InfeasibleTarget
from autoprune.evaluation.evaluator import Evaluator
from autoprune.evaluation.recovery import Subject
from autoprune.evaluation.recovery.finetune import budget_cost
from autoprune.files import read_json, write_json
from autoprune.latency.cost import LatencyCost
from autoprune.latency.timer import Latency
from autoprune.masks import sparsity
from autoprune.model.weights import weight_of
from autoprune.patterns import PATTERNS
from autoprune.pipeline.results import report_of
from autoprune.pipeline.run import Run
from autoprune.plan import LayerPlan, Plan
from autoprune.testing import fake_table, save_fake_table
from tests.helpers import SMALL_TOML

pytestmark = pytest.mark.usefixtures("short_tables")
TOML = f"""
target = {{speedup = 2.0}}
{SMALL_TOML}
[env]
actions = ["sparsity"]  # of one pattern: a small latency table
min_saving = 0.0
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(TOML)
    return tmp_path / "small.toml"


def prune(config: Path, *args: str) -> Result:
    return CliRunner().invoke(app, ["prune", str(config), *args])


@pytest.mark.slow
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
    run = Run(parse_config(read_json(folder / "config.json", "the config"), "test"), folder)
    weights = {name: run.prepared.inventory[name].weights for name in plan.layers}
    shares = {name: sparsity(weight_of(run.masked, name)) for name in plan.layers}
    assert len({round(share, 2) for share in shares.values()}) > 1, "the method found the layers' shares"
    cut = sum(shares[name] * weights[name] for name in weights) / sum(weights.values())
    assert cut == pytest.approx(0.75, abs=0.02)


def test_a_method_prunes_to_a_speedup_that_is_measured(config: Path) -> None:
    over = ("--set", "target.over=repacked")
    result = prune(config, "--method", "gradual", "--speedup", "1.05", *over, "--run-dir", "fast")
    assert result.exit_code == 0, result.output
    assert (Path("fast") / "latency.json").exists()
    assert "at least 1.05x faster than the dense model repacked" in result.output
    plan = Plan.load(Path("fast/plan.json")).key
    assert read_json(Path("fast/corrected.json"), "the correction")[plan]["measurements"] >= 1
    write_json(Path("fast/corrected.json"), {plan: {"remark": "in steps"}})
    run = Run(parse_config(read_json(Path("fast/config.json"), "the config"), "test"), Path("fast"))
    assert report_of(run).record.facts["distance from the target"] == "in steps"


@pytest.mark.slow
def test_a_method_that_misses_the_speedup_prunes_further(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = 'target={speedup = 1.5, over = "eager"}'
    run = Run(load_config(config, [target, 'finetune.method="gradual"']), Path("again"))
    layer = LayerPlan(0.5, run.config.env.pattern)
    first = Plan(dict.fromkeys(run.prepared.inventory.names, layer), run.config.finetune.method)
    first.save(run.directory / "plan.json")
    table = save_fake_table(run)
    # each until two timings agree: 1.25x of 1.5x, trained and untrained; then, moved, 1.515x, and so when it is trained
    took = iter([1.2] * 4 + [0.99] * 4)

    def timed(*_: object) -> tuple[Latency, Latency]:
        return Latency.from_samples([1.5] * 3, 1), Latency.from_samples([next(took)] * 3, 1)

    monkeypatch.setattr(Evaluator, "time", timed)
    before = run.masked
    run.settle()
    assert table.predict_speedup(run.plan) >= table.predict_speedup(first) * 1.5 / 1.25 * (1 - 1e-9)
    assert Plan.load(run.directory / "plan.json") == run.plan != first
    assert run.masked is not before
    for name, layer in run.plan.layers.items():
        weight = weight_of(run.masked, name)
        alike = PATTERNS.create(layer.pattern).mask(weight.detach().abs(), layer.sparsity, 1)
        assert sparsity(weight) == pytest.approx(sparsity(alike)), "trained to the new plan"
    second = run.plan
    assert run.repacked.report
    assert read_json(run.directory / "reached.json", "what was reached")["attempts"] == 2
    run.settle()
    assert run.plan == second, "only once"


@pytest.mark.slow
def test_all_that_a_target_asks_for_holds_at_once_and_the_result_is_one_json_object(config: Path) -> None:
    asked = ("--sparsity", "0.5", "--size", "1MB", "--seed", "4")
    result = prune(config, "--method", "gradual", *asked, "--json", "--quiet", "--strict")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    said = json.loads(result.stdout)
    assert said["target"] == {"sparsity": 0.5, "size_bytes": 1_000_000}
    assert said["reached"]
    assert said["missed"] == []
    assert said["rows"][-1]["name"] == "repacked"
    assert said["latency_ms"] == said["rows"][-1]["latency_ms"] > 0.0
    assert said["size_bytes"] == Path("runs/small-gradual/repacked.safetensors").stat().st_size < 1_000_000
    plan = Plan.load(Path(said["plan"]))
    assert min(layer.sparsity for layer in plan.layers.values()) >= 0.5
    assert read_json(Path(said["run_dir"]) / "config.json", "the config")["seed"] == 4


def test_a_speedup_out_of_reach_is_refused_with_the_best_there_is(config: Path) -> None:
    result = prune(config, "--method", "gradual", "--speedup", "900")
    assert isinstance(result.exception, InfeasibleTarget)
    assert "was measured" in str(result.exception)
    assert not Path("runs/small-gradual/plan.json").exists()
    assert not Path("runs/small-gradual/config.json").exists(), "a target that is in reach may take the directory"
    assert Path("runs/small-gradual/latency.json").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--method", "adaptve", "--sparsity", "0.9"], "Did you mean 'adaptive'"),
        (["--method", "gradual", "--sparsity", "90"], r"target.sparsity is a fraction in \(0, 1\)"),
        (["--sparsity", "0.9"], "--sparsity is for --method or --post-training alone"),
        (["--method", "gradual", "--plan", "plan.json"], "exclude each other"),
        (["--method", "gradual", "--set", "target={accuracy_drop = 0.1}"], "needs --sparsity or --speedup"),
        (["--method", "gradual", "--sparsity", "0.9", "--pattern", "grup"], "Did you mean 'group'"),
        (["--method", "adaptive", "--sparsity", "0.5", "--pattern", "n:m"], "allows one sparsity alone"),
        (["--method", "gradual", "--speedup", "2", "--pattern", "n:m"], "cannot be put on a speed-up"),
        (["--method", "gradual", "--speedup", "0.9"], "target.speedup must be above 1"),
        (["--method", "gradual", "--sparsity", "0.5", "--set", "finetune.budget=weigths"], "finetune.budget: input"),
    ],
)
def test_bad_input_is_said(config: Path, args: list[str], said: str) -> None:
    result = prune(config, *args)
    assert isinstance(result.exception, AutopruneError)
    with pytest.raises(AutopruneError, match=said):
        raise result.exception


@pytest.mark.slow
def test_a_search_may_aim_at_a_sparsity(config: Path) -> None:
    few = ("--set", "search.episodes=8", "--workers", "1")  # every plan is moved onto the target, the first one too
    result = CliRunner().invoke(app, ["train", str(config), "--set", "target={sparsity = 0.5}", *few])
    assert result.exit_code == 0, result.output
    run = Run(parse_config(read_json(Path("runs/small/config.json"), "the config"), "test"), Path("runs/small"))
    weights = {name: run.prepared.inventory[name].weights for name in run.plan.layers}
    zeros = sum(weights[name] * layer.sparsity for name, layer in run.plan.layers.items())
    assert 0.5 <= zeros / sum(weights.values()) < 0.53


@pytest.mark.slow
def test_the_budget_counts_what_is_asked(config: Path) -> None:
    result = prune(config, "--method", "gradual", "--sparsity", "0.5")
    assert result.exit_code == 0, result.output
    folder = Path("runs/small-gradual")
    run = Run(parse_config(read_json(folder / "config.json", "the config"), "test"), folder)
    subject, plan, inventory = run.preparation.subject, run.plan, run.prepared.inventory
    assert subject.budget == "weights"
    assert budget_cost(subject, plan)(inventory)({}) == sum(layer.weights for layer in inventory.layers)
    by_macs = Subject(**{**vars(subject), "budget": "macs"})
    assert budget_cost(by_macs, plan)(inventory)({}) == sum(layer.macs for layer in inventory.layers)
    timed = Subject(**{**vars(subject), "budget": "latency"})
    with pytest.raises(AutopruneError, match="needs the latency table"):
        budget_cost(timed, plan)
    table = fake_table(inventory, (run.config.env.pattern,))
    cost = budget_cost(Subject(**{**vars(timed), "table": table}), plan)(inventory)
    assert isinstance(cost, LatencyCost)
    shares = {name: layer.sparsity for name, layer in plan.layers.items()}
    assert cost(shares) == pytest.approx(table.predict_ms(plan))
    assert cost({}) > cost(shares)


def test_a_method_is_read_as_it_was_given(config: Path) -> None:
    result = prune(config, "--method", 'a"b', "--sparsity", "0.5")
    assert isinstance(result.exception, AutopruneError)
    assert """'a"b'""" in str(result.exception)


@pytest.mark.slow
def test_several_methods_make_one_table_and_what_is_done_is_not_done_again(config: Path) -> None:
    """N:M allows one sparsity alone, so a method that finds the layers' shares cannot use it."""
    args = ("--method", "gradual,one_shot,adaptive", "--sparsity", "0.5", "--pattern", "n:m")
    result = prune(config, *args)
    assert result.exit_code == 0, result.output
    folder = Path("runs/small-methods")
    page = (folder / "methods.md").read_text(encoding="utf-8")
    assert page in result.output
    assert page.startswith("# digits: 50% sparsity")
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if re.match(r"\| \w", line)}
    assert set(rows) == {"method", "dense, repacked", "gradual", "one_shot", "adaptive"}
    assert list(rows)[-1] == "adaptive", "what brought nothing stands last"
    assert "cannot do it" in rows["adaptive"]
    assert "allows one sparsity alone" in rows["adaptive"]
    for name in ("gradual", "one_shot"):
        assert re.search(r"\d+\.\d+% \|.*\d+\.\d\dx \|.*\d+\.\d\dx \|.*\d+\.\d% \|.*\d+\.\d\d \| -", rows[name])
        assert str(Plan.load(folder / name / "plan.json").training) == name
        assert (folder / name / "report.html").exists()
    files = [
        folder / name / file for name in ("gradual", "one_shot") for file in ("masked.safetensors", "minutes.json")
    ]
    made = [path.stat().st_mtime_ns for path in files]
    again = prune(config, *args)
    assert page in again.output
    assert [path.stat().st_mtime_ns for path in files] == made
    for strict, status in (((), 0), (("--strict",), 3)):
        scripted = prune(config, *args, "--json", "--quiet", *strict)
        assert scripted.exit_code == status
        said = json.loads(scripted.stdout)
        assert [row["method"] for row in said["methods"]] == ["gradual", "one_shot", "adaptive"]
        assert [row["missed"] for row in said["methods"]] == [False, False, True]
        assert not said["reached"]
        assert said["run_dir"] == str(folder)


@pytest.mark.slow
def test_stopped_methods_go_on_and_share_what_is_measured_of_the_dense_model(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("--method", "gradual,one_shot", "--speedup", "1.05", "--over", "repacked", "--run-dir", "both")
    settle = Run.settle

    def stopped_at_the_second(run: Run) -> None:
        settle(run)
        if run.directory.name == "one_shot":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "settle", stopped_at_the_second)
        assert prune(config, *args).exit_code != 0
    masked = Path("both/one_shot/masked.safetensors")
    made, minutes = masked.stat().st_mtime_ns, read_json(Path("both/one_shot/minutes.json"), "minutes")["minutes"]
    assert "one_shot" not in Path("both/methods.md").read_text(encoding="utf-8")
    result = prune(config, *args)
    assert result.exit_code == 0, result.output
    assert masked.stat().st_mtime_ns == made
    assert read_json(Path("both/one_shot/minutes.json"), "minutes")["minutes"] > minutes > 0.0
    assert "| one_shot" in Path("both/methods.md").read_text(encoding="utf-8")
    for name in ("latency.json", "baselines.json"):
        first, second = (Path("both") / method / name for method in ("gradual", "one_shot"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--method", "gradual,adaptve", "--sparsity", "0.5"], "Did you mean 'adaptive'"),
        (["--method", "adaptive,joint", "--sparsity", "0.5", "--pattern", "n:m"], "allows one sparsity alone"),
        (["--method", "all", "--set", "target={accuracy_drop = 0.1}"], "needs --sparsity or --speedup"),
    ],
)
def test_what_no_method_can_do_is_an_error(config: Path, args: list[str], said: str) -> None:
    result = prune(config, *args)
    assert isinstance(result.exception, AutopruneError)
    assert said in str(result.exception)
    assert not list(Path("runs").glob("*/methods.md"))
