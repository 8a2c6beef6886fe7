"""Laws of widening: the output stays, inner widths grow, residual streams do not."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.model.net2wider import expand
from autoprune.model.weights import weight_of
from autoprune.tasks.zoo import build_model
from autoprune.tasks.zoo.initialise import randomise_norms_


def plain() -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms_(
        nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 5, 1),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 7), nn.Tanh(), nn.Linear(7, 4),
        ),
        1,
    )  # fmt: skip


X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@settings(max_examples=20)
@given(factor=st.floats(1.1, 4.0), seed=st.integers(0, 5))
def test_the_output_stays_in_both_modes_and_the_model_too(factor: float, seed: int) -> None:
    model = plain()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wide = expand(model, X, factor, seed=seed)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert dict(wide.layers) == {"0": (6, round(6 * factor)), "4": (5, round(5 * factor)), "7": (7, round(7 * factor))}
    assert wide.model.get_submodule("3").groups == round(6 * factor)
    for mode in (False, True):
        torch.testing.assert_close(wide.model.train(mode)(X), model.train(mode)(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("residual_cnn", {"widths": [8, 16]}),
        ("plain_cnn", {}),
        ("mlp", {}),
        ("mobilenet_v2", {}),
        ("vit_small", {"width": 32, "blocks": 2, "heads": 2, "patch": 8}),
        ("resnet20", {}),
    ],
)
def test_models_of_the_zoo(name: str, args: dict[str, object]) -> None:
    model = randomise_norms_(build_model(name, args, in_channels=1, size=32, classes=10, seed=0), 0).eval()
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    wide = expand(model, x, 1.5)
    assert wide.layers
    torch.testing.assert_close(wide.model.eval()(x), model(x), rtol=1e-3, atol=1e-4)
    assert all(len(weight_of(wide.model, n)) == new > old for n, (old, new) in wide.layers.items())


def test_copies_get_gradients_of_their_own() -> None:
    wide = expand(plain(), X, 2.0).model
    wide(X).square().sum().backward()
    gradient = weight_of(wide, "7").grad
    assert gradient is not None
    apart = torch.cdist(gradient, gradient).fill_diagonal_(torch.inf).min(dim=1).values
    assert (apart > 1e-3 * gradient.norm(dim=1)).all()
    assert torch.unique(weight_of(wide, "7"), dim=0).shape[0] == 7  # though they start as copies


def test_a_channel_that_was_copied_looks_no_weaker() -> None:
    model = plain()
    wide = expand(model, X, 1.5).model
    for name in ("4", "7", "9"):  # layers that read channels, some of which were copied
        before, after = weight_of(model, name).detach(), weight_of(wide, name).detach()
        columns = before.shape[1]
        assert (after[: len(before), :columns].abs() >= 0.8 * before.abs()).all()
        assert after.shape[1] > columns


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return cast("Tensor", y + self.c(torch.relu(self.b(y))))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.a(torch.relu(self.a(x))))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else x


def test_residual_streams_stay() -> None:
    wide = expand(Residual(), torch.randn(2, 4), 2.0)
    assert dict(wide.layers) == {"b": (4, 8)}


def test_only_the_layers_named_change() -> None:
    wide = expand(plain(), X, 2.0, only=["7", "9", "4"])
    assert set(wide.layers) == {"4", "7"}
    assert set(expand(plain(), X, 2.0, only=["7", "9"]).layers) == {"7"}
    assert expand(plain(), X, 1.0).layers == {}


@pytest.mark.parametrize(
    ("model", "factor", "said"),
    [
        (Shared(), 2.0, "nothing in this model can be widened"),
        (Branching(), 2.0, "torch.fx cannot trace it"),
        (Residual(), 0.5, r"factor must be a number in \[1, 16\], not 0.5"),
        (Residual(), True, r"factor must be a number in \[1, 16\], not True"),
    ],
)
def test_what_cannot_be_widened_is_said(model: nn.Module, factor: float, said: str) -> None:
    with pytest.raises(AutopruneError, match=said):
        expand(model, torch.randn(2, 4), factor)
