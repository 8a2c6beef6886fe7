"""The main job end to end on a small task, its resumption, and the errors of the command line."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from autoprune.agents.harness import TrialLog, search
from autoprune.cli import app, main
from autoprune.config import Config, parse_config
from autoprune.envs.trial import Trial
from autoprune.errors import AutopruneError, ConfigError, FileError, InfeasibleTarget, NumericalError, StaleTable
from autoprune.evaluation.recovery import Subject
from autoprune.files import append_line, read_json, read_lines, read_tensors, write_json, write_tensors
from autoprune.latency.timer import Latency, Protocol
from autoprune.masks import sparsity
from autoprune.model.weights import weight_of
from autoprune.patterns import PATTERNS
from autoprune.pipeline.results import report_of, results
from autoprune.pipeline.run import Run
from autoprune.plan import Plan
from autoprune.registry import Choice, Registry
from autoprune.report.run_report import write_report
from autoprune.settings import TrainingSettings
from autoprune.testing import FakeClock

pytestmark = pytest.mark.usefixtures("short_tables")
SMALL = {
    "task": {"name": "digits", "widths": [8, 16]},
    "dense": {"epochs": 1, "learning_rate": 0.1},
    "target": {"accuracy_drop": 0.5},
    "latency": {"samples": 5, "search_samples": 3, "profile_samples": 3, "engines": ["eager"]},
    "env": {"actions": ["sparsity"], "min_saving": 0.0},  # timings must not pick the layers
    "search": {
        "agent": {"name": "ppo", "net": [8], "episodes_per_update": 2},
        "episodes": 4,
        "halving": {"plans": 2, "steps": 1},
    },
    "finetune": {"settings": {"epochs": 1, "learning_rate": 0.05, "distillation_weight": 0.5}},
}
FILES = [
    "config.json",
    "front.png",
    "identity.json",
    "latency.json",
    "masked.safetensors",
    "plan.json",
    "policy/policy.json",
    "policy/policy.safetensors",
    "repacked.safetensors",
    "report.html",
    "report.json",
    "report.md",
    "results.json",
    "reward.png",
    "search/trials.jsonl",
    "sensitivity.json",
    "sparsity.png",
]


def config(**changes: object) -> Config:
    return parse_config({**SMALL, **changes}, "test")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, short_tables: None) -> Path:
    """A whole run, made once."""
    folder = tmp_path_factory.mktemp("run")
    write_report(report_of(Run(config(), folder / "digits")))
    return folder / "digits"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "digits"))


def unclaim(folder: Path) -> None:
    """Has another config take over the stages of a run."""
    for name in ("config.json", "identity.json"):
        (folder / name).unlink()


def test_a_run_leaves_everything_it_promises_and_no_pickle(finished: Path) -> None:
    assert [name for name in FILES if not (finished / name).exists()] == []
    assert list(finished.rglob("events.out.tfevents*"))
    assert not [path for path in finished.rglob("*") if path.suffix in {".pt", ".pth", ".pkl", ".zip", ".part"}]
    page = (finished / "report.md").read_text()
    for text in (
        "dense, torch eager",
        "masked",
        "repacked",
        "uniform, same speed-up",
        "2 plans from 1 steps on",
        "Machine",
    ):
        assert text in page


def test_the_repacked_model_of_a_run_equals_its_masked_one(finished: Path) -> None:
    run = Run(config(), finished)
    x = run.task.example_inputs(7)
    torch.testing.assert_close(run.repacked(*x), run.masked(*x), rtol=1e-3, atol=1e-4)
    cut = {name: layer for name, layer in run.plan.layers.items() if layer.sparsity > 0}
    assert cut
    for name, layer in cut.items():
        weight = weight_of(run.masked, name)
        cells = PATTERNS.create(layer.pattern).cells(tuple(weight.shape)).flatten()
        largest = int(torch.bincount(cells).max())
        wanted = min(layer.sparsity, 1 - largest / weight.numel())  # no layer is cut whole
        assert -1 <= (sparsity(weight) - wanted) * weight.numel() <= largest + 1


def test_a_finished_run_does_no_work_again(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    run = Run(config(), finished)
    assert len(run.searched.trials) == 4
    _ = (run.preparation.table, run.masked, run.repacked)
    assert {path: path.stat().st_mtime_ns for path in before if "agent" not in path.name} == {
        path: when for path, when in before.items() if "agent" not in path.name
    }


def test_what_a_config_names_is_created_once(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    created: list[Choice] = []
    create = Registry.create

    def counted(registry: Registry[object], choice: Choice) -> object:
        created.append(choice)
        return create(registry, choice)

    monkeypatch.setattr(Registry, "create", counted)
    run = Run(config(), finished)
    _ = run.searched
    named = (run.config.search.agent, run.config.env.recovery)  # the rules' actions have the name of the config's
    assert [created.count(choice) for choice in named] == [1, 1]


@pytest.mark.slow
def test_a_final_table_that_is_killed_goes_on(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def measure(calls: dict[str, object], protocol: Protocol, clock: object) -> dict[str, Latency]:
        if len(measured) == stop:
            raise KeyboardInterrupt
        measured.append(protocol.samples)
        return {name: Latency.from_samples([float(len(measured))] * protocol.samples, 1) for name in calls}

    monkeypatch.setattr("autoprune.pipeline.results.ROUNDS", 2)
    monkeypatch.setattr("autoprune.evaluation.devices.process.measure_together", measure)
    (copied / "results.json").unlink()
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        results(Run(config(), copied))
    stop = 100
    rows = results(Run(config(), copied))
    assert measured == [2, 2, 1]
    assert [row.latency.samples_ms for row in rows if row.latency] == [(1.0, 1.0, 2.0, 2.0, 3.0)] * 5
    results(Run(config(), copied), again=True)
    assert measured[3:] == [2, 2, 1]


def test_the_plan_is_the_best_of_those_trained_for_longest(copied: Path) -> None:
    log = copied / "search" / "trials.jsonl"
    trials = read_lines(log, "the trials")
    assert [trial.get("fidelity", 0) for trial in trials] == [0] * 4 + [1] * 2 + [2]
    assert Run(config(), copied).searched.best == Trial.from_json(trials[-1])
    assert Plan.load(copied / "plan.json") == Plan.from_json(trials[-1]["plan"])
    TrialLog(log).keep_first(5)  # killed in the first rung
    (copied / "search" / "evaluations-2.jsonl").unlink()
    again = Run(config(), copied).searched
    assert [trial.fidelity for trial in again.halved] == [1, 1, 2]
    assert again.halved[0].to_json() == trials[4]
    assert Run(config(), copied).searched.halved == again.halved


@pytest.mark.slow
def test_a_lucky_timing_does_not_win_the_search(copied: Path) -> None:
    """The worst trial gets a speed-up that no clock will show again."""
    unclaim(copied)
    alone = config(search={"agent": "random", "episodes": 4}, target={"accuracy_drop": 0.001})
    shutil.rmtree(copied / "search")
    for name in ("plan.json", "uniform.json"):
        (copied / name).unlink()
    run = Run(alone, copied, clock=FakeClock(2.0**-10))
    assert {trial.measurement.speedup for trial in run.searched.finalists} == {
        1.0
    }  # every call takes as long by this clock
    log = copied / "search" / "trials.jsonl"
    trials = read_lines(log, "the trials")
    best = run.searched.best
    lucky = min(trials, key=lambda trial: trial["score"])
    assert lucky["score"] < best.measurement.score
    lucky["speedup"], lucky["reward"] = 100.0, 1000.0
    log.unlink()
    for trial in trials:
        append_line(log, trial)
    again = Run(alone, copied, clock=FakeClock(2.0**-10)).searched
    assert lucky["plan"] in [trial.plan.to_json() for trial in again.finalists]
    assert again.best.plan == best.plan
    without = config(search={"agent": "random", "episodes": 4, "finalists": 1}, target={"accuracy_drop": 0.001})
    unclaim(copied)
    assert Run(without, copied, clock=FakeClock(2.0**-10)).searched.best == Trial.from_json(lucky)


@pytest.mark.slow
def test_workers_change_no_trial_and_are_no_part_of_a_run(copied: Path) -> None:
    found = []
    for workers in (1, 2):
        shutil.rmtree(copied / "search")
        run = Run(config(), copied, clock=FakeClock(2.0**-10), workers=workers)  # exact sums, wherever it stands
        found.append(run.searched)
    assert found[0] == found[1]
    assert len(found[0].halved) == 3
    assert Run(config(), copied, workers=3).searched == found[0]


@pytest.mark.slow
def test_values_of_eight_bits_are_what_is_measured(finished: Path, tmp_path: Path) -> None:
    kept = shutil.ignore_patterns("config.json", "identity.json", "repacked.safetensors")
    run = Run(config(repack={"value_bits": 8}), Path(shutil.copytree(finished, tmp_path / "eight", ignore=kept)))
    x, fast, masked = run.task.example_inputs(7), run.repacked, run.masked
    with torch.inference_mode():
        rounded, whole = fast(*x), masked(*x)
    assert 0 < float((rounded - whole).abs().max()) < 0.1 * float(whole.abs().max())
    tensors, _ = read_tensors(run.directory / "repacked.safetensors", "the packed file")
    assert {values.dtype for name, values in tensors.items() if name.endswith("|values")} == {torch.int8}
    whole_tensors, _ = read_tensors(finished / "repacked.safetensors", "the packed file")
    sizes = [sum(x.nbytes for name, x in of.items() if name.endswith("|values")) for of in (tensors, whole_tensors)]
    assert 2 * sizes[0] < sizes[1]  # by how much depends on how the rows are padded


def test_stages_run_alone_and_a_lost_result_is_made_again(copied: Path) -> None:
    (copied / "masked.safetensors").unlink()
    again = Run(config(), copied)
    first = {name: value.clone() for name, value in again.masked.state_dict().items()}
    (copied / "masked.safetensors").unlink()
    second = Run(config(), copied).masked.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_report_is_written_again_from_what_is_stored(copied: Path) -> None:
    pages = ("report.html", "report.md", "front.png", "reward.png", "sparsity.png")
    before = {name: (copied / name).read_bytes() for name in pages}
    for name in before:
        (copied / name).unlink()
    assert not Run(config(), copied).complete
    (copied / "config.json").unlink()  # what is named there is not looked at
    assert CliRunner().invoke(app, ["report", str(copied)]).exit_code == 0
    assert {name: (copied / name).read_bytes() for name in before} == before


@pytest.mark.slow
def test_a_plan_that_was_changed_is_trained_and_measured_anew(copied: Path) -> None:
    run = Run(config(), copied)
    assert run.complete
    run.plan.with_sparsities(dict.fromkeys(run.plan.layers, 0.5)).save(copied / "plan.json")
    again = Run(config(), copied)
    assert not again.complete
    for name, layer in again.plan.layers.items():
        weight = weight_of(again.masked, name)
        alike = PATTERNS.create(layer.pattern).mask(weight.detach().abs(), 0.5, 1)
        assert sparsity(weight) == pytest.approx(sparsity(alike))
    outcomes = ("repacked.safetensors", "results.json", "report.html", "report.md")
    assert not [name for name in outcomes if (copied / name).exists()]
    x = again.task.example_inputs(3)
    torch.testing.assert_close(again.repacked(*x), again.masked(*x), rtol=1e-3, atol=1e-4)


def test_a_stage_of_another_run_is_not_taken(copied: Path) -> None:
    mine = Run(config(), copied).masked.state_dict()
    tensors, about = read_tensors(copied / "masked.safetensors", "the model")
    changed = {name: value + 1 for name, value in tensors.items()}
    write_tensors(copied / "masked.safetensors", changed, {**about, "made_for": "another run"})
    again = Run(config(), copied).masked.state_dict()
    assert all(torch.equal(mine[name], again[name]) for name in mine)


def test_what_was_timed_on_another_machine_is_timed_again_or_refused(copied: Path) -> None:
    stored = read_json(copied / "results.json", "the results")
    stored["machine"]["cpu"] = "another CPU"
    stored["rows"][-1]["speedup"] = 1e6
    write_json(copied / "results.json", stored)
    assert results(Run(config(), copied))[-1].speedup != 1e6
    claim = read_json(copied / "search" / "identity.json", "the claim")
    claim["parts"]["the machine"]["cpu"] = "another CPU"
    write_json(copied / "search" / "identity.json", claim)
    with pytest.raises(ConfigError, match=r"search was made with something else: the machine \(cpu\)"):
        _ = Run(config(), copied).searched


@pytest.mark.slow
def test_an_engine_that_cannot_run_the_model_is_told_in_the_table(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "openvino cannot run this model: no such operator."
    monkeypatch.setattr("autoprune.pipeline.baselines.dense_calls", lambda *_: ({}, {"openvino": why}))
    measured = results(Run(config(), copied), again=True)
    assert [(row.name, row.left_out) for row in measured if row.left_out] == [("dense, openvino", why)]
    assert results(Run(config(), copied)) == measured, "read from the directory"
    assert f"\ndense, openvino left out: {why}\n" in write_report(report_of(Run(config(), copied)))


def test_a_directory_of_another_config_is_refused(finished: Path) -> None:
    before = (finished / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="another config; these keys differ: seed"):
        Run(config(seed=5), finished)
    assert (finished / "config.json").read_bytes() == before


def test_a_stale_latency_table_is_refused(copied: Path) -> None:
    table = read_json(copied / "latency.json", "the table")
    table["machine"]["cpu"] = "another CPU"
    write_json(copied / "latency.json", table)
    with pytest.raises(StaleTable, match="cpu was 'another CPU'"):
        _ = Run(config(), copied).preparation.table
    fresh = Run(config(), copied, fresh_table=True).preparation.table
    assert fresh.machine["cpu"] != "another CPU"


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("latency.json", "problem"),
        ("sensitivity.json", "problem"),
        ("plan.json", "plan"),
        ("masked.safetensors", "masked"),
        ("repacked.safetensors", "repacked"),
        ("search/trials.jsonl", "searched"),
        ("search/evaluations.jsonl", "problem"),
        ("search/agent.json", "searched"),
    ],
)
def test_a_corrupt_file_is_a_file_error_that_names_it(copied: Path, name: str, stage: str) -> None:
    (copied / name).write_bytes(b"nonsense\n")
    with pytest.raises(FileError, match=name.rsplit("/", 1)[-1].split(".")[0]):
        getattr(Run(config(), copied), stage)


def test_an_infeasible_target_is_refused_before_the_search(copied: Path) -> None:
    shutil.rmtree(copied / "search")
    unclaim(copied)
    (copied / "plan.json").unlink()
    run = Run(config(target={"speedup": 900.0}), copied)
    with pytest.raises(InfeasibleTarget, match="Ask for at most"):
        _ = run.searched
    assert not (copied / "search" / "trials.jsonl").exists()


def test_a_plan_can_be_given_in_place_of_a_search(finished: Path, tmp_path: Path) -> None:
    run = Run(config(), tmp_path / "given")
    run.adopt(finished / "plan.json")
    assert run.plan == Plan.load(finished / "plan.json")
    other = run.plan.with_sparsities(dict.fromkeys(run.plan.layers, 0.5))
    other.save(tmp_path / "other.json")
    with pytest.raises(ConfigError, match="has a plan already"):
        run.adopt(tmp_path / "other.json")


def test_workers_here_and_on_a_cluster_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        Run(config(), tmp_path, workers=4, ray="auto")


@pytest.mark.slow
def test_a_killed_run_resumes(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(config(search={**SMALL["search"], "episodes": 400}).to_json()))  # type: ignore[dict-item]
    code = (
        "import json, sys; from pathlib import Path; from autoprune.config import parse_config; "
        "from autoprune.pipeline.run import Run; "
        "Run(parse_config(json.loads(Path(sys.argv[1]).read_text()), 'x'), Path(sys.argv[2])).searched"
    )
    others = shutil.ignore_patterns("search", "plan.json", "config.json", "identity.json")
    shutil.copytree(finished, tmp_path / "killed", ignore=others)
    log = tmp_path / "killed" / "search" / "trials.jsonl"
    process = subprocess.Popen([sys.executable, "-c", code, str(path), str(tmp_path / "killed")])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= 13:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = read_lines(log, "the trials")[:10]
    assert len(done) == 10
    short = parse_config(json.loads(path.read_text()), "x")
    trials: list[Trial] = []
    run = Run(short, tmp_path / "killed")
    env = run.search.env  # the stages before the search load without work
    result = search(run.context.choices.agent, env, 16, 0, directory=log.parent, on_resumed=trials.extend)
    assert len(trials) == 10, "the checkpoint every ten episodes is where a killed search goes on"
    assert [trial.to_json() for trial in result.trials[:10]] == done


def cli(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    text = result.output + (str(result.exception) if result.exception else "")
    return result.exit_code, text


@pytest.mark.parametrize(
    "command", ["run", "profile", "train", "apply", "prune", "finetune", "repack", "bench", "report"]
)
def test_every_command_has_help_with_an_example(command: str) -> None:
    code, text = cli(command, "--help")
    assert code == 0
    assert "Example" in text


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (["run", "no.toml"], FileError, "not found"),
        (["report", "no-such-run"], FileError, "not found"),
        (["apply", "--policy", "none", "--model", "a:b", "--data", "c:d", "--speedup", "2"], FileError, "policy"),
        (["apply", "--policy", "none", "--model", "a:b", "--data", "c:d"], ConfigError, "at least one"),
    ],
)
def test_bad_input_is_one_error_and_writes_nothing(
    arguments: list[str], kind: type[Exception], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=text):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []


def test_the_process_prints_one_paragraph_and_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["autoprune", "run", "no.toml"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: the config not found: no.toml. Give the path of a TOML file, or the name")


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autoprune.config.load_config", interrupted)
    monkeypatch.setattr(sys, "argv", ["autoprune", "run", "any.toml"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    assert "same command again" in capsys.readouterr().err


def test_errors_share_a_base() -> None:
    assert all(issubclass(kind, AutopruneError) for kind in (ConfigError, FileError, InfeasibleTarget, StaleTable))


def test_a_training_that_diverges_is_done_again_more_slowly(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def finetune(model: nn.Module, plan: Plan, subject: Subject, settings: TrainingSettings, **_: object) -> None:
        rates.append(settings.changed(plan.settings).learning_rate)
        if len(rates) < 3:
            raise NumericalError("the loss is nan.")

    monkeypatch.setattr("autoprune.pipeline.application.finetune_", finetune)
    (copied / "masked.safetensors").unlink()
    _ = Run(config(), copied).masked
    assert rates == [rates[0], rates[0] / 4, rates[0] / 16]
