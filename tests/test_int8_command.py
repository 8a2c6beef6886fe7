"""`repack`, `bench` and a whole run in int8, through the command line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import autoprune
from autoprune.cli import app
from autoprune.errors import AutopruneError, ConfigError
from autoprune.files import read_json
from autoprune.pipeline import baselines
from tests.helpers import SMALL_TOML
from tests.repack.rounded import needs_bf16

MODELS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)
    )

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, images, scale):
        return self.body(images) * scale

def scaled():
    return Scaled()

def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        yield torch.rand(4, 3, 6, 6, generator=generator)

def pairs():
    return [(batch, torch.zeros(4)) for batch in batches()]

def broken():
    yield torch.rand(4, 3, 6, 6)
    raise OSError("the disk is gone")

def none():
    return []

def number():
    return 3
"""
NET = ["models_of_test_int8:net", "--input", "1,3,6,6"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models_of_test_int8.py").write_text(MODELS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def rows_of(text: str, first: str) -> dict[str, list[str]]:
    """The cells of the table whose header begins with `first`, by its first column, the header's too."""
    lines = text.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith(f"| {first}"))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start:]]
    return {row[0]: row for row in rows[: next((at for at, row in enumerate(rows) if not row), len(rows))]}


def test_a_model_is_repacked_in_bytes_and_told_by_layer(folder: Path) -> None:
    text = invoke("repack", *NET, "--precision", "int8", "--calibration", "models_of_test_int8:batches",
                  "--save", "fast.safetensors")  # fmt: skip
    table = rows_of(text, "layer")
    assert {"precision", "scale", "SNR dB"} <= {*table["layer"]}
    assert table["0"][table["layer"].index("precision")] == "int8"
    assert float(table["0"][table["layer"].index("SNR dB")]) > 20
    fast = autoprune.load(folder / "fast.safetensors")
    assert any(row.precision == "int8" for row in fast.report)


@needs_bf16
def test_a_model_is_repacked_in_bf16_without_calibration(folder: Path) -> None:
    """Which of its layers are, is measured: each is told."""
    table = rows_of(invoke("repack", *NET, "--precision", "bf16", "--save", "fast.safetensors"), "layer")
    fast = autoprune.load(folder / "fast.safetensors")
    assert {row.precision for row in fast.report} <= {"float32", "bf16"}
    assert all("float32" in row.why for row in fast.report)
    assert {row.name for row in fast.report} <= {*table}


def test_a_run_in_bf16_is_refused_with_the_precisions_it_may_have(folder: Path) -> None:
    given = ["run", "digits", "--precision", "bf16", "--run-dir", str(folder / "run")]
    with pytest.raises(ConfigError, match=r"precision.*planned"):
        CliRunner().invoke(app, given, catch_exceptions=False)


def test_a_float32_model_has_no_columns_about_bytes(folder: Path) -> None:
    assert "SNR" not in invoke("repack", *NET, "--save", "fast.safetensors")


def test_calibration_data_of_files(folder: Path) -> None:
    images = torch.rand(70, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    np.save(folder / "few.npy", images[:5].double().numpy())  # numpy's own floats
    save_file({"scale": torch.ones(70, 1), "images": images}, folder / "both.safetensors")
    invoke("repack", *NET, "--precision", "mixed", "--calibration", "few.npy", "--save", "fast.safetensors")
    both = ["models_of_test_int8:scaled", "--input", "2,3,6,6", "--input", "2,1"]
    text = invoke(
        "repack", *both, "--precision", "int8", "--calibration", "both.safetensors", "--save", "two.safetensors"
    )
    assert "int8" in text


def test_a_benchmark_in_bytes_tells_what_they_lose(folder: Path) -> None:
    text = invoke("bench", *NET, "--precision", "int8", "--calibration", "models_of_test_int8:batches",
                  "--engines", "channels_last", "--rounds", "2")  # fmt: skip
    models, layers = rows_of(text, "model"), rows_of(text, "layer | precision")
    assert models["repacked"][models[next(iter(models))].index("precision")] == "int8"
    assert float(models["repacked"][models[next(iter(models))].index("SNR dB")]) > 20
    assert layers["0"][1] == "int8"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--precision", "int8"], "--precision int8 needs --calibration"),
        (["--precision", "int4"], "Did you mean 'int8'"),
        (["--calibration", "models_of_test_int8:batches"], "--calibration is for --precision int8 or mixed alone"),
        (
            ["--precision", "bf16", "--calibration", "models_of_test_int8:batches"],
            "for --precision int8 or mixed alone",
        ),
        (["--precision", "int8", "--calibration", "models_of_test_int8:pairs"], "without targets"),
        (["--precision", "int8", "--calibration", "models_of_test_int8:none"], "gives no batch"),
        (["--precision", "int8", "--calibration", "models_of_test_int8:number"], "must return a list of batches"),
        (["--precision", "int8", "--calibration", "models_of_test_int8:broken"], "the disk is gone"),
        (["--precision", "int8", "--calibration", "models_of_test_int8:bathces"], "Did you mean 'batches'"),
        (["--precision", "int8", "--calibration", "images.npz"], "ends in .npy or .safetensors"),
        (["--precision", "int8", "--calibration", "images.npy"], "not found"),
        (["--precision", "int8", "--calibration", "text.npy"], "cannot be read"),
        (["--precision", "int8", "--calibration", "text.safetensors"], "cannot be read"),
        (["--precision", "int8", "--calibration", "pickled.npy"], "cannot be read"),
        (["--precision", "int8", "--calibration", "empty.npy"], "holds no samples"),
        (["--precision", "int8", "--calibration", "named.safetensors"], "not as the model is called"),
        (["--precision", "int8", "--calibration", "empty.safetensors"], "holds no samples"),
        (["--precision", "int8", "--calibration", "number.npy"], "holds no samples"),
    ],
)
def test_calibration_that_cannot_be_used_is_refused(folder: Path, options: list[str], said: str) -> None:
    for name in ("text.npy", "text.safetensors"):
        (folder / name).write_text("no numbers")
    np.save(folder / "pickled.npy", np.array([{"code": 1}], dtype=object), allow_pickle=True)
    np.save(folder / "empty.npy", np.zeros((0, 3, 6, 6), np.float32))
    save_file({"images": torch.zeros(0, 3, 6, 6)}, folder / "empty.safetensors")
    save_file({"pictures": torch.zeros(4, 3, 6, 6), "labels": torch.zeros(4)}, folder / "named.safetensors")
    np.save(folder / "number.npy", np.float32(1))
    with pytest.raises(AutopruneError, match=said):
        CliRunner().invoke(app, ["repack", *NET, "--save", "fast.safetensors", *options], catch_exceptions=False)
    assert not (folder / "fast.safetensors").exists()


def test_engines_in_bytes_take_larger_batches_than_the_calibration_data_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """They find their ranges on the example inputs then."""
    given: list[Sequence[tuple[Tensor, ...]] | None] = []

    def dense_calls(*arguments: Any) -> tuple[dict[str, Any], dict[str, str]]:
        given.append(arguments[-1])
        return {}, {}

    monkeypatch.setattr(baselines, "dense_calls", dense_calls)
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    for samples in (5, 2):
        inputs = (torch.rand(samples, 6),)
        baselines.engines_of(
            model, inputs, [], 1, time.perf_counter, precision="int8", calibration=[(torch.rand(2, 6),)]
        )
    assert given[0] is None
    assert given[1] is not None
    assert [batch[0].shape for batch in given[1]] == [(2, 6)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run in int8, to its end."""
    folder = tmp_path_factory.mktemp("int8")
    config = SMALL_TOML.replace('engines = ["eager"]', 'engines = ["eager", "openvino_bf16"]')
    (folder / "small.toml").write_text(config + "[target]\nsparsity = 0.5\n")
    invoke("prune", str(folder / "small.toml"), "--method", "one_shot", "--precision", "int8", "--quiet",
           "--run-dir", str(folder / "run"))  # fmt: skip
    return folder


@pytest.mark.slow
def test_a_run_in_bytes_ends_with_the_program_of_bytes(finished: Path) -> None:
    directory = finished / "run"
    assert read_json(directory / "config.json", "the config")["precision"] == "int8"
    fast = autoprune.load(directory / "repacked.safetensors")
    assert {row.precision for row in fast.report} == {"int8"}
    measured = read_json(directory / "results.json", "the results")["rows"]
    rows = {row["name"].removesuffix(", best engine"): row for row in measured}
    assert {name: row["precision"] for name, row in rows.items()} == {
        "dense, torch eager": "float32",
        "dense, openvino_bf16": "bf16",
        "dense, repacked": "int8",
        "masked": "float32",
        "repacked, called anew": "int8",
        "repacked": "int8",
    }
    for name, row in rows.items():
        assert (row["snr_db"] is None) == (row["precision"] == "float32"), name
    assert rows["repacked"]["snr_db"] > 15
    assert rows["repacked"]["score"] == rows["repacked, called anew"]["score"]


@pytest.mark.slow
def test_its_report_tells_precisions_and_whom_it_is_compared_with(finished: Path) -> None:
    page = (finished / "run" / "report.md").read_text()
    assert "the best dense engine of any precision" in page
    table = rows_of(page, "model")
    assert table["model"][1:3] == ["precision", "SNR dB"]
    plan = rows_of(page, "layer ")
    assert plan["layer"][-3:] == ["precision", "scale", "SNR dB"]
    assert plan["0.0"][-3] == "int8"


@pytest.mark.slow
def test_a_run_of_one_precision_is_not_taken_for_another_s(finished: Path) -> None:
    given = ["repack", str(finished / "small.toml"), "--run-dir", str(finished / "run")]
    with pytest.raises(ConfigError, match=r"these keys differ: .*precision"):
        CliRunner().invoke(app, given, catch_exceptions=False)
    given += ["--precision", "int8", "--set", "finetune.method=one_shot"]
    assert rows_of(invoke(*given), "layer")["0.0"][-4] == "int8"
