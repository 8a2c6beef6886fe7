"""A directory goes on with what it was made with, in any process, and refuses everything else by name."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from typer.testing import CliRunner

import autoprune
from autoprune import api
from autoprune.cli import app
from autoprune.config import load_config
from autoprune.errors import ConfigError
from autoprune.files import read_json
from autoprune.latency.machine import machine_identity
from autoprune.latency.table import LatencyTable
from autoprune.metric import BITS_PER_CHARACTER
from autoprune.model.weights import weight_of
from autoprune.pipeline import preparation
from autoprune.pipeline.compare import _ACTIONS
from autoprune.pipeline.run import Run
from autoprune.report.run_report import RunReport
from autoprune.tasks.batches import first_batches


class Stopped(Exception):
    """In place of the stages behind the first ones, which take seconds."""


@pytest.fixture(autouse=True)
def only_the_first_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    def report_of(run: Run) -> RunReport:
        _ = run.prepared
        raise Stopped

    monkeypatch.setattr(api, "report_of", report_of)


class Net(nn.Module):
    """Says with an attribute, and with a function it holds, what it computes."""

    def __init__(self, activation: Any = functional.relu, scale: float = 1.0, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1, stride=stride)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)
        self.activation, self.scale = activation, scale
        self.made_by = f"process {os.getpid()}, {id(self)}"  # noted down, read by no method

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.norm(self.conv(x))).mean((2, 3)) * self.scale)  # type: ignore[no-any-return]


class Doubled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def images(seed: int, count: int = 12) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 6, 6, generator=draws), torch.randint(0, 3, (count,), generator=draws)


def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    x, y = images(seed)
    return [(x[:6], y[:6]), (x[6:], y[6:])]


def scored_on(seed: int, top: int = 1) -> Callable[[nn.Module], float]:
    x, y = images(seed)

    def evaluate(model: nn.Module) -> float:
        return float((model(x).topk(top).indices == y[:, None]).any(1).float().mean())

    return evaluate


def net(*args: Any, kind: type[nn.Module] = Net, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(*args, **kwargs)


def arguments(**changed: Any) -> dict[str, Any]:
    given = {"model": net(), "train": batches(0), "evaluate": scored_on(1), "example_inputs": torch.zeros(1, 1, 6, 6)}
    return {**given, "target": autoprune.Target(sparsity=0.5), **changed}


def compress(directory: Path, **given: Any) -> None:
    with pytest.raises(Stopped):
        autoprune.compress(**given, directory=directory)


def retrained() -> nn.Module:
    model = net()
    with torch.no_grad():
        weight_of(model, "conv")[0, 0, 0, 0] += 1e-6
    return model


def with_a_buffer(value: float) -> nn.Module:
    model = net()
    with torch.no_grad():
        model.get_buffer("norm.running_mean").fill_(value)
    return model


def with_a_frozen_norm() -> nn.Module:
    model = net()
    model.get_submodule("norm").requires_grad_(False)
    return model


def last_target_changed() -> list[tuple[Tensor, Tensor]]:
    made = batches(0)
    made[-1][1][-1] = (made[-1][1][-1] + 1) % 3
    return made


def squared(output: Tensor, target: Tensor, weight: float = 1.0) -> Tensor:
    return weight * functional.cross_entropy(output, target) ** 2


def with_a_hook() -> nn.Module:
    model = net()
    model.get_submodule("norm").register_forward_hook(lambda module, args, output: output + 1)
    return model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": retrained()}, r"the model's weights \(conv.weight\)"),
        ({"model": with_a_buffer(0.5)}, r"the model's buffers \(norm.running_mean\)"),
        ({"model": net(functional.gelu)}, r"the model's architecture \(activation.code\)"),
        ({"model": net(scale=2.0)}, r"the model's architecture \(scale\)"),
        ({"model": net(stride=2)}, r"the model's architecture \(conv\)"),
        ({"model": net(kind=Doubled)}, r"the model's architecture \(as a whole\)"),
        ({"model": with_a_hook()}, r"the model's architecture \(norm.hook 1.code\)"),
        (
            {"model": with_a_frozen_norm()},
            r"the model's weights \(norm.bias, norm.weight\)",
        ),
        ({"train": batches(5)}, "the training data"),
        ({"train": last_target_changed()}, "the training data"),
        ({"train": DataLoader(TensorDataset(*images(0)), 6)}, "the training data"),
        ({"evaluate": scored_on(5)}, r"evaluate \(evaluate.x, evaluate.y\)"),
        ({"evaluate": scored_on(1, top=2)}, r"evaluate \(evaluate.top\)"),
        ({"evaluate": lambda model: float(model(torch.ones(1, 1, 6, 6)).mean())}, "evaluate"),
        ({"loss": squared}, "loss"),
        ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, "loss"),
        ({"metric": BITS_PER_CHARACTER}, "metric"),
        ({"example_inputs": torch.zeros(1, 1, 8, 8)}, "example inputs"),
        ({"example_inputs": torch.zeros(2, 1, 6, 6)}, "latency.batch"),
        ({"target": autoprune.Target(sparsity=0.6)}, "target.sparsity"),
    ],
)
def test_another_model_other_data_or_another_function_is_refused_by_name(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    compress(tmp_path / "run", **arguments())
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.json")}
    with pytest.raises(ConfigError, match=said) as refused:
        autoprune.compress(**arguments(**change), directory=tmp_path / "run")
    assert "delete" in str(refused.value)
    assert {path: path.read_bytes() for path in before} == before


class Squared:
    """A loss that is called like a function."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return squared(output, target, self.weight)

    def method(self, output: Tensor, target: Tensor) -> Tensor:
        return self(output, target)


@pytest.mark.parametrize(
    ("loss", "other"),
    [
        (functools.partial(squared, weight=2.0), functools.partial(squared, weight=3.0)),
        (Squared(2.0), Squared(3.0)),
        (Squared(2.0).method, Squared(3.0).method),
        (lambda output, target: squared(output, target, 2.0), lambda output, target: squared(output, target, 3.0)),
        (
            torch.enable_grad()(functools.partial(squared, weight=2.0)),
            torch.enable_grad()(functools.partial(squared, weight=3.0)),
        ),
        (nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 1.0])), nn.CrossEntropyLoss(torch.tensor([1.0, 1.0, 2.0]))),
    ],
)
def test_functions_are_told_apart_by_what_they_hold(loss: Any, other: Any, tmp_path: Path) -> None:
    for _ in range(2):
        compress(tmp_path / "run", **arguments(loss=loss))
    with pytest.raises(ConfigError, match="loss"):
        autoprune.compress(**arguments(loss=other), directory=tmp_path / "run")


def test_what_a_function_counts_or_remembers_is_no_part_of_it(tmp_path: Path) -> None:
    seen: list[nn.Module] = []
    count, x = {"calls": 0}, images(1)[0]
    remembered = 0.0

    def evaluate(model: nn.Module) -> float:
        nonlocal remembered
        seen.append(model)
        count["calls"] += 1
        remembered = float(model(x).detach().sigmoid().mean())
        return remembered

    for _ in range(3):
        compress(tmp_path / "run", **arguments(evaluate=evaluate))
    assert count["calls"] == 3
    x += 1.0
    with pytest.raises(ConfigError, match=r"evaluate \(evaluate.x\)"):
        autoprune.compress(**arguments(evaluate=evaluate), directory=tmp_path / "run")


class Scored:
    """An evaluation that counts its calls, and keeps what it was asked for last."""

    def __init__(self, value: float) -> None:
        self.value, self.calls, self.options = value, 0, {"scale": 1.0, "calls": 0}
        self.started = id(self)  # noted down, read by no method

    def __call__(self, model: nn.Module, seen: list[int] = []) -> float:  # noqa: B006 - people do
        self.calls += 1
        self.options["calls"] += 1
        seen.append(self.calls)
        setattr(self, f"call_{self.calls}", model)
        return self.value * self.options["scale"]

    def method(self, model: nn.Module) -> float:
        return self(model)


class AlsoScored(Scored):
    def __call__(self, model: nn.Module) -> float:  # type: ignore[override]
        return super().__call__(model)


@pytest.mark.parametrize("taken", [lambda scored: scored, lambda scored: scored.method, lambda scored: [scored][0]])
def test_an_object_that_counts_its_calls_is_compared_all_the_same(taken: Any, tmp_path: Path) -> None:
    own = Scored(0.5)
    for each in (own, own, Scored(0.5), own):
        compress(tmp_path / "run", **arguments(evaluate=taken(each)))
    scaled = Scored(0.5)
    scaled.options["scale"] = 0.5
    for other, said in ((Scored(0.25), "value"), (scaled, "options.scale"), (AlsoScored(0.5), "code")):
        with pytest.raises(ConfigError, match=rf"evaluate \(.*evaluate\.{said}"):
            autoprune.compress(**arguments(evaluate=taken(other)), directory=tmp_path / "run")


def test_a_hook_that_counts_leaves_the_rest_of_its_module_and_the_table_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def profile_table(subject: Any, patterns: Any, settings: Any, *_: Any) -> LatencyTable:
        return LatencyTable({}, 1.0, ((1.0, 1.0),), settings, machine_identity())

    def report_of(run: Run) -> RunReport:
        _ = run.preparation.table
        raise Stopped

    monkeypatch.setattr(preparation, "profile_table", profile_table)
    monkeypatch.setattr(api, "report_of", report_of)
    seen: list[int] = []

    def hooked(**changed: Any) -> nn.Module:
        model = net(**changed)
        model.get_submodule("conv").register_forward_hook(lambda *_: seen.append(1))
        return model

    own = hooked()
    for model in (own, own, hooked()):
        compress(tmp_path / "run", **arguments(model=model))
    assert seen
    with pytest.raises(ConfigError, match=r"architecture \(conv\)"):
        autoprune.compress(**arguments(model=hooked(stride=2)), directory=tmp_path / "run")


def test_the_rest_of_a_loaders_order_is_compared(tmp_path: Path) -> None:
    def loader(last: int) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*images(0)), 1, sampler=[0, 1, 2, 3, 4, last])

    compress(tmp_path / "run", **arguments(train=loader(5)))
    with pytest.raises(ConfigError, match=r"the training data \(.*content.sampler"):
        autoprune.compress(**arguments(train=loader(6)), directory=tmp_path / "run")


class Counted(IterableDataset[Any]):
    """Data without a length, whose order is drawn by every library."""

    def __init__(self, seed: int) -> None:
        self.x, self.y = images(seed)

    def __iter__(self) -> Iterator[Any]:
        for _ in range(8):
            at = int(torch.randint(12, ())) + np.random.randint(12)
            yield self.x[at % 12] + torch.rand(()), self.y[at % 12]


class Unsteady:
    """Batches that nobody can draw again."""

    def __init__(self, seed: int) -> None:
        self.x, self.y = images(seed)

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Any]:
        draws = np.random.default_rng()
        for _ in range(2):
            yield self.x[:6] + float(draws.random()), self.y[:6]


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: DataLoader(TensorDataset(*images(seed)), 4, shuffle=True),
        lambda seed: DataLoader(TensorDataset(*images(seed)), 4, shuffle=True, generator=torch.Generator()),
        lambda seed: DataLoader(Counted(seed), 4),
        lambda seed: Unsteady(seed),
    ],
)
def test_loaders_that_draw_go_on_and_those_of_other_data_do_not(make: Any, tmp_path: Path) -> None:
    own = make(0)
    for loader in (own, own, make(0)):
        compress(tmp_path / "run", **arguments(train=loader))
    with pytest.raises(ConfigError, match="the training data"):
        autoprune.compress(**arguments(train=make(5)), directory=tmp_path / "run")


def test_reading_the_first_batches_leaves_all_random_numbers_as_they_were() -> None:
    loader = DataLoader(Counted(0), 4)
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(2), np.random.rand(2)
    torch.manual_seed(3)
    np.random.seed(3)
    first, again = (first_batches(loader, 2) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.rand(2), expected[0])
    assert np.array_equal(np.random.rand(2), expected[1])
    assert first_batches(iter(loader), 2) == ()


PROGRAM = """
import functools, os, random, sys, time
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
import autoprune
from autoprune import api
from autoprune.cli import app
from autoprune.pipeline.compare import _ACTIONS
from autoprune.config import load_config

class Stopped(Exception):
    pass

def report_of(run):
    _ = run.prepared
    raise Stopped

api.report_of = report_of

class Net(nn.Module):
    KINDS = {"relu", "gelu", "tanh", "none"}
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)
        self.allowed = {"relu", "gelu", "tanh", "none"}
        self.started = time.time()
    def forward(self, x):
        assert "relu" in self.allowed and "relu" in {"relu", "gelu", "tanh"}
        return self.b(torch.relu(self.a(x)))

class Noisy(Dataset):
    def __init__(self):
        draws = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(24, 8, generator=draws), torch.randint(0, 3, (24,), generator=draws)
        self.folder = Path.cwd() / "data"
    def __len__(self): return 24
    def __getitem__(self, at): return self.x[at] + random.random(), self.y[at]

class Score:
    def __init__(self): self.x, self.names, self.seen = torch.ones(4, 8), {"a", "b", "c", "d"}, 0
    def __call__(self, model): return self.of(model)
    def of(self, model):
        self.seen += 1
        return helper(model, self.x)

def helper(model, x, among=frozenset({"p", "q", "r"})):
    with torch.inference_mode():
        return float(model(x).sigmoid().mean())

def main(folder):
    local = torch.ones(4, 8)
    evaluates = {
        "lambda": lambda model: helper(model, local), "partial": functools.partial(helper, x=local),
        "method": Score().of, "object": Score(), "no_grad": torch.no_grad()(lambda model: helper(model, local)),
    }
    loaders = {
        "shuffled": DataLoader(Noisy(), 8, shuffle=True),
        "workers": DataLoader(Noisy(), 8, shuffle=True, num_workers=1),
    }
    torch.manual_seed(0)
    model, data = Net(), loaders["shuffled"]
    for name, evaluate, train in [
        *((name, each, data) for name, each in evaluates.items()),
        *((name, evaluates["lambda"], each) for name, each in loaders.items()),
    ]:
        try:
            autoprune.compress(
                model, train, evaluate, torch.rand(1, 8), autoprune.Target(sparsity=0.5), directory=folder / name
            )
        except Stopped:
            print(name, "goes on")

if __name__ == "__main__":
    main(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_the_same_program_goes_on_in_another_process_from_another_folder(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    told = []
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        done = subprocess.run(
            [sys.executable, str(program), str(tmp_path / "runs")],
            cwd=tmp_path / seed,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        told.append(done.stdout.split("\n"))
    assert told[0] == told[1]
    assert len(told[0]) == 8
    assert len(list((tmp_path / "runs").iterdir())) == 7


def test_a_config_edited_by_hand_and_a_lost_identity_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    compress(folder, **arguments())
    config = read_json(folder / "config.json", "the config")
    config["seed"] = 3
    autoprune.files.write_json(folder / "config.json", config)
    with pytest.raises(ConfigError, match=r"the config \(seed\)"):
        autoprune.compress(**arguments(config={"seed": 3}), directory=folder)
    assert read_json(folder / "identity.json", "the identity")["parts"]["the config"]["seed"] == "0"
    config["seed"] = 0
    autoprune.files.write_json(folder / "config.json", config)
    (folder / "identity.json").unlink()
    with pytest.raises(ConfigError, match="nobody knows what model"):
        autoprune.compress(**arguments(), directory=folder)


def test_a_directory_that_was_moved_goes_on(tmp_path: Path) -> None:
    compress(tmp_path / "run", **arguments())
    (tmp_path / "run").rename(tmp_path / "moved")
    compress(tmp_path / "moved", **arguments())


PROJECT = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def build():
    torch.manual_seed({weights})
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

def loaders():
    draws = torch.Generator().manual_seed({data})
    def split(count):
        x, y = torch.randn(count, 4, 4, generator=draws), torch.randint(0, 4, (count,), generator=draws)
        return DataLoader(TensorDataset(x, y), 8, shuffle=True)
    return split(40), split(16)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes a user's project into the working folder, as if by another process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two versions within a second have one cache file
    (tmp_path / "mine.toml").write_text(
        'target = {sparsity = 0.5}\n[task]\nname = "user"\nmodel = "identity_project:build"\n'
        'data = "identity_project:loaders"\n'
    )

    def write(weights: int = 0, data: int = 0) -> None:
        sys.modules.pop("identity_project", None)
        (tmp_path / "identity_project.py").write_text(PROJECT.format(weights=weights, data=data))
        importlib.invalidate_caches()

    return write


OF_COMPARE = ["target={speedup=2.0}", "env.timing=table", f"env.actions={_ACTIONS}"]
OWN = ["--model", "identity_project:build", "--data", "identity_project:loaders"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        (["run", "mine.toml"], []),
        (["profile", "mine.toml"], []),
        (["train", "mine.toml"], []),
        (["prune", "mine.toml"], []),
        (["prune", "mine.toml", "--method", "gradual"], ['finetune.method="gradual"']),
        (["finetune", "mine.toml"], []),
        (["repack", "mine.toml"], []),
        (["bench", "mine.toml"], []),
        (["bench", "mine.toml", "--memory"], []),
        (["compare", "mine.toml", "--set", OF_COMPARE[0]], OF_COMPARE),
        (["apply", *OWN, "--speedup", "2"], None),
    ],
)
def test_every_command_refuses_the_directory_of_another_model_or_other_data(
    command: list[str], overrides: list[str] | None, project: Callable[..., None]
) -> None:
    project()
    if overrides is None:
        config = api.apply_config(None, OWN[1], OWN[3], autoprune.Target(speedup=2.0), 1)
    else:
        config = load_config(Path("mine.toml"), overrides)
    assert Run(config, Path("made")).prepared.inventory.layers
    Path("made/report.md").write_text("# of the model as it was\n")
    arguments = [*command, "--run-dir", "made"]
    for changed, said in (
        ({"weights": 1}, r"the model's weights \(1.bias"),
        ({"data": 1}, "the training data.*the test"),
    ):
        project(**changed)
        with pytest.raises(ConfigError, match=said):
            CliRunner().invoke(app, arguments, catch_exceptions=False)
