"""Laws of shrinking: whatever the model and its dead channels, less computes the same, and is an ordinary model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import autoprune
from autoprune.model.inventory import eval_mode
from autoprune.model.weights import weighted_layers
from autoprune.tasks.zoo import build_model

MODELS: dict[str, tuple[dict[str, Any], bool]] = {
    "mlp": ({}, True),
    "plain_cnn": ({}, True),
    "residual_cnn": ({"widths": [8, 16]}, True),
    "lenet5": ({}, True),
    "depthwise_cnn": ({}, True),
    "inverted_cnn": ({}, True),
    "inception": ({}, False),  # what is concatenated stays
    "tiny_transformer": ({}, True),
}


def random_model(name: str, seed: int) -> nn.Module:
    """With batch norms that have seen something."""
    args, _ = MODELS[name]
    model = build_model(name, args, in_channels=1, size=16, classes=3, seed=seed).train()
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                for tensor in (module.weight, module.bias, module.running_mean):
                    nn.init.normal_(tensor)  # type: ignore[arg-type]
    return model


def random_masks(model: nn.Module) -> dict[str, Tensor]:
    """Of every layer some filters are cut, of some also input channels; its batch norms are left as they are."""
    masks = {}
    for name, layer in weighted_layers(model).items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        masks[name] = torch.ones_like(weight, dtype=torch.bool)
        masks[name][torch.rand(len(weight)) < 0.3] = False
        masks[name][:, torch.rand(weight.shape[1]) < 0.2] = False
    return masks


def silenced(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A copy with the masks applied, in which half the batch norms have channels that are silent, too."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(f"{name}.weight" if f"{name}.weight" in model.state_dict() else name).mul_(mask)
        for number, module in enumerate(model.modules()):
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and number % 2:
                silent = torch.rand(module.num_features) < 0.3
                module.weight[silent], module.bias[silent] = 0.0, 0.0
    return model


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_the_laws_of_shrinking(name: str, seed: int, tmp_path: Path) -> None:
    model, x = random_model(name, seed), torch.randn(3, 1, 16, 16)
    masked = silenced(model, random_masks(model))
    before = copy.deepcopy(masked.state_dict())
    small, report = autoprune.shrink(masked, x)

    assert shapes(small) != shapes(model) or not MODELS[name][1], "nothing was cut"
    assert all(torch.equal(value, masked.state_dict()[key]) for key, value in before.items()), (
        "the original was changed"
    )
    assert [type(each) for each in small.modules()] == [type(each) for each in masked.modules()]
    assert small.training
    for row in report:
        assert (row.before == row.after) == bool(row.why), row

    with eval_mode(masked), eval_mode(small), torch.no_grad():
        for given in (x, torch.randn(2, 1, 16, 16)):
            torch.testing.assert_close(small(given), masked(given), rtol=1e-4, atol=1e-4)

    assert shapes(autoprune.shrink(small, x).model) == shapes(small), "what is left is cut again"

    save_file(small.state_dict(), tmp_path / "small.safetensors")
    loaded = autoprune.load_shrunk(random_model(name, seed + 1), tmp_path / "small.safetensors")
    assert shapes(loaded) == shapes(small)
    with eval_mode(loaded), eval_mode(small), torch.no_grad():
        assert torch.equal(loaded(x), small(x))

    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    optimizer.step()
    assert loaded(x).isfinite().all()


def test_masks_are_applied_first() -> None:
    model, x = random_model("plain_cnn", 0), torch.randn(2, 1, 16, 16)
    masks = random_masks(model)
    by_masks = autoprune.shrink(model, x, masks).model
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            masked.get_parameter(f"{name}.weight").mul_(mask)
    by_zeros = autoprune.shrink(masked, x).model
    assert shapes(by_masks) == shapes(by_zeros) != shapes(model)
    with eval_mode(by_masks), eval_mode(by_zeros), torch.no_grad():
        assert torch.equal(by_masks(x), by_zeros(x))
