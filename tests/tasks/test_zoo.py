"""Laws of every model of the zoo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from autoprune.errors import ConfigError
from autoprune.inventory import take_inventory
from autoprune.tasks.zoo import MODELS, build_model, residual_cnn


def build(name: str, seed: int = 0, **args: Any) -> nn.Module:
    return build_model(name, args, in_channels=3, size=16, classes=7, seed=seed)


@pytest.mark.parametrize("name", list(MODELS))
def test_gives_logits_trains_and_can_be_pruned(name: str) -> None:
    model, x = build(name), torch.randn(2, 3, 16, 16)
    logits = model(x)
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    inventory = take_inventory(model, x)
    unprunable = {row.name: row.reason for row in inventory.dense if "weights" not in row.reason}
    assert len(inventory.layers) >= 2
    # attention reads its projection behind the module's back
    assert all(layer.endswith("self_attn.out_proj") for layer in unprunable)


@pytest.mark.parametrize("name", list(MODELS))
def test_weights_come_from_the_seed_alone(name: str) -> None:
    before = torch.get_rng_state()
    a, b, c = build(name), build(name), build(name, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(a.parameters(), b.parameters(), c.parameters(), strict=True))
    assert all(torch.equal(x, y) for x, y, _ in pairs)
    assert any(not torch.equal(x, z) for x, _, z in pairs)


def test_residual_cnn_has_a_norm_and_a_relu_a_convolution() -> None:
    model = residual_cnn(1, 10, widths=(8, 12), blocks=2)
    kinds = [type(module) for module in model.modules()]
    shortcuts = 1
    assert kinds.count(nn.Conv2d) == kinds.count(nn.BatchNorm2d) == 1 + 2 * 4 + shortcuts
    assert kinds.count(nn.ReLU) == 1 + 2 * 4
    assert not any(module.inplace for module in model.modules() if isinstance(module, nn.ReLU))
    assert model[:-3](torch.zeros(1, 1, 32, 32)).shape == (1, 12, 16, 16)


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("residual_cn", {}, "unknown model 'residual_cn'. Did you mean 'residual_cnn'?"),
        ("mlp", {"blocks": 2}, "model 'mlp' has no argument 'blocks'. Allowed: classes, in_channels, size, widths."),
        ("residual_cnn", {"widths": [8, 0]}, "each of widths must be a positive integer, not 0"),
        ("residual_cnn", {"widths": []}, "widths must be a list of positive integers such as [16, 32, 64], not []"),
        ("plain_cnn", {"widths": "16"}, "widths must be a list of positive integers"),
        ("residual_cnn", {"blocks": True}, "blocks must be a positive integer, not True"),
        ("tiny_transformer", {"heads": 5}, "heads must divide width"),
        ("tiny_transformer", {"patch": 5}, "patch must divide the image's side"),
    ],
)
def test_refuses(name: str, args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(name, **args)
    assert said in str(caught.value)
