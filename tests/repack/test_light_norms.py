"""Batch norms whose shapes are found out in one step: a captured graph is the one that torch finds in twenty."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensorMode

from autoprune.repack.graph import light_norms, torch_export
from autoprune.repack.graph.capture import capture
from autoprune.repack.graph.torch_export import CaptureError

NORM = torch.ops.aten._native_batch_norm_legit_no_training.default


class Norms(nn.Module):
    """Of maps, lengths and rows, with and without a weight, of memory in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.plain, self.lengths, self.rows = nn.BatchNorm2d(8, affine=False), nn.BatchNorm1d(8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(self.conv(x))
        x = self.plain(x.permute(0, 1, 3, 2))
        rows: Tensor = self.rows(self.lengths(x.flatten(2)).mean(2))
        return rows


def test_the_graph_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Norms().eval(), torch.randn(2, 3, 16, 20)
    shaped, own = [], light_norms._shaped

    def seen(x: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shaped.append(x.dim())
        return own(x, means)

    monkeypatch.setattr(light_norms, "_shaped", seen)
    light = capture(model, x)
    assert set(shaped) == {2, 3, 4}, "the norms of rows, lengths and maps"
    monkeypatch.setattr(torch_export, "light_norms", nullcontext)
    heavy = capture(model, x)
    assert (light.inputs, light.ops, light.outputs, light.conditions) == (
        *(heavy.inputs, heavy.ops, heavy.outputs, heavy.conditions),
    )
    assert light.inputs[0].free


def test_a_norm_of_other_channels_is_refused() -> None:
    with pytest.raises(CaptureError):
        capture(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(6)).eval(), torch.randn(2, 3, 8, 8))


def norm_of(mode: FakeTensorMode, dtype: torch.dtype = torch.float32) -> Any:
    with mode:
        x, channels = torch.empty(2, 8, 5, 5, dtype=dtype), torch.ones(8)
        return decomposition_table[NORM](x, channels, channels, channels, channels, 0.1, 1e-5)


def test_results_have_the_shapes_types_and_strides_of_torchs() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with light_norms.light_norms():
            light = norm_of(FakeTensorMode(), dtype)
        for ours, theirs in zip(light, norm_of(FakeTensorMode(), dtype), strict=True):
            assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


def test_values_other_threads_and_what_comes_after_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Any:
        raise AssertionError("shaped")

    monkeypatch.setattr(light_norms, "_shaped", never)
    own = decomposition_table[NORM]
    x, channels, found = torch.randn(2, 8, 5, 5), torch.full((8,), 2.0), []
    with light_norms.light_norms():
        given = decomposition_table[NORM](x, channels, channels, channels, channels, 0.1, 1e-5)[0]
        torch.testing.assert_close(given, nn.functional.batch_norm(x, channels, channels, channels, channels))
        thread = threading.Thread(target=lambda: found.append(norm_of(FakeTensorMode())))
        thread.start()
        thread.join()
    assert len(found) == 1
    assert decomposition_table[NORM] is own
