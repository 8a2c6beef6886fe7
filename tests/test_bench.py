"""`autoprune bench` and `repack` of a model as it stands: what is measured, what is printed, what is refused."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import autoprune
from autoprune.bench import bench_model, example_inputs, parse_shape
from autoprune.cli import app
from autoprune.errors import AutopruneError, ConfigError
from autoprune.latency.engines.base import Call, DenseEngine, Inputs
from autoprune.latency.timer import Latency
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.rivals import dense_calls
from autoprune.repack.tuning.layer_times import LayerTime
from autoprune.report.bench_tables import Bench, Peak, layers_table, models_table

MODELS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 4))
    with torch.no_grad():
        net[3].weight[:, ::2] = 0
    return net

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(5, 8), nn.Linear(8, 4)

    def forward(self, ids, scale):
        return self.head(self.words(ids) * scale)

def words():
    return Words()

class Fickle(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(x) if x.sum().item() > 0 else self.head(-x)

def fickle():
    return Fickle()

def number():
    return 3
"""


def ticking() -> Callable[[], float]:
    ticks = itertools.count()
    return lambda: next(ticks) * 1e-3


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models_of_test_bench.py").write_text(MODELS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def invoke(*arguments: str) -> str:
    named = [text.replace("models:", "models_of_test_bench:") for text in arguments]
    result = CliRunner().invoke(app, named, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_model_as_it_stands_is_measured_whole_and_by_layer(models: Path) -> None:
    text = invoke("bench", "models:net", "--input", "2,3,6,6", "--engines", "channels_last", "--rounds", "2",
                  "--save", "fast.safetensors")  # fmt: skip
    for wanted in ("the model itself, torch eager", "channels_last", "repacked", "best dense", "GFLOP/s a core"):
        assert wanted in text
    layers = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "conv2d" in layers["0"]
    assert "50%" in layers["3"]
    assert layers["0"].count("contiguous") + layers["0"].count("channels_last") == 1
    fast = autoprune.load(models / "fast.safetensors")
    assert tuple(fast(torch.zeros(2, 3, 6, 6)).shape) == (2, 4)


def test_several_inputs_of_several_types(models: Path) -> None:
    arguments = ["--input", "1,7", "--input", "1,7,8", "--dtype", "int64", "--dtype", "float32"]
    text = invoke("bench", "models:words", *arguments, "--engines", "eager", "--rounds", "1")
    assert "head" in text
    assert "embedding" in text


def test_a_model_that_is_no_program_is_told_by_its_report(models: Path) -> None:
    text = invoke("bench", "models:fickle", "--input", "1,8", "--engines", "eager", "--rounds", "1")
    assert "Not one program" in text
    assert "head" in text


def test_repack_writes_any_model(models: Path) -> None:
    text = invoke("repack", "models:net", "--input", "1,3,6,6", "--save", "fast.safetensors")
    assert "Written: fast.safetensors" in text
    x = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    model = __import__("models_of_test_bench").net().eval()
    with torch.inference_mode():
        torch.testing.assert_close(autoprune.load("fast.safetensors")(x), model(x), atol=1e-4, rtol=1e-4)


def test_eight_bit_values_make_a_smaller_file(models: Path) -> None:
    sizes = []
    for bits in ("32", "8"):
        invoke("repack", "models:net", "--input", "1,3,6,6", "--save", f"{bits}.safetensors", "--value-bits", bits)
        sizes.append((models / f"{bits}.safetensors").stat().st_size)
    assert sizes[1] < sizes[0]
    x = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    whole, rounded = (autoprune.load(f"{bits}.safetensors")(x) for bits in (32, 8))
    assert 0 < float((whole - rounded).abs().max()) < 0.05 * float(whole.abs().max())


def test_memory_tells_a_row_a_packed_layer(models: Path) -> None:
    text = invoke("bench", "models:net", "--input", "1,3,6,6", "--memory")
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
            for line in text.splitlines() if line.startswith("|")}  # fmt: skip
    assert list(rows) == ["layer", "------------", "0", "3", "all of these"]
    dense, stored = (rows["layer"].index(name) for name in ("dense KB", "in a file KB"))
    assert [rows[name][dense] for name in ("0", "3")] == ["0.8", "4.5"]
    assert rows["3"][0] == "50%"
    assert float(rows["3"][stored]) < 0.6 * 4.5
    assert "full" in rows["0"][rows["layer"].index("told by")]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["bench", "models:net"], "--input 1,3,224,224"),
        (["bench", "models:net", "--input", "1,3,a"], "'1,3,a' is no shape"),
        (["bench", "models:net", "--input", "1,4,6,6"], r"does not run on \(1, 4, 6, 6\) float32"),
        (["bench", "models:net", "--input", "1,3,6,6", "--dtype", "int"], "Did you mean 'int64'"),
        (["bench", "models:net", "--input", "1,3,6,6", "--engines", "eagr"], "Did you mean 'eager'"),
        (["bench", "models:net", "--input", "1,3,6,6", "--run-dir", "runs"], "--run-dir is for a config"),
        (["bench", "models:number", "--input", "1"], "must return a torch.nn.Module, not a int"),
        (["bench", "models:nte", "--input", "1"], "Did you mean 'net'"),
        (["bench", "no_such_module:net", "--input", "1"], "cannot be imported"),
        (["bench", "some.toml", "--threads", "2"], "--threads is for a function"),
        (["repack", "some.toml", "--save", "x"], "--save is for a function"),
        (["repack", "models:net", "--input", "1,3,6,6"], "--save fast.safetensors"),
        (["repack", "models:net", "--input", "1,3,6,6", "--save", "x", "--value-bits", "4"], "32 or 8 bits, not 4"),
        (["repack", "some.toml", "--value-bits", "8"], "--value-bits is for a function"),
        (["bench", "models:net", "--input", "1,3,6,6", "--memory", "--rounds", "3"], "--rounds is for bench without"),
        (["bench", "models:fickle", "--input", "1,8", "--memory"], "only a program's memory can be told"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_error(models: Path, arguments: list[str], text: str) -> None:
    before = {path for path in models.iterdir() if path.suffix != ".pyc" and path.name != "__pycache__"}
    with pytest.raises(AutopruneError, match=text):
        invoke(*arguments)
    assert {path for path in models.iterdir() if path.name != "__pycache__"} == before


@pytest.mark.parametrize("text", ["", ",", "1,", "1,-3", "1,0", "1x3", "1.5", "²"])
def test_what_is_no_shape(text: str) -> None:
    with pytest.raises(ConfigError, match="is no shape"):
        parse_shape(text)


def test_example_inputs() -> None:
    ids, x = example_inputs(["2, 5", "2,3"], ["int64", "float32"])
    assert (ids.dtype, tuple(ids.shape), x.dtype, tuple(x.shape)) == (torch.int64, (2, 5), torch.float32, (2, 3))
    assert set(ids.flatten().tolist()) <= {0, 1}
    assert [each.dtype for each in example_inputs(["1", "2"], ["int64"])] == [torch.int64] * 2
    assert torch.equal(*(example_inputs(["3,4"], [])[0] for _ in range(2)))
    with pytest.raises(ConfigError, match="2 --dtype for 3 --input"):
        example_inputs(["1", "1", "1"], ["int64", "float32"])


def test_an_engine_that_is_missing_is_told_or_an_error_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DenseEngine, "available", lambda self: "pip install it")
    monkeypatch.setattr("autoprune.latency.engines.eager.Eager.available", lambda self: None, raising=False)
    monkeypatch.setattr("autoprune.latency.engines.compile.Compile.available", lambda self: "a compiler")
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.ones(1, 8)
    found = bench_model(model, (x,), rounds=1, clock=ticking())
    assert list(found.latencies) == ["eager", "repacked"]
    assert "onnxruntime left out: " in models_table(found)
    assert "pip install it" in found.left_out["onnxruntime"]
    with pytest.raises(AutopruneError, match="pip install it"):
        bench_model(model, (x,), engines=["onnxruntime"], rounds=1, clock=ticking())


class Flat(nn.Module):
    """Takes contiguous images alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1) * 2


class Doubles(DenseEngine):
    """An engine that computes something else, at no cost."""

    def _compile(self, model: nn.Module, inputs: Inputs, threads: int, calibration: Sequence[Inputs]) -> Call:
        with torch.inference_mode():
            result = 2 * model(*inputs)
        return lambda: result


def test_engines_that_fail_or_compute_something_else_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Flat(), nn.Linear(4 * 36, 5))
    monkeypatch.setattr("autoprune.latency.engines.compile.Compile", Doubles)
    found = bench_model(model, (torch.randn(2, 3, 8, 8),), engines=["channels_last", "compile"], rounds=1)
    assert list(found.latencies) == ["eager", "repacked"]
    assert found.best == "eager"
    assert list(found.left_out) == ["channels_last", "compile"]
    assert "view size is not compatible" in found.left_out["channels_last"]
    assert "which is wrong: its output differs in 10 of 10 values, by up to" in found.left_out["compile"]
    assert f"\ncompile left out: {found.left_out['compile']}" in found.text()


def test_an_engine_gets_inputs_of_its_own() -> None:
    pytest.importorskip("onnxruntime")

    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1.0)

    x = torch.zeros(1, 4)
    calls, left_out = dense_calls(Writes(), (x,), 1, ["eager", "channels_last", "onnxruntime"])
    assert list(calls) == ["eager", "channels_last", "onnxruntime"]
    assert not left_out
    assert not x.any()


def test_the_tables() -> None:
    def latency(ms: float) -> Latency:
        return Latency.from_samples([ms, ms], 2)

    latencies = {
        "eager": latency(6.0), "onnxruntime": latency(4.0), "openvino_bf16": latency(1.0), "repacked": latency(2.0)
    }  # fmt: skip
    tiling = Tiling(8, 48, 4, False)
    conv = LayerTime("conv1", "conv2d", "jit", 0.75, 8, tiling, 5_000_000, 1_000_000, 100.0, 90.0, 300.0, "contiguous")
    copy = LayerTime("input", "copy", "jit", None, None, None, 0, 1000, 10.0, 9.0)
    found = Bench(
        autoprune.repack(nn.Sequential(nn.Linear(8, 4)), torch.ones(1, 8)),
        latencies,
        {},
        (copy, conv),
        Peak("FMA", 100.0),
    )
    assert found.best == "onnxruntime", "bfloat16 is not the same work"
    whole = [[cell.strip() for cell in line.split("|")[1:-1]] for line in models_table(found).splitlines()]
    assert whole[0][0] == "model, 2 thread(s)"
    assert [(row[0], row[2]) for row in whole[2:]] == [
        ("the model itself, torch eager", "0.67x"),
        ("onnxruntime, best dense", "1.00x"),
        ("openvino_bf16 (bf16: not compared)", "4.00x"),
        ("repacked", "2.00x"),
    ]
    lines = [line for line in layers_table(found.layers, Peak("FMA", 100.0)).splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert "of 100 peak" in rows[0]
    assert rows[3] == [
        "conv1", "conv2d", "75%", "300.0", "contiguous", "jit", "8", "48x4 weights", "100.0", "90.0", "3.00x",
        "50.0", "50%", "5.0",
    ]  # fmt: skip
    assert rows[-1][:4] == ["all of these", "", "", "300.0"]
    assert rows[-1][8] == "110.0"
    assert models_table(found) in found.text()


def test_a_model_in_bytes_is_compared_with_engines_of_any_precision() -> None:
    names = ("eager", "onnxruntime", "openvino_bf16", "onnxruntime_int8", "repacked")
    latencies = {
        name: Latency.from_samples([ms, ms], 1) for name, ms in zip(names, (6.0, 4.0, 3.0, 2.0, 1.0), strict=True)
    }
    fast = autoprune.repack(nn.Sequential(nn.Linear(8, 4)), torch.ones(1, 8))
    snr_db = {"openvino_bf16": 50.0, "onnxruntime_int8": 31.4, "repacked": 33.0}
    found = Bench(fast, latencies, {}, (), None, "int8", snr_db)
    assert found.best == "onnxruntime_int8"
    whole = [[cell.strip() for cell in line.split("|")[1:-1]] for line in models_table(found).splitlines()]
    assert [(row[0], row[1], row[2], row[4]) for row in whole[2:]] == [
        ("the model itself, torch eager", "float32", "-", "0.33x"),
        ("onnxruntime", "float32", "-", "0.50x"),
        ("openvino_bf16", "bf16", "50.0", "0.67x"),
        ("onnxruntime_int8, best dense", "int8", "31.4", "1.00x"),
        ("repacked", "int8", "33.0", "2.00x"),
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="its names have no colon")
@pytest.mark.parametrize(
    "command", [["bench"], ["repack"], ["export", "--out", "model.onnx"]], ids=lambda each: each[0]
)
def test_a_directory_with_a_colon_in_its_name_is_no_function(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs:1").mkdir()
    with pytest.raises(AutopruneError, match=r"the run's config not found|is a folder: give the config"):
        CliRunner().invoke(app, [*command, "runs:1"], catch_exceptions=False)
