"""Every dense engine computes what torch computes, for models with one and with several inputs."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError, ConfigError, MissingExtra
from autoprune.latency.engines import ENGINES, DenseEngine, baselines, best_engine, export
from autoprune.latency.engines.base import Call
from autoprune.latency.engines.export import OnnxEngine
from autoprune.latency.engines.openvino import import_openvino
from autoprune.latency.timer import Protocol
from autoprune.registry import Choice
from autoprune.repack.rivals import dense_calls

ROOT = Path(__file__).resolve().parents[2]


class TwoOfEach(nn.Module):
    """Two inputs of different kinds, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 4, 3, padding=1)
        self.words = nn.Embedding(11, 4)

    def forward(self, image: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.image(image).mean((2, 3))
        return seen + self.words(words).mean(1), seen


def cnn() -> tuple[nn.Module, tuple[Tensor, ...]]:
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(512, 5),
    ]
    model = nn.Sequential(*layers)
    model(torch.randn(4, 3, 8, 8))  # running statistics that matter
    return model, (torch.randn(2, 3, 8, 8),)


def two_of_each() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return TwoOfEach(), (torch.randn(2, 3, 8, 8), torch.randint(0, 11, (2, 6)))


def transformer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), (torch.randn(2, 5, 16),)


ALLOWED = {"float32": 1e-3, "bf16": 3e-2, "int8": 0.1}  # of the largest output: what rounding does to these models
# A C++ compiler takes some seconds for each model.
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name == "compile" else []) for name in ENGINES]
MODELS = {"cnn": cnn, "two_of_each": two_of_each, "transformer": transformer}


def engine(name: str) -> DenseEngine:
    made = ENGINES.create(Choice(name))
    if (command := made.available()) is not None:
        pytest.skip(command)
    return made


def prepared(made: DenseEngine, model: nn.Module, inputs: Any) -> Call:
    """The call of an engine; skips where this CPU has no bfloat16."""
    try:
        return made.prepare(model, inputs, threads=1)
    except AutopruneError as error:
        if made.precision == "bf16" and "in bf16 here" in str(error):
            pytest.skip(str(error))
        raise


def as_arrays(outputs: Any) -> list[np.ndarray[Any, Any]]:
    """Copies, for an engine may write the next result into the same memory."""
    values = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return [np.array(value.numpy() if isinstance(value, Tensor) else value) for value in values]


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("name", NAMES)
def test_an_engine_computes_what_torch_computes(name: str, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[kind]()
    with torch.inference_mode():
        expected = as_arrays(copy.deepcopy(model).eval()(*inputs))
    made = engine(name)
    run = prepared(made, model, inputs)
    for _ in range(2):
        given = as_arrays(run())
        assert [value.shape for value in given] == [value.shape for value in expected]
        for value, right in zip(given, expected, strict=True):
            assert np.abs(value - right).max() <= ALLOWED[made.precision] * np.abs(right).max()
    assert model.training, "the caller's model must stay as it was"
    assert capfd.readouterr() == ("", ""), "engines must be silent"


@pytest.mark.parametrize("name", NAMES)
def test_a_prepared_call_keeps_its_inputs(name: str) -> None:
    """The caller's inputs, here of a layout that must be copied, may go away."""
    torch.manual_seed(0)
    model, inputs = nn.Conv2d(3, 4, 3), torch.randn(1, 32, 32, 3).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = as_arrays(model(inputs))[0]
    run = prepared(engine(name), model, inputs)
    del inputs
    rubbish = [np.full((1, 3, 32, 32), np.nan, np.float32) for _ in range(50)]
    allowed = {"float32": 1e-5, "bf16": 3e-2, "int8": 5e-2}[ENGINES.get(name).precision]
    assert np.allclose(as_arrays(run())[0], expected, atol=allowed), len(rubbish)


def test_onnxruntime_writes_its_results_where_they_are_bound() -> None:
    torch.manual_seed(0)
    run: Any = engine("onnxruntime").prepare(*cnn(), threads=1)
    (results,) = run()
    expected = results.copy()
    results[...] = np.nan
    assert run()[0] is results
    assert np.array_equal(results, expected)


@pytest.mark.parametrize("name", ["eager", "channels_last"])
def test_torch_engines_run_on_the_threads_asked_for_and_restore_them(name: str) -> None:
    seen: list[int] = []

    class Watcher(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            assert torch.is_inference_mode_enabled()
            return x

    run = engine(name).prepare(Watcher(), torch.zeros(1, 3, 2, 2), threads=2)
    run()
    with torch.inference_mode():
        run()
    assert seen == [2, 2]
    assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_openvino_computes_in_float32_on_the_threads_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine("openvino")
    openvino = import_openvino()
    compiled: list[Any] = []
    original = openvino.Core.compile_model

    def spy(core: Any, *args: Any) -> Any:
        compiled.append(original(core, *args))
        return compiled[-1]

    monkeypatch.setattr(openvino.Core, "compile_model", spy)
    made.prepare(nn.Linear(4, 4), torch.zeros(1, 4), threads=2)
    assert compiled[0].get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    assert compiled[0].get_property("INFERENCE_NUM_THREADS") == 2
    assert compiled[0].get_property("NUM_STREAMS") == 1


@pytest.mark.parametrize(
    ("name", "imported"),
    [("openvino", "openvino import import_openvino"), ("openvino_int8", "openvino_int8 import import_nncf")],
)
def test_openvino_sends_no_usage_statistics(name: str, imported: str, tmp_path: Path) -> None:
    engine(name)
    script = (
        f"import logging, sys; from autoprune.latency.engines.{imported} as load; load(); "
        "assert not any(name.startswith('openvino_telemetry') for name in sys.modules); "
        "assert logging.getLoggerClass() is logging.Logger"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_CURRENT_TEST")}
    subprocess.run([sys.executable, "-c", script], env={**environment, "HOME": str(tmp_path)}, check=True, cwd=ROOT)
    assert not list(tmp_path.iterdir()), "openvino's telemetry leaves a client's id in the home folder"


def test_openvino_as_it_comes_is_no_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(ENGINES) - set(baselines()) == {"openvino_bf16", "openvino_int8", "onnxruntime_int8"}
    made = engine("openvino_bf16")
    openvino = import_openvino()
    given: list[Any] = []
    original = openvino.Core.compile_model

    def spy(core: Any, path: str, device: str, settings: dict[str, Any]) -> Any:
        given.append(settings)
        return original(core, path, device, settings)

    monkeypatch.setattr(openvino.Core, "compile_model", spy)
    prepared(made, nn.Linear(64, 64), torch.zeros(1, 64))
    wanted = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    assert given  # a session, or the fastest of several
    assert all(each == wanted for each in given)


def test_compile_freezes_its_own_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine("compile")
    import torch._inductor.config as inductor

    seen: list[tuple[bool, int, bool]] = []

    def compile_(function: Any) -> Any:
        def call(*inputs: Any) -> Any:
            seen.append((inductor.freezing, torch.get_num_threads(), torch.is_inference_mode_enabled()))
            return function(*inputs)

        return call

    monkeypatch.setattr(torch, "compile", compile_)
    run = made.prepare(nn.Linear(4, 4), torch.zeros(1, 4), threads=2)
    run()
    assert seen == [(True, 2, True), (False, 2, True)]


@pytest.mark.slow
def test_compile_does_not_give_up_after_several_models() -> None:
    made = engine("compile")
    import torch._dynamo.config as dynamo

    x = torch.randn(1, 4)
    with dynamo.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for _ in range(3):
            model = nn.Sequential(nn.Linear(4, 4))
            run = made.prepare(model, x, threads=1)
            with torch.inference_mode():
                assert np.allclose(as_arrays(run())[0], model(x).numpy(), atol=1e-6)


def test_compile_without_a_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(MissingExtra, match=r"needs what is not installed here.+apt install g\+\+"):
        ENGINES.create(Choice("compile")).prepare(nn.Linear(4, 4), torch.zeros(1, 4), threads=1)


def test_compile_says_why_it_cannot_run_a_model() -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("not today")

    with pytest.raises(AutopruneError, match=r"torch\.compile cannot run this model: not today"):
        engine("compile").prepare(Refuses(), torch.ones(1, 4), threads=1)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("onnxruntime", "engines"),
        ("onnxruntime_int8", "engines"),
        ("openvino", "engines"),
        ("openvino_bf16", "engines"),
        ("openvino_int8", "engines-int8"),
    ],
)
def test_a_missing_engine_says_how_to_install_it(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    made = ENGINES.create(Choice(name))
    assert made.available() == f'pip install "autoprune[{extra}]"'
    with pytest.raises(MissingExtra, match=rf'pip install "autoprune\[{extra}\]"'):
        made.prepare(nn.Linear(4, 4), torch.zeros(1, 4), threads=1)


def test_a_model_that_cannot_be_exported_is_an_error_that_says_why() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(AutopruneError, match=r"cannot be exported to ONNX: .+ Leave the engines"):
        engine("onnxruntime").prepare(Branches(), torch.ones(1, 4), threads=1)


class Projected(nn.Module):
    """ONNX has no LSTM with projections, but torch writes one."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 16, batch_first=True, proj_size=8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lstm(x)[0]
        return out


REFUSED: list[tuple[str, nn.Module, tuple[int, ...], str]] = [
    ("onnxruntime", Projected(), (1, 5, 16), "initial_c must have shape"),
    ("openvino", nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), (1, 4, 6, 6), r"padding mode: \[wrap\]"),
]


@pytest.mark.parametrize(("name", "model", "shape", "why"), REFUSED)
def test_a_model_that_an_engine_cannot_run_is_an_error_that_says_why(
    name: str, model: nn.Module, shape: tuple[int, ...], why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    made = engine(name)
    with pytest.raises(AutopruneError, match=f"cannot run this model: .*{why}") as raised:
        made.prepare(model.eval(), torch.randn(shape), threads=1)
    assert "\n" not in str(raised.value)
    assert "src/" not in str(raised.value)
    assert capfd.readouterr() == ("", ""), "engines must be silent"


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_file_that_an_engine_cannot_read_is_an_error(name: str, tmp_path: Path) -> None:
    made = engine(name)
    assert isinstance(made, OnnxEngine)
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(AutopruneError, match="cannot run this model: "):
        made.load(tmp_path / "m.onnx", (torch.zeros(1),), 1)


def test_of_the_sessions_of_a_brief_model_the_fastest_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Uneven(OnnxEngine):
        """Whose third session is the fastest; of a slow model no second one is made."""

        made = 0
        waits_s = (2e-5, 4e-5, 0.0, 4e-5)

        def _load(self, path: Path, inputs: tuple[Any, ...], threads: int) -> Call:
            wait_s, Uneven.made = self.waits_s[self.made], self.made + 1

            return lambda: wait_s

    def told(calls: dict[str, Any], _: Protocol) -> dict[str, Any]:
        return {name: SimpleNamespace(median_ms=1e3 * call()) for name, call in calls.items()}

    monkeypatch.setattr(export, "measure_together", told)
    assert Uneven().load(tmp_path, (), 1)() == 0.0
    assert Uneven.made == 4
    monkeypatch.setattr(Uneven, "made", 0)
    monkeypatch.setattr(Uneven, "waits_s", (1e-3,))
    assert Uneven().load(tmp_path, (), 1)() == 1e-3
    assert Uneven.made == 1


def test_engines_that_read_one_format_share_one_export(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "openvino"):
        engine(name)
    exports: list[object] = []
    written = torch.onnx.export

    def counted(*args: Any, **more: Any) -> Any:
        exports.append(args)
        return written(*args, **more)

    def failing(*args: Any, **_: Any) -> None:
        exports.append(args)
        raise ValueError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", counted)
    calls, left_out = dense_calls(nn.Linear(4, 3), (torch.randn(1, 4),), 1, ["onnxruntime", "openvino"])
    assert list(calls) == ["onnxruntime", "openvino"], left_out
    assert len(exports) == 1
    monkeypatch.setattr(torch.onnx, "export", failing)
    _, left_out = dense_calls(nn.Linear(4, 3), (torch.randn(1, 4),), 1, ["onnxruntime", "openvino"])
    assert all("cannot be exported to ONNX" in why for why in left_out.values())
    assert len(left_out) == 2
    assert len(exports) == 2, "what cannot be exported is not tried again"


def test_an_interrupt_is_no_reason() -> None:
    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine("onnxruntime").prepare(Interrupted(), torch.zeros(1), threads=1)


def test_an_unknown_engine_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown dense engine 'onnx_runtime'\. Did you mean 'onnxruntime'"):
        ENGINES.create(Choice("onnx_runtime"))


def test_the_best_engine_is_of_float32_unless_others_count() -> None:
    ms = {"eager": 4.0, "openvino": 2.0, "openvino_int8": 1.0, "repacked": 0.5}
    assert best_engine(ms) == "openvino"
    assert best_engine(ms, ENGINES) == "openvino_int8"
