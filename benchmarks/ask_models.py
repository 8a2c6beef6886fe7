"""Five models that nobody tuned a policy for, and their data: each a function for ``autoprune apply``."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

Loaders = tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)


def _loaders(x: Tensor, y: Tensor) -> Loaders:
    """Four fifths to train on, the rest to validate."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y, count = x[order], y[order], len(x) * 4 // 5
    train = DataLoader(
        TensorDataset(x[:count], y[:count]), 64, shuffle=True, generator=torch.Generator().manual_seed(1)
    )
    return train, DataLoader(TensorDataset(x[count:], y[count:]), 128)


def images() -> Loaders:
    """Digits as 16x16 pictures."""
    x, y = _digits()
    return _loaders(functional.interpolate(x[:, None], size=16), y)


def rows() -> Loaders:
    """Digits as eight steps of eight numbers."""
    return _loaders(*_digits())


def signal() -> Loaders:
    """Digits as one signal of 64 steps."""
    x, y = _digits()
    return _loaders(x.flatten(1)[:, None], y)


def table() -> Loaders:
    """Breast cancer: 30 numbers a row, two classes."""
    data = load_breast_cancer()
    x = torch.tensor(data.data, dtype=torch.float32)
    return _loaders((x - x.mean(0)) / x.std(0), torch.tensor(data.target))


def _trained(make: Callable[[], nn.Module], loaders: Loaders, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model.train()
    for _ in range(epochs):
        for x, y in loaders[0]:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def _vgg() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32), *block(32, 32), nn.MaxPool2d(2), *block(32, 64), *block(64, 64), nn.MaxPool2d(2),
        *block(64, 128), *block(128, 128), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(30, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(),
        nn.Linear(256, 2),
    )  # fmt: skip


def _conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 64, 5, padding=2), nn.ReLU(), nn.Conv1d(64, 64, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(64, 128, 5, padding=2), nn.ReLU(), nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 128, 2, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.lstm(x)[0]
        return self.head(states[:, -1])  # type: ignore[no-any-return]


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 128)
        self.place = nn.Parameter(torch.zeros(1, 8, 128))
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x) + self.place).mean(1))  # type: ignore[no-any-return]


def vgg() -> nn.Module:
    """Six convolutions with batch norms, like VGG, on 16x16."""
    return _trained(_vgg, images(), 4)


def mlp() -> nn.Module:
    """Four Linears on tabular data."""
    return _trained(_mlp, table(), 10)


def conv1d() -> nn.Module:
    """Three one-dimensional convolutions."""
    return _trained(_conv1d, signal(), 8)


def lstm() -> nn.Module:
    """Two layers of 128 units."""
    return _trained(_Recurrent, rows(), 10)


def encoder() -> nn.Module:
    """A small ``nn.TransformerEncoder``: two layers of width 128."""
    return _trained(_Encoder, rows(), 10)


DATA = {"vgg": "images", "mlp": "table", "conv1d": "signal", "lstm": "rows", "encoder": "rows"}
"""Model -> its data, both functions of this module."""
