"""ONNX export: the file computes what the masked model does, is smaller, and is chosen as the engine's times say."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

from autoprune.cli import app
from autoprune.errors import AutopruneError, ConfigError, MissingExtra
from autoprune.latency.engines.export import OnnxEngine
from autoprune.latency.timer import Protocol
from autoprune.model.weights import weight_of
from autoprune.patterns import PATTERNS
from autoprune.registry import Choice
from autoprune.repack import ExportReport, LayerForm, export_onnx
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.torch_export import CaptureError
from autoprune.repack.onnx import export, form_choice
from autoprune.repack.onnx import file as onnx_file
from autoprune.repack.onnx.forms import FORMS, shares
from autoprune.repack.outputs import same_output
from autoprune.report.bench_tables import export_text
from autoprune.testing import FakeClock

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

Model = TypeVar("Model", bound=nn.Module)
QUICK = Protocol(samples=1, warmup=1, min_sample_ms=0.0)
GROUP = Choice("group", {"size": 8})


class Residual(nn.Module):
    """Strides, dilation, one tap, a batch norm that shifts, a residual sum, a depthwise convolution, a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 16, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.first = nn.Conv2d(16, 24, (3, 1), padding=(2, 0), dilation=(2, 1))
        self.second = nn.Conv2d(24, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.second(nn.functional.silu(self.first(x)))).relu()
        out: Tensor = self.head(self.depthwise(x).mean((2, 3)))
        return out


def pruned(model: Model, choice: Choice, sparsity: float, seed: int = 0) -> Model:
    """In eval mode, with norms that do something and layers pruned by magnitude; a model's first one is left whole."""
    torch.manual_seed(seed)
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                    assert tensor is not None
                    tensor.uniform_(0.5, 2.0)
        for layer in layers:
            layer.weight.normal_(0.0, 0.3)
            if layer is not layers[0] and getattr(layer, "groups", 1) == 1:
                layer.weight.mul_(PATTERNS.create(choice).mask(layer.weight.abs(), sparsity))
    return model.eval()


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    """A file's outputs in ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return [torch.from_numpy(x) for x in session.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))]


@torch.inference_mode()
def assert_file_equals(path: Path, model: nn.Module, *inputs: Tensor) -> None:
    wanted = model(*inputs)
    got = run(path, *inputs)[0]
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def forms(report: ExportReport) -> dict[str, str]:
    return {row.name: row.form for row in report.layers}


def verdicts(report: ExportReport) -> dict[str, str]:
    return {row.engine: row.verdict for row in report.checked}


def always(form: str) -> Callable[[str, LayerForm], str]:
    return lambda name, layer: form


CASES = [
    ("gathered", GROUP, 0.75),
    ("gathered", Choice("unstructured"), 0.9),
    ("compacted", Choice("filter"), 0.5),
    ("dense", Choice("channel"), 0.5),
]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "choice", "sparsity"), CASES)
def test_the_file_computes_what_the_masked_model_does_at_any_batch_size(
    tmp_path: Path, form: str, choice: Choice, sparsity: float
) -> None:
    model = pruned(Residual(), choice, sparsity)
    report = export_onnx(model, torch.randn(2, 4, 12, 10), tmp_path / "m.onnx", choose=always(form))
    assert report.dynamic
    assert verdicts(report)["onnxruntime"] == "right"
    assert verdicts(report)["openvino"] in ("right", "not installed")
    assert set(forms(report)) == {"stem", "first", "second", "depthwise", "head"}
    if form != "dense":
        assert forms(report)["first"] == forms(report)["head"] == form
    for batch in (1, 2, 5):
        assert_file_equals(tmp_path / "m.onnx", model, torch.randn(batch, 4, 12, 10))
    assert [each.name for each in tmp_path.iterdir()] == ["m.onnx"]
    assert report.file_bytes == (tmp_path / "m.onnx").stat().st_size


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Conv2d | nn.Linear, Tensor]:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    choice = draw(st.sampled_from([GROUP, Choice("unstructured"), Choice("channel"), Choice("filter")]))
    out, into = draw(st.integers(1, 40)), draw(st.integers(1, 12))
    layer: nn.Conv2d | nn.Linear = nn.Linear(into, out, draw(st.booleans()))
    x = torch.randn(3, into)
    if draw(st.booleans()):
        kernel, stride, dilation = (draw(st.tuples(st.integers(1, 3), st.integers(1, 3))) for _ in range(3))
        padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
        layer, x = nn.Conv2d(into, out, kernel, stride, padding, dilation), torch.randn(2, into, 9, 8)
    with torch.no_grad():
        layer.weight.mul_(PATTERNS.create(choice).mask(layer.weight.abs(), draw(st.sampled_from([0.0, 0.5, 0.9]))))
    return layer.eval().requires_grad_(False), x


@pytest.mark.parametrize("name", list(FORMS))
@settings(max_examples=40)
@given(drawn=layers())
def test_every_form_of_a_layer_computes_what_the_layer_does(
    name: str, drawn: tuple[nn.Conv2d | nn.Linear, Tensor]
) -> None:
    layer, x = drawn
    form = LayerForm(layer)
    if not layer.weight.any():
        assert shares(form) == {}
        return
    with torch.inference_mode():
        got, wanted = FORMS[name](form)(x), layer(x)
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max() + 1e-6
    assert all(0.0 < share < 1.0 for share in shares(form).values())


def test_channels_nobody_needs_are_gone_from_the_whole_model(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)
    )
    model.eval()
    with torch.no_grad():
        weight_of(model, "2")[:, 8:] = 0  # channels of the first that nobody reads
    report = export_onnx(model, torch.randn(1, 3, 8, 8), tmp_path / "m.onnx")
    shapes = {tuple(tensor.dims) for tensor in onnx.load(str(tmp_path / "m.onnx")).graph.initializer}
    assert {(8, 3, 3, 3), (16, 8, 3, 3)} <= shapes
    assert forms(report) == {"0": "compacted", "2": "compacted", "5": "dense"}
    assert "8 of 32 filters" in report.layers[0].why
    assert_file_equals(tmp_path / "m.onnx", model, torch.randn(3, 3, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("leading", [(2,), (2, 3)])  # over tokens the exporter turns the weights round
def test_the_file_shrinks_as_sparsity_grows_whatever_the_form(tmp_path: Path, leading: tuple[int, ...]) -> None:
    sizes = []
    for sparsity in (0.0, 0.9):
        model = pruned(nn.Sequential(nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 512)), GROUP, sparsity)
        x = torch.randn(*leading, 16)
        report = export_onnx(model, x, tmp_path / "m.onnx", choose=always("dense"))
        sizes.append(report.file_bytes)
        assert_file_equals(tmp_path / "m.onnx", model, x)
        assert report.dense_bytes >= 4 * 512 * 512
    assert sizes[0] > 4 * 512 * 512
    assert sizes[1] < 0.22 * sizes[0]


class Named(nn.Module):
    """Two inputs of different kinds, a dictionary of two outputs, a layer called twice, one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.twice, self.unused = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(3, 3)

    def forward(self, words: Tensor, image: Tensor) -> dict[str, Any]:
        x = self.twice(self.twice(self.words(words)).relu())
        return {"sum": x + image[:, None], "both": (x, image * 2)}


@pytest.mark.slow
def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    model = pruned(Named(), GROUP, 0.5)
    inputs = (torch.randint(7, (2, 5)), torch.randn(2, 8))
    report = export_onnx(model, inputs, tmp_path / "m.onnx", choose=always("gathered"))
    rows = {row.name: row for row in report.layers}
    assert rows["unused"].form == "dense"
    assert "does not run" in rows["unused"].why
    graph = onnx.load(str(tmp_path / "m.onnx")).graph
    assert [value.name for value in graph.input] == ["words", "image"]
    assert {value.type.tensor_type.shape.dim[0].dim_param for value in graph.input} == {"batch"}
    with torch.inference_mode():
        wanted = model(*inputs)
    for got, right in zip(run(tmp_path / "m.onnx", *inputs), (wanted["sum"], *wanted["both"]), strict=True):
        assert torch.allclose(got, right, atol=1e-5)


def test_masks_are_applied_and_the_model_is_left_as_it_is(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(), nn.Linear(16, 4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:, :4] = True
    report = export_onnx(model, torch.randn(2, 16), tmp_path / "m.onnx", {"0": mask})
    assert forms(report)["0"] == "compacted"
    assert report.layers[0].sparsity == 0.75
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        weight_of(model, "0").mul_(mask)
    assert_file_equals(tmp_path / "m.onnx", model.eval(), torch.randn(3, 16))


def test_a_model_that_takes_one_batch_size_is_exported_for_that(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x.reshape(2, 2, 6))
            return out

    report = export_onnx(Fixed(), torch.randn(2, 12), tmp_path / "m.onnx")
    assert not report.dynamic


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("projected", [0, 3])
def test_steps_before_the_batch_are_no_batch(tmp_path: Path, projected: int) -> None:
    """An LSTM with the states it begins with: torch.export fixes its steps."""

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTM(6, 8, 2, bidirectional=True, proj_size=projected)

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y, (h, c) = self.cell(x, (h, c))
            return y, h, c

    inputs = torch.randn(3, 2, 6), torch.randn(4, 2, projected or 8), torch.randn(4, 2, 8)
    model = Sequence().eval()
    report = export_onnx(model, inputs, tmp_path / "m.onnx")
    assert not report.dynamic
    with torch.inference_mode():
        assert same_output(run(tmp_path / "m.onnx", *inputs), list(model(*inputs)))


def test_what_cannot_be_captured_is_exported_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise CaptureError("it is refused.")

    monkeypatch.setattr(export, "capture", refuse)
    model = pruned(nn.Sequential(nn.Linear(64, 64)), GROUP, 0.9)
    report = export_onnx(model, torch.randn(2, 64), tmp_path / "m.onnx")
    assert [(row.form, row.why) for row in report.layers] == [("dense", "exported as it stands: it is refused")]
    assert report.dynamic
    assert_file_equals(tmp_path / "m.onnx", model, torch.randn(3, 64))


def test_a_file_that_computes_something_else_never_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Off(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x[:, :4] * 2,)

    write = onnx_file.write_onnx
    monkeypatch.setattr(export, "write_onnx", lambda module, *rest: write(Off(), *rest))
    path = tmp_path / "m.onnx"
    path.write_text("an older one")
    with pytest.raises(
        AutopruneError, match=r"does not compute what the model computes, onnxruntime: wrong \(its output "
    ):
        export_onnx(nn.Linear(8, 4), torch.randn(2, 8), path)
    assert path.read_text() == "an older one"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_beyond_two_gigabytes_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "ONE_FILE", 1000)
    model = nn.Linear(64, 32).eval()
    report = export_onnx(model, torch.randn(1, 64), tmp_path / "m.onnx")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert report.file_bytes == sum(each.stat().st_size for each in tmp_path.iterdir())
    assert_file_equals(tmp_path / "m.onnx", model, torch.randn(4, 64))


# What every engine says ---------------------------------------------------------------------------------------------


def of_engine(monkeypatch: pytest.MonkeyPatch, name: str, load: Callable[..., Callable[[], Any]]) -> None:
    monkeypatch.setattr(type(export._engine(name)), "_load", lambda self, path, inputs, threads: load(inputs))


def test_an_engine_that_computes_something_else_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    model, x = nn.Linear(8, 4).eval(), torch.randn(2, 8)
    of_engine(monkeypatch, "openvino", lambda inputs: lambda: [np.zeros((len(inputs[0]), 4), np.float32)])
    report = export_onnx(model, x, tmp_path / "m.onnx")
    rows = {row.engine: row for row in report.checked}
    assert verdicts(report) == {"onnxruntime": "right", "openvino": "wrong"}
    assert "its output differs in 8 of 8 values, by up to" in rows["openvino"].why
    text = export_text(report)
    assert "equal to the model in onnxruntime." in text
    assert f"openvino: wrong ({rows['openvino'].why})" in text
    with pytest.raises(AutopruneError, match="does not compute what the model computes, openvino: wrong"):
        export_onnx(model, x, tmp_path / "other.onnx", engine="openvino", protocol=QUICK, clock=FakeClock())
    assert [each.name for each in tmp_path.iterdir()] == ["m.onnx"]


def test_an_engine_that_cannot_run_the_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")

    def fails(inputs: Any) -> Any:
        raise RuntimeError("Exception from src/x.cpp:3:\nno such operator")

    of_engine(monkeypatch, "openvino", fails)
    report = export_onnx(nn.Linear(8, 4), torch.randn(2, 8), tmp_path / "m.onnx")
    assert str(report.checked[1]) == "openvino: cannot run (openvino cannot run this model: no such operator)"
    of_engine(monkeypatch, "onnxruntime", fails)
    with pytest.raises(
        AutopruneError, match=r"onnxruntime: cannot run .*; openvino: cannot run .* Nothing was written"
    ):
        export_onnx(nn.Linear(8, 4), torch.randn(2, 8), tmp_path / "other.onnx")


def test_without_an_engine_nothing_is_checked_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxEngine, "available", lambda self: "pip install it")
    report = export_onnx(nn.Linear(8, 4), torch.randn(2, 8), tmp_path / "m.onnx")
    assert set(verdicts(report).values()) == {"not installed"}
    assert "not checked: no engine is installed" in export_text(report)


class Awkward(nn.Module):
    """What torch's exporter or an engine gets wrong when it is written as it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular")
        self.pools = nn.Sequential(
            nn.MaxPool2d(2, 2, 1, ceil_mode=True),
            nn.AvgPool2d(3, 2, 1, ceil_mode=True),
            nn.AvgPool2d(2, 1, divisor_override=3),
        )
        self.lstm = nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True, proj_size=3)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        x = self.pools(self.first(x))
        small = nn.functional.interpolate(x, size=(4, 2), mode="bilinear", antialias=True)
        tokens = x.flatten(2).transpose(1, 2)
        seen = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens, mask)
        return (
            small,
            seen,
            *self.lstm(tokens[:, :4])[1],
            nn.functional.logsigmoid(90.0 * (x - x.mean())),
            torch.log(x.relu() + 1e-10),
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch is slower with them
def test_what_engines_get_wrong_is_written_so_that_every_engine_is_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mask = torch.rand(2, 25, 25) > 0.5
    mask[:, :2] = torch.tensor([[False], [True]])  # one row masked whole
    report = export_onnx(Awkward().eval(), (torch.randn(2, 4, 20, 20), mask), tmp_path / "m.onnx")
    assert set(verdicts(report).values()) <= {"right", "not installed"}, report.checked
    assert report.dynamic


# Choosing by an engine's times --------------------------------------------------------------------------------------


def times_of(gathered_us: float) -> Callable[..., list[dict[str, float]]]:
    def time_cases(cases: Sequence[onnx_file.Case], *_: Any) -> list[dict[str, float]]:
        return [{name: 100.0 if name == "dense" else gathered_us for name in case.forms} for case in cases]

    return time_cases


@pytest.mark.slow
def test_a_form_is_taken_where_it_is_clearly_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form_choice, "time_cases", times_of(50.0))
    model = pruned(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 256)), GROUP, 0.75)
    report = export_onnx(
        model, torch.randn(1, 16), tmp_path / "m.onnx", engine="onnxruntime", protocol=QUICK, clock=FakeClock()
    )
    row = report.layers[1]
    assert (row.form, row.dense_us, row.packed_us, row.why) == ("gathered", 100.0, 50.0, "2.00x faster than dense")
    assert (report.engine, verdicts(report)["onnxruntime"]) == ("onnxruntime", "right")
    assert report.dense_ms is not None
    assert report.layers[0].why == "it has no zeros"


@given(st.floats(1.0, 200.0))
def test_a_form_that_is_not_clearly_faster_is_left(gathered_us: float) -> None:
    layer = pruned(nn.Sequential(nn.Identity(), nn.Linear(2, 2), nn.Linear(64, 256)), GROUP, 0.75)[2]
    assert isinstance(layer, nn.Linear)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(form_choice, "time_cases", times_of(gathered_us))
        timing = form_choice.Timing(export._engine("onnxruntime"), 1, QUICK, FakeClock())
        seen = {"y": torch.randn(1, 64)}
        chosen = form_choice.choose_forms(Graph((), (), None, {}), {"y": LayerForm(layer)}, seen, timing, None)["y"]
    assert (chosen.form == "gathered") == (gathered_us <= form_choice.GAIN * 100.0)
    assert (chosen.dense_us, chosen.packed_us) == (100.0, gathered_us)


@pytest.mark.slow
@pytest.mark.parametrize(("speedups", "form", "why"), [
    ([0.5, 1.0], "dense", "2.00x faster than dense, the whole model is not"),
    ([0.5, 0.5, 0.5], "dense", "exported as it stands: no other form of the model was as fast"),
])  # fmt: skip
def test_a_file_that_is_slower_than_the_dense_export_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speedups: list[float], form: str, why: str
) -> None:
    left = iter(speedups)
    monkeypatch.setattr(form_choice, "time_cases", times_of(50.0))
    monkeypatch.setattr(export, "speedup", lambda *_: next(left))
    model = pruned(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 256)), GROUP, 0.75)
    inputs = torch.randn(1, 16)
    report = export_onnx(model, inputs, tmp_path / "m.onnx", engine="onnxruntime", protocol=QUICK, clock=FakeClock())
    assert (report.layers[1].form, report.layers[1].why) == (form, why)
    assert_file_equals(tmp_path / "m.onnx", model, inputs)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_what_is_timed_is_each_form_of_each_layer(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name == "openvino":
        pytest.importorskip("openvino")
    forms_ = (("gathered", GROUP), ("compacted", Choice("filter")))
    cases, timed = [], []
    for form, choice in forms_:
        layer = pruned(nn.Sequential(nn.Identity(), nn.Conv2d(2, 2, 1), nn.Conv2d(8, 16, 3)), choice, 0.75)[2]
        assert isinstance(layer, nn.Conv2d)
        cases.append(
            onnx_file.Case(torch.randn(1, 8, 6, 6), {key: FORMS[key](LayerForm(layer)) for key in ("dense", form)})
        )

    def measure(calls: Mapping[str, Callable[[], Any]], *_: Any) -> Any:
        timed.append({key: torch.from_numpy(np.array(call()[0])) for key, call in calls.items()})
        return {}

    monkeypatch.setattr(onnx_file, "measure_together", measure)
    onnx_file.time_cases(cases, export._engine(name), 1, QUICK, FakeClock())
    for case, found in zip(cases, timed, strict=True):
        assert list(found) == list(case.forms)
        for key, form_ in case.forms.items():
            assert torch.allclose(found[key], form_(case.x), atol=1e-5)


# Errors and the command line ----------------------------------------------------------------------------------------


def test_errors_say_what_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(8, 4), torch.randn(2, 8)
    with pytest.raises(ConfigError, match=r"no engine 'onnxrutime' reads ONNX.*Did you mean 'onnxruntime'"):
        export_onnx(model, x, tmp_path / "m.onnx", engine="onnxrutime")
    with pytest.raises(ConfigError, match="no engine 'eager'"):
        export_onnx(model, x, tmp_path / "m.onnx", engine="eager")
    for path in (tmp_path, tmp_path / "model.bin"):
        with pytest.raises(ConfigError, match=r"must be named like model\.onnx"):
            export_onnx(model, x, path)
    with pytest.raises(ConfigError, match=r"unknown form 'gather' of layer ''.*Did you mean 'gathered'"):
        export_onnx(model, x, tmp_path / "m.onnx", choose=always("gather"))
    with pytest.raises(AutopruneError, match="does not run on its example inputs"):
        export_onnx(model, torch.randn(2, 9), tmp_path / "m.onnx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="pip install"):
        export_onnx(model, x, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


MODULE = """
import torch
def build():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
    model[2].weight.data[:, 2:] = 0
    return model
"""


def test_the_command_exports_a_function_s_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_a_user_to_export.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    out = tmp_path / "out" / "model.onnx"
    arguments = ["export", "of_a_user_to_export:build", "--input", "1,3,8,8", "--out", str(out)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "| 2 " in result.output
    assert f"Written: {out}" in result.output
    assert out.is_file()
    with pytest.raises(ConfigError, match="--input 1,3,224,224"):
        CliRunner().invoke(app, [*arguments[:2], *arguments[4:]], catch_exceptions=False)
    with pytest.raises(ConfigError, match="for a function alone"):
        CliRunner().invoke(app, ["export", str(tmp_path), *arguments[2:]], catch_exceptions=False)
