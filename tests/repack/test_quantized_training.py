"""Fake quantisation: a model computes in training what its int8 program will."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autoprune
from autoprune.errors import AutopruneError
from autoprune.quantization import Grid, grids_of
from autoprune.quantization.fake import fake_quantized, fake_quantized_weight
from autoprune.repack import LayerReport
from autoprune.repack.outputs import noise_of
from autoprune.tasks.zoo.small import lenet5, residual_cnn, tiny_transformer


class Inline(nn.Module):
    """Sums in one forward, which no module returns; a pooled map that a layer and a sum read; a shared activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.b, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.act(self.norm(self.stem(x))), 2)
        x = self.act(self.a(x)) + x
        x = self.act(self.b(x) + x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Inverted(nn.Module):
    """MobileNet's block: depthwise, a linear bottleneck, its sum returned by a module."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.deep = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm, self.down = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu6(self.norm(self.deep(F.hardswish(self.up(x))))))


class Rows(nn.Module):
    """Residual rows that stay float, a norm that goes into the columns of the Linear behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(12, 24), nn.Linear(24, 12), nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(self.norm(F.relu(x)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (lambda: residual_cnn(1, 10, (8, 16)), (2, 1, 16, 16)),
    "pooled": (lambda: lenet5(1, 10, (8, 12, 20)), (2, 1, 28, 28)),
    "inline": (Inline, (2, 3, 12, 12)),
    "inverted": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Inverted(), Inverted()), (2, 3, 12, 12)),
    "rows": (Rows, (4, 12)),
    "transformer": (lambda: tiny_transformer(1, 10, 16, 1, 2, 4, 16), (2, 1, 16, 16)),
}


def data(shape: tuple[int, ...], count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def trained_(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """Some steps of anybody's training, towards anything."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model.train()
    for x in batches:
        loss = model(x).square().mean() + model(x).sum() / 100
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def ready(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    return trained_(make(), data(shape, 5, 1)), data(shape, 1)[0]


@pytest.mark.parametrize("name", MODELS)
def test_int8_computes_what_was_trained(name: str) -> None:
    model, x = ready(name)
    autoprune.quantize_(model, x, data(tuple(x.shape), 3, 2))
    trained_(model, data(tuple(x.shape), 5, 3))
    fast = autoprune.repack(model, x, precision="int8")
    plain = autoprune.dequantize_(copy.deepcopy(model))
    assert any(row.precision == "int8" for row in fast.report)
    for given in data(tuple(x.shape), 4, 4):
        with torch.inference_mode():
            wanted, whole, got = model(given), plain(given), fast(given)
        print(name, noise_of((got,), (wanted,)) / noise_of((whole,), (wanted,)))
        assert noise_of((got,), (wanted,)) < 1e-3 * noise_of((whole,), (wanted,))
