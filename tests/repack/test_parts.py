"""Models with parts that autoprune cannot see into: they are repacked around them, or refused in words of our own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune import PruningHooks
from autoprune.bench import bench_model
from autoprune.errors import AutopruneError
from autoprune.model.inventory import take_inventory
from autoprune.model.weights import weight_of
from autoprune.repack import CaptureError, ProgramModel, SwappedModel, export_onnx, repack
from autoprune.repack.outputs import same_output

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
    sparse = nn.Parameter(weight_of(model, "0").detach().to_sparse(), requires_grad=False)
    model[0].register_parameter("weight", sparse)
    with pytest.raises(AutopruneError, match=r"cannot be copied.*dense tensors"):
        autoprune.repack(model, torch.randn(2, 16))


# Models that are not ready, inputs that are not dense ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(8)), "0.weight has no shape yet: call the model once"),
        (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), "0.weight has no shape yet: call the model once"),
        (lambda: nn.Sequential(nn.Linear(6, 8, device="meta")), "0.weight is on the meta device and has no values"),
    ],
)
def test_a_model_without_weights_is_refused(model: Any, told: str, tmp_path: Path) -> None:
    x = torch.randn(2, 6)
    calls: list[Callable[[nn.Module], Any]] = [
        lambda given: repack(given, x),
        lambda given: repack(given, x, form="modules"),
        lambda given: export_onnx(given, x, tmp_path / "model.onnx"),
        lambda given: bench_model(given, (x,)),
        lambda given: PruningHooks(given, x, sparsity=0.5),
    ]
    for call in calls:
        with pytest.raises(AutopruneError, match=told):
            call(model().eval())


def test_what_torch_compiles_is_looked_through(tmp_path: Path) -> None:
    compiled: Any = torch.compile(nn.Sequential(nn.Linear(6, 8), nn.ReLU()))
    x = torch.randn(2, 6)
    for model in (compiled, nn.Sequential(compiled, nn.Linear(8, 4))):
        fast = repack(model.eval(), x)
        assert isinstance(fast, ProgramModel)
        assert not any("_orig_mod" in row.name for row in fast.report)


class ReadsParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.a(x) * self.a.parametrizations.weight.original0.sum())


def test_a_forward_that_reads_parts_of_a_weight_is_told() -> None:
    for form in (None, "modules"):
        with pytest.raises(AutopruneError, match=r"there is the weight alone: read that, e\.g\. self\.layer\.weight"):
            repack(ReadsParts().eval(), torch.randn(2, 6), form=form)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(6, 8)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = self.l(x if y is None else x @ y)
        return x.to_padded_tensor(0.0) if x.is_nested else x


def nested(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.randn(3, 6), torch.randn(5, 6)], layout=layout)


def csr() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(6).to_sparse_csr()


@pytest.mark.parametrize("make", [lambda: (nested(torch.strided),), lambda: (csr(), torch.randn(6, 6))])
def test_inputs_that_are_not_dense_run_layer_by_layer(make: Any, tmp_path: Path) -> None:
    model, given = Padded().eval(), make()
    fast = repack(model, given)
    assert isinstance(fast, SwappedModel)
    with torch.inference_mode():
        assert same_output(fast(*given), model(*given))
    with pytest.raises(AutopruneError, match="give a dense one"):
        export_onnx(model, given, tmp_path / "model.onnx")


def test_a_jagged_input_is_refused() -> None:
    with pytest.raises(AutopruneError, match=r"an input is a nested tensor .* give a dense one"):
        repack(Padded().eval(), nested(torch.jagged))


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (lambda: nn.LSTM(6, 8, proj_size=3), (torch.randn(5, 2, 6),)),
        (lambda: nn.RNN(6, 8), (torch.randn(5, 2, 6),)),
        (lambda: nn.LSTMCell(6, 8), (torch.randn(2, 6),)),
        (lambda: nn.Bilinear(6, 6, 4), (torch.randn(2, 6), torch.randn(2, 6))),
    ],
)
def test_a_layer_of_a_kind_without_packed_form_has_a_row(model: Any, inputs: Any) -> None:
    (row,) = repack(model().eval(), inputs, form="modules").report
    assert (row.backend, row.sparsity) == ("dense", 0.0)
    assert row.why in ("it has projections (proj_size)", "no packed form is of this kind")
