"""Devices that a command runs programs on: what they measure, and how they fail. This machine stands in for them."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from autoprune.config import load_config, parse_config
from autoprune.errors import AutopruneError, ConfigError, DeviceError, StaleTable
from autoprune.evaluation.devices import DEVICES, command
from autoprune.evaluation.devices.command import Command
from autoprune.evaluation.devices.process import HERE
from autoprune.latency.table import LatencyTable
from autoprune.latency.timer import Protocol
from autoprune.masks import apply_masks_
from autoprune.model.inventory import take_inventory
from autoprune.pipeline.choices import create_choices
from autoprune.registry import Choice
from autoprune.repack import ProgramModel, repack
from autoprune.repack.aot import bench
from autoprune.testing import fake_table, small_cnn

X = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ROUNDS = Protocol(samples=4, warmup=1, min_sample_ms=0.05, lead=1)
posix = pytest.mark.skipif(sys.platform == "win32", reason="the commands are shell scripts")
compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


def program(model: nn.Module) -> ProgramModel:
    fast = repack(model, X)
    assert isinstance(fast, ProgramModel)
    return fast


@pytest.fixture(scope="module")
def pair() -> tuple[ProgramModel, ProgramModel]:
    """A dense model and the same with nine in ten weights cut, repacked."""
    sparse = small_cnn()
    layers = [name for name, each in sparse.named_modules() if isinstance(each, nn.Conv2d)]
    keep = torch.Generator().manual_seed(1)
    masks = {}
    for name in layers:
        weight = sparse.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        rows = torch.rand(weight.shape[0] // 8, *weight.shape[1:], generator=keep) < 0.1
        masks[name] = rows.repeat_interleave(8, 0)
    apply_masks_(sparse, masks)
    return program(small_cnn()), program(sparse)


@compiler
def test_models_are_timed_in_turns_on_the_device(pair: tuple[ProgramModel, ProgramModel]) -> None:
    device = Command("host", "{file}")
    dense, sparse = pair
    times = device.time({'a "dense" one': dense, "sparse": sparse, "again": sparse}, (X,), ROUNDS, time.perf_counter)
    assert list(times) == ['a "dense" one', "sparse", "again"]
    for each in times.values():
        assert len(each.samples_ms) == ROUNDS.samples
        assert min(each.samples_ms) <= each.p10_ms <= each.median_ms <= each.p90_ms
        assert each.device == "host"
        assert each.threads == 1


@compiler
def test_operations_are_timed_by_name_on_the_device(pair: tuple[ProgramModel, ProgramModel]) -> None:
    _, sparse = pair
    rows = Command("host", "{file}").layer_times(sparse, small_cnn(), (X,), ROUNDS, time.perf_counter)
    here = HERE.layer_times(sparse, small_cnn(), (X,), Protocol(samples=1, warmup=1), time.perf_counter)
    assert [(row.name, row.kind, row.flops) for row in rows] == [(row.name, row.kind, row.flops) for row in here]
    assert all(row.median_us > 0.0 for row in rows)
    assert all(row.dense_us is None for row in rows)


@pytest.mark.slow
@compiler
def test_operations_of_a_batch_that_is_computed_by_sample_are_summed() -> None:
    batch = X.repeat(3, 1, 1, 1)
    fast = repack(small_cnn(), batch)
    assert isinstance(fast, ProgramModel)
    fast.program.by_sample = True
    device = Command("host", "{file}")
    rows = device.layer_times(fast, small_cnn(), (batch,), ROUNDS, time.perf_counter)
    one = device.layer_times(program(small_cnn()), small_cnn(), (X,), ROUNDS, time.perf_counter)
    assert [row.name for row in rows if row.kind == "conv2d"] == [row.name for row in one if row.kind == "conv2d"]
    assert device.time({"batch": fast}, (batch,), ROUNDS, time.perf_counter)["batch"].median_ms > 0.0


@compiler
def test_what_is_no_program_is_refused(pair: tuple[ProgramModel, ProgramModel]) -> None:
    device = Command("host", "{file}")
    with pytest.raises(DeviceError, match=r"mine cannot be measured on host, by '{file}': only whole programs"):
        device.time({"mine": lambda: None}, (X,), ROUNDS, time.perf_counter)
    with pytest.raises(DeviceError, match="only whole programs can be built"):
        device.time({"layers": repack(small_cnn(), X, form="modules")}, (X,), ROUNDS, time.perf_counter)


@compiler
def test_the_device_says_what_it_is() -> None:
    about = Command("host", "{file}").identity()
    assert {"device": "command", "target": "host", "run": "{file}"}.items() <= about.items()
    if sys.platform == "linux":
        assert about["cores"] >= 1
        assert about["machine"]
    json.dumps(about)


def test_a_device_goes_to_workers_without_what_it_built() -> None:
    device = pickle.loads(pickle.dumps(Command("aarch64", "there {file}", 5.0)))  # noqa: S301  # as workers get it
    assert str(device) == "aarch64, by 'there {file}'"


def script(folder: Path, text: str) -> str:
    """A command that runs a shell script, which is given the program."""
    path = folder / "device.sh"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return f"{path} {{file}}"


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program is built: the commands of these tests never run it."""
    monkeypatch.setattr(command, "bench_program", lambda *_, **__: None)


@posix
@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("echo no route to host >&2; exit 255", "ended with status 255, saying: no route to host. What was measured"),
        ("exit 132", r"status 132 \(an illegal instruction: the target asks for more"),
        ("kill -ILL $$", r"status -4 \(an illegal instruction"),
        ("true", "it lacks the program's last line"),
        ("""echo 'connected'; echo '{"autoprune": "device"}'""", "it lacks the program's last line"),
        ("""echo '{"autoprune": "device"'""", "is no JSON"),
        ("""echo '{"autoprune": "end"}'""", "it says 0 times what it is, not once"),
        ("""for n in 1 2; do echo '{"autoprune": "device"}'; echo '{"autoprune": "end"}'; done""", "it says 2 times"),
    ],
)
def test_a_command_that_fails_is_told(tmp_path: Path, does: str, told: str) -> None:
    with pytest.raises(DeviceError, match=told):
        Command("host", script(tmp_path, does)).identity()


@posix
@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize(
    "samples",
    ["[1.0, 2.0]", '[1.0, 2.0, 3.0, "4"]', "[1.0, 2.0, 3.0, -1.0]", "[0, 0, 0, 0]", "7", "null"],
)
def test_times_that_are_none_are_refused(tmp_path: Path, samples: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Command, "_compiled", lambda *_: None)
    said = f'{{"autoprune": "model", "model": "model_0", "samples_ms": {samples}}}\n{{"autoprune": "end"}}'
    device = Command("host", script(tmp_path, f"cat <<'END'\n{said}\nEND"))
    with pytest.raises(DeviceError, match="is not understood: samples_ms are not 4 times"):
        device.time({"one": lambda: None}, (X,), ROUNDS, time.perf_counter)
    with pytest.raises(DeviceError, match="tells of no model, not model_0"):
        Command("host", script(tmp_path, """echo '{"autoprune": "end"}'""")).time(
            {"one": lambda: None}, (X,), ROUNDS, time.perf_counter
        )


@posix
@pytest.mark.usefixtures("unbuilt")
def test_a_device_that_does_not_answer_is_given_up_with_all_it_started(tmp_path: Path) -> None:
    run = script(tmp_path, f"sleep 60 & echo $! > {tmp_path}/child\nwait")
    with pytest.raises(DeviceError, match=r"did not answer in 0.5 s: .* What was measured before is kept"):
        Command("host", run, timeout_s=0.5).identity()
    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)  # what is killed ends soon, and what is not never does


@posix
@pytest.mark.usefixtures("unbuilt")
def test_a_command_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"was not found: '/nowhere/qemu' of device.run = '/nowhere/qemu {file}'"):
        Command("host", "/nowhere/qemu {file}").identity()
    (tmp_path / "device.sh").write_text("")
    with pytest.raises(DeviceError, match=r"cannot be run: .*Permission denied"):
        Command("host", f"{tmp_path}/device.sh {{file}}").identity()


@posix
@pytest.mark.usefixtures("unbuilt")
def test_the_command_is_no_line_of_a_shell(tmp_path: Path) -> None:
    run = script(tmp_path, f'echo "$#: $2" > {tmp_path}/given; exit 1')
    with pytest.raises(DeviceError):
        Command("host", f"{run} 'a b; $HOME'").identity()
    assert (tmp_path / "given").read_text() == "2: a b; $HOME\n"


def test_a_platform_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "toolchain", lambda _: None)
    with pytest.raises(AutopruneError, match=r"no C compiler for the target 'aarch64' .*gcc-aarch64-linux-gnu, or Zig"):
        Command("aarch64", "{file}").identity()


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ({"target": "aarch64", "run": "qemu-aarch64-static"}, "device.run must hold {file}"),
        ({"target": "aarch46", "run": "{file}"}, "Did you mean 'aarch64'"),
        ({"target": "host", "run": "'{file}"}, "device.run cannot be split into words"),
        ({"target": "host", "run": ["{file}"]}, "device.run is a string"),
        ({"target": "host", "run": "{file}", "timeout_s": 0}, "device.timeout_s is a number of seconds above 0"),
        ({"target": "host", "run": "{file}", "timeout_s": math.nan}, "at most 86400, not nan"),
        ({"target": "host", "run": "{file}", "timeout_s": math.inf}, "at most 86400, not inf"),
        ({"target": "host", "run": "{file}\0"}, "device.run holds a character"),
        ({"target": "host"}, "missing a required argument: 'run'"),
        ({"target": "host", "run": "{file}", "runs": 1}, "has no argument 'runs'. Did you mean 'run'"),
        ("commander", "unknown device 'commander'. Did you mean 'command'"),
        ({"name": "process", "target": "host"}, "has no argument 'target'"),
    ],
)
def test_a_device_that_cannot_be_is_refused_before_any_work(device: object, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        create_choices(parse_config({"task": "digits", "device": device}, "x.toml"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"latency": {"threads": 2}}, "latency.threads must be 1 on host"),
        ({"latency": {"engines": ["openvino"]}}, "latency.engines are dense engines of this machine"),
        ({"target": {"speedup": 2.0, "over": "eager"}}, 'target.over = "eager" cannot be measured'),
    ],
)
def test_what_only_this_process_times_is_refused_of_a_device(change: dict[str, object], told: str) -> None:
    device = {"target": "host", "run": "{file}"}
    with pytest.raises(ConfigError, match=told):
        create_choices(parse_config({"task": "digits", "device": device, **change}, "x.toml"))


def test_a_speed_up_on_a_device_is_over_the_dense_model_repacked() -> None:
    config = load_config(Path("digits"), ["device.target=aarch64", "device.run=qemu-aarch64-static {file}"])
    assert config.device == Choice("command", {"target": "aarch64", "run": "qemu-aarch64-static {file}"})
    assert config.target.over == "repacked"
    assert parse_config(config.to_json(), "again") == config
    assert parse_config({"task": "digits"}, "x.toml").target.over == "best"
    assert isinstance(create_choices(config).device, Command)
    assert list(DEVICES) == ["process", "command"]


def test_the_table_of_another_device_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Command, "_about", {"machine": "aarch64", "cpu": "", "cores": 4})
    inventory = take_inventory(small_cnn(), X)
    table = fake_table(inventory, (Choice("group", {"size": 8}),))
    measured = LatencyTable(
        table.layers, table.dense_ms, table.whole, {}, Command("aarch64", "board-1 {file}").identity()
    )
    measured.save(tmp_path / "latency.json")
    same = Command("aarch64", "board-1 {file}").identity()
    assert LatencyTable.load(tmp_path / "latency.json", settings={}, machine=same) == measured
    with pytest.raises(StaleTable, match=r"run was 'board-1 {file}', here it is 'board-2 {file}'"):
        LatencyTable.load(
            tmp_path / "latency.json", settings={}, machine=Command("aarch64", "board-2 {file}").identity()
        )
    with pytest.raises(StaleTable, match="target was 'aarch64', here it is not recorded"):
        LatencyTable.load(tmp_path / "latency.json", settings={}, machine=HERE.identity())
