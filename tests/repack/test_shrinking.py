"""Shrinking: what is folded, what stays whole and why, and files that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from typer.testing import CliRunner

import autoprune
from autoprune.cli import app
from autoprune.errors import AutopruneError, FileError
from autoprune.repack import ShrunkLayer, shrink

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def mlp(filters: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, filters), nn.ReLU(), nn.Linear(filters, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)
    )


def pruned_mlp() -> nn.Sequential:
    """Two of its eight filters are cut, and give constants: one of them zero behind the ReLU."""
    model = mlp()
    first = cast("nn.Linear", model[0])
    with torch.no_grad():
        first.weight[[2, 5]] = 0.0
        first.bias[2], first.bias[5] = 1.5, -1.0
    return model


def rows(report: tuple[ShrunkLayer, ...]) -> dict[str, ShrunkLayer]:
    return {row.name: row for row in report}


def test_a_constant_goes_into_the_bias_of_what_reads_it(tmp_path: Path) -> None:
    model = pruned_mlp()
    small, report = shrink(model, X)
    assert rows(report)["2"] == ShrunkLayer("2", "Linear", (5, 8), (5, 6), "")
    first, second = (cast("nn.Linear", small.get_submodule(name)) for name in ("0", "2"))
    assert second.bias is not None
    assert second.bias.requires_grad
    assert (first.out_features, second.in_features, second.out_features) == (6, 6, 5)
    torch.testing.assert_close(small(X), model(X))
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    assert torch.equal(autoprune.load_shrunk(mlp(), tmp_path / "small.safetensors")(X), small(X))


def test_a_constant_beside_a_border_of_zeros_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.Flatten(), nn.Linear(36, 2))
    first = cast("nn.Conv2d", model[0])
    with torch.no_grad():
        first.weight[:3] = 0.0
        first.bias[:3] = 1.0  # type: ignore[index]
    _, report = shrink(model, torch.randn(1, 3, 5, 5))
    assert rows(report)["0"].why == "3 of its channels hold a constant, which a border of zeros beside them shows"


class Counted(nn.Module):
    """Holds the number of its channels in its own code, in one of two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(self.second(self.first(x).relu()).view(-1, 8).relu())
        return y


def test_what_the_models_code_needs_stays_and_the_rest_is_cut() -> None:
    torch.manual_seed(0)
    model = Counted()
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.weight[1], layer.bias[1] = 0.0, 0.0
    small, report = shrink(model, X)
    assert rows(report)["first"].after == (7, 6)
    assert rows(report)["second"].after == (8, 7), "its filters stay, its columns do not"
    assert rows(report)["third"].why.startswith("its channels stay: the model returns them")
    torch.testing.assert_close(small(X), model(X))


def hooked(model: nn.Sequential) -> None:
    model[0].register_forward_hook(lambda module, args, output: output)


def masked(model: nn.Sequential) -> None:
    prune.ln_structured(model[0], "weight", 0.25, n=1, dim=0)


def parametrized(model: nn.Sequential) -> None:
    parametrize.register_parametrization(model[0], "weight", nn.Identity())


def shared(model: nn.Sequential) -> None:
    model.append(nn.Module())
    model[-1].forward = nn.Identity().forward
    model[-1].again = cast("nn.Linear", model[0]).weight


def subclassed(model: nn.Sequential) -> None:
    model[0].__class__ = type("Own", (nn.Linear,), {})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (hooked, "it has hooks"),
        (masked, "its weight is computed of others at each call"),
        (parametrized, "its weight is computed of others at each call"),
        (shared, "one parameter is 0.weight and 5.again"),
        (subclassed, "it is a Own, which is not cut"),
    ],
)
def test_what_is_more_than_a_plain_module_stays(change: object, why: str) -> None:
    model = pruned_mlp()
    assert callable(change)
    change(model)
    with torch.no_grad():
        cast("nn.Linear", model[2]).weight[3] = 0.0
    small, report = shrink(model, X)
    assert rows(report)["0"].why.startswith(why)
    assert rows(report)["2"].after == (4, 8), "what lies behind it is cut"
    torch.testing.assert_close(small(X), model(X))


def test_a_module_called_twice_stays() -> None:
    torch.manual_seed(0)
    again = nn.Linear(6, 6)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), again, nn.ReLU(), again)
    with torch.no_grad():
        again.weight[1] = 0.0
        again.bias[1] = 0.0
    small, report = shrink(model, X)
    assert rows(report)["2"].why
    torch.testing.assert_close(small(X), model(X))


def test_layers_that_share_their_channels_lose_them_together() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.c((self.a(x) + self.norm(self.b(x))).relu())
            return y

    torch.manual_seed(0)
    model = Residual().eval()
    with torch.no_grad():
        model.a.weight[[1, 2]], model.a.bias[[1, 2]] = 0.0, 0.0
        model.b.weight[[2, 3]], model.b.bias[[2, 3]] = 0.0, 0.0
    small, report = shrink(model, X)
    assert {name: row.after[0] for name, row in rows(report).items()} == {"a": 7, "b": 7, "norm": 7, "c": 3}
    assert isinstance(small.norm, nn.BatchNorm1d)
    assert small.norm.num_features == 7
    torch.testing.assert_close(small(X), model(X))


def test_a_model_that_cannot_be_captured_is_refused() -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y if y.sum() > 0 else -y

    with pytest.raises(AutopruneError, match="cannot be shrunk, since its graph cannot be captured"):
        shrink(Decides(), X)


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"0.weight": torch.zeros(9, 6)},
            r"0.weight has the shape \(9, 6\), the model's \(8, 6\); along the first two",
        ),
        ({"0.weight": torch.zeros(0, 6)}, "along the first two axes there may be fewer"),
        ({"0.weight": torch.zeros(6, 6, 1)}, "along the first two axes there may be fewer"),
        ({"0.weight": torch.zeros(6, 6, dtype=torch.float64)}, "is of torch.float64, the model's of torch.float32"),
        ({"0.bias": torch.zeros(5)}, "the tensors of 0 differ in length"),
        ({"0.bias": None}, "it has no 0.bias"),
        ({"7.weight": torch.zeros(2)}, "it has a 7.weight, and the model has none"),
        ({"0.more": torch.zeros(6)}, "it has a 0.more, and the model has none"),
    ],
)
def test_files_that_do_not_fit_are_refused(changed: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    state = {**shrink(pruned_mlp(), X).model.state_dict(), **changed}
    save_file({name: x for name, x in state.items() if x is not None}, tmp_path / "small.safetensors")
    model = mlp()
    with pytest.raises(FileError, match=message):
        autoprune.load_shrunk(model, tmp_path / "small.safetensors")
    assert cast("nn.Linear", model[0]).weight.shape == (8, 6)


def test_a_shape_of_what_is_not_cut_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3), "bias": torch.zeros(3)}, tmp_path / "small.safetensors")
    with pytest.raises(FileError, match="which stays: it is a LayerNorm, which is not cut"):
        autoprune.load_shrunk(nn.LayerNorm(4), tmp_path / "small.safetensors")


def test_what_is_no_file_of_tensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small.safetensors").write_bytes(b"\x80\x04 no tensors")
    with pytest.raises(FileError, match="is no safetensors file"):
        autoprune.load_shrunk(mlp(), tmp_path / "small.safetensors")


def test_the_command_shrinks_what_a_function_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shrink_me.py").write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n"
        "    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))\n"
        "    nn.init.zeros_(model[0].weight[:3])\n    return model\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = ["shrink", "shrink_me:build", "--input", "1,6"]
    refused = CliRunner().invoke(app, given)
    assert "say where the smaller model goes" in str(refused.exception)
    done = CliRunner().invoke(app, [*given, "--save", "small.safetensors"])
    assert done.exception is None, done.output
    assert "| 0" in done.output
    assert "5 x 6" in done.output
    whole = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    assert autoprune.load_shrunk(whole, tmp_path / "small.safetensors")[0].out_features == 5  # type: ignore[index]
