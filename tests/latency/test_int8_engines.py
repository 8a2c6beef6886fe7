"""The int8 engines: that they compute in int8, from the calibration batches, and say so where they cannot."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.latency.engines import ENGINES, DenseEngine
from autoprune.latency.engines.silence import silenced
from autoprune.registry import Choice
from autoprune.repack.rivals import dense_calls, signal_to_noise_db

INT8 = ["openvino_int8", "onnxruntime_int8"]


def engine(name: str) -> DenseEngine:
    made = ENGINES.create(Choice(name))
    if (command := made.available()) is not None:
        pytest.skip(command)
    return made


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten()).eval()


class Squares(nn.Module):
    """Multiplies by no weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x


@pytest.mark.slow
@pytest.mark.parametrize("name", INT8)
def test_ranges_come_from_the_calibration_batches(name: str) -> None:
    """Ranges of a hundredth of the inputs' size clip nearly all of them; the right ones clip none."""
    model, x = cnn(), torch.randn(1, 3, 12, 12)
    with torch.inference_mode():
        wanted = model(x)
    made = engine(name)
    like, small = [torch.randn(1, 3, 12, 12) for _ in range(3)], [0.01 * torch.randn(1, 3, 12, 12)]
    heard = {key: signal_to_noise_db(made.prepare(model, x, 1, batches)(), wanted) for key, batches in
             {"none": None, "like": like, "small": small}.items()}  # fmt: skip
    assert heard["none"] > 25
    assert heard["like"] > 25
    assert heard["small"] < 10


@pytest.mark.parametrize("name", INT8)
def test_a_model_without_products_is_refused_not_run_in_float32(name: str) -> None:
    with pytest.raises(AutopruneError, match=f"(OpenVINO|{name}) would run none of this model's products in"):
        engine(name).prepare(Squares(), torch.randn(1, 8), threads=1)


@pytest.mark.parametrize("name", INT8)
def test_an_engine_that_falls_back_to_float32_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantiser that gives the model back as it was."""
    made = engine(name)
    if name == "openvino_int8":
        import nncf

        monkeypatch.setattr(nncf, "quantize", lambda model, *_, **__: model)
    else:
        from autoprune.latency.engines import onnxruntime_int8

        def nothing(path: Any, out: Any, **_: Any) -> None:
            out.write_bytes(path.read_bytes())

        monkeypatch.setattr(onnxruntime_int8, "_static", nothing)
        monkeypatch.setattr(onnxruntime_int8, "_dynamic", nothing)
    with pytest.raises(AutopruneError, match="would run none of this model's products in"):
        made.prepare(cnn(), torch.randn(1, 3, 12, 12), threads=1)


def test_onnxruntime_takes_the_faster_quantisation_and_says_which() -> None:
    made = engine("onnxruntime_int8")
    made.prepare(nn.Linear(64, 8), torch.randn(2, 64), threads=1)
    assert made.note in ("static quantisation", "dynamic quantisation")


def test_onnxruntime_runs_what_one_quantisation_alone_can(monkeypatch: pytest.MonkeyPatch) -> None:
    from autoprune.latency.engines import onnxruntime_int8

    made = engine("onnxruntime_int8")

    def refuses(*_: Any, **__: Any) -> None:
        raise ValueError("not today")

    monkeypatch.setattr(onnxruntime_int8, "_static", refuses)
    made.prepare(nn.Linear(64, 8), torch.randn(2, 64), threads=1)
    assert made.note == "dynamic quantisation"
    monkeypatch.setattr(onnxruntime_int8, "_dynamic", refuses)
    with pytest.raises(AutopruneError, match="onnxruntime_int8 cannot run this model: not today"):
        made.prepare(nn.Linear(64, 8), torch.randn(2, 64), threads=1)


@pytest.mark.parametrize("batches", [[], [torch.zeros(1, 5)], [torch.zeros(1, 4, dtype=torch.int64)], [(1.0,)]])
def test_calibration_batches_must_be_like_the_example(batches: list[Any]) -> None:
    with pytest.raises(AutopruneError, match="calibration batch"):
        ENGINES.create(Choice("eager")).prepare(nn.Linear(4, 4), torch.zeros(1, 4), 1, batches)


def test_the_signal_to_noise_ratio_is_of_the_worst_output() -> None:
    right = (torch.tensor([3.0, 4.0]), torch.tensor([1.0]), torch.tensor([7]))
    arrays = [np.array([3.0, 4.5], np.float32), np.array([1.01], np.float32), np.array([8])]
    assert signal_to_noise_db(arrays, right) == pytest.approx(20.0)
    assert signal_to_noise_db(right, right) == float("inf")
    assert signal_to_noise_db([np.zeros(3, np.float32)], right[0]) == -float("inf")
    assert signal_to_noise_db([np.array([np.nan, 4.0], np.float32)], right[0]) == -float("inf")


def test_an_int8_engine_is_among_the_rivals_though_its_outputs_are_rounded() -> None:
    engine("openvino_int8")
    x = torch.randn(1, 3, 12, 12)
    calls, left_out = dense_calls(cnn(), (x,), 1, ["openvino_int8"], calibration=[(torch.randn(1, 3, 12, 12),)])
    assert list(calls) == ["openvino_int8"], left_out


def test_what_is_silenced_leaves_no_trace(capfd: pytest.CaptureFixture[str]) -> None:
    before = (list(logging.root.handlers), logging.root.manager.disable)
    with silenced():
        print("progress")
        logging.root.handlers.clear()
        logging.warning("an axis is out of range")
        warnings.warn("soon gone", FutureWarning, stacklevel=1)
    assert (list(logging.root.handlers), logging.root.manager.disable) == before
    assert capfd.readouterr() == ("", "")
