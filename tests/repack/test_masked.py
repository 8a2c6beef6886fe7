"""The sparsity in a report is that of the weight which is computed with, whatever stands before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

import autoprune


def holes(*shape: int) -> Tensor:
    """90% zeros."""
    kept = torch.zeros(shape).flatten()
    kept[::10] = 1.0
    return kept.view(shape)


class MaskedLinear(nn.Linear):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__(40, 40)
        self.register_buffer("mask", holes(40, 40))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * self.mask, self.bias)


class MaskedConv(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(10, 20, 3)
        self.mask = holes(20, 10, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self._conv_forward(x, self.weight * self.mask, self.bias))


class Mask(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * holes(*weight.shape)


class Standardised(nn.Conv2d):
    """Zeros in its parameter are none in its weight."""

    def __init__(self) -> None:
        super().__init__(10, 20, 3)
        with torch.no_grad():
            self.weight *= holes(20, 10, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return cast("Tensor", self._conv_forward(x, weight, self.bias))


def hooked() -> nn.Module:
    """As other tools keep masks: the weight is computed before every forward."""
    layer = nn.Linear(40, 40)
    raw, kept = layer.weight, holes(40, 40)
    assert isinstance(raw, nn.Parameter)
    del layer.weight
    layer.register_parameter("weight_raw", raw)
    layer.register_buffer("weight_kept", kept)
    layer.register_forward_pre_hook(lambda m, _: setattr(m, "weight", m.weight_raw * m.weight_kept))
    layer.weight = raw.detach() * kept
    return layer


def parametrised() -> nn.Module:
    return parametrize.register_parametrization(nn.Linear(40, 40), "weight", Mask())


@pytest.mark.parametrize("form", ["program", "modules", "onnx"])
@pytest.mark.parametrize(
    ("build", "expected"),
    [(MaskedLinear, 0.9), (MaskedConv, 0.9), (hooked, 0.9), (parametrised, 0.9), (Standardised, 0.0)],
)
def test_a_report_tells_the_zeros_that_are_computed_with(
    build: Callable[[], nn.Module], expected: float, form: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layer = build()
    model = nn.Sequential(layer, nn.ReLU()).eval()
    x = torch.randn(2, 10, 8, 8) if isinstance(layer, nn.Conv2d) else torch.randn(2, 40)
    if form == "onnx":
        pytest.importorskip("onnxscript")
        (exported,) = autoprune.export_onnx(model, x, tmp_path / "model.onnx").layers
        assert exported.sparsity == pytest.approx(expected, abs=1e-3)
        return
    fast = autoprune.repack(model, x, form=form, choose=(lambda *_: "jit") if form == "modules" else None)
    (row,) = fast.report
    assert row.sparsity == pytest.approx(expected, abs=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)
