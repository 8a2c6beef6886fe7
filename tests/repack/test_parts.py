"""Models with parts that autoprune cannot see into: they are repacked around them, or refused in words of our own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import autoprune
from autoprune.errors import AutopruneError
from autoprune.model.inventory import take_inventory
from autoprune.repack import CaptureError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript and torch's quantisation


def part() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.SiLU()).eval()


PARTS: dict[str, Callable[[], nn.Module]] = {
    "scripted": lambda: torch.jit.script(part()),
    "traced": lambda: torch.jit.trace(part(), torch.randn(2, 64)),
    "frozen": lambda: torch.jit.freeze(torch.jit.script(part())),
}


def around(inner: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 64), inner, nn.Linear(64, 8)).eval()


@pytest.mark.parametrize("name", PARTS)
def test_a_model_is_repacked_around_torchscript(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = around(PARTS[name]()), torch.randn(4, 16)
    fast = autoprune.repack(model, x)
    rows = {row.name: row for row in fast.report}
    assert rows.keys() == {"0", "1", "2"}
    assert rows["1"].kind == "torchscript"
    assert "module that it was made of" in rows["1"].why
    other, path = torch.randn(3, 16), tmp_path / "fast.safetensors"
    torch.testing.assert_close(fast(other), model(other), atol=1e-4, rtol=1e-4)
    if name == "frozen":
        with pytest.raises(AutopruneError, match="weights of '1' are frozen into TorchScript"):
            autoprune.save(fast, path)
    else:
        autoprune.save(fast, path)
        loaded = autoprune.load(path, around(PARTS[name]()))
        torch.testing.assert_close(loaded(other), model(other), atol=1e-4, rtol=1e-4)
    inventory = take_inventory(model, x)
    assert inventory.names == ["0", "2"]
    assert [row.name for row in inventory.dense] == ["1"]
    with pytest.raises(CaptureError, match=r"holds '1' \(torchscript\)"):
        autoprune.repack(model, x, form="program")


@pytest.mark.parametrize("name", PARTS)
def test_torchscript_as_a_whole_is_refused(name: str) -> None:
    model, x = PARTS[name](), torch.randn(2, 64)
    for verb in (
        lambda: autoprune.repack(model, x),
        lambda: take_inventory(model, x),
        lambda: autoprune.compress(model, [], lambda _: 1.0, x),
    ):
        with pytest.raises(AutopruneError, match="TorchScript, whose layers cannot be seen"):
            verb()


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = around(nn.ReLU())
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse(), requires_grad=False)  # type: ignore[union-attr]
    with pytest.raises(AutopruneError, match=r"cannot be copied.*dense tensors"):
        autoprune.repack(model, torch.randn(2, 16))
