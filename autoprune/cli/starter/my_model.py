"""Your model and your data, as autoprune.toml names them.

Here: a small network for handwritten digits, so that everything runs as it stands. Put your own in the places marked
with TODO; autoprune calls `build` and `loaders` without arguments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

WEIGHTS = Path(__file__).with_name("my_model.safetensors")

Loader = DataLoader[tuple[Tensor, ...]]


def build() -> nn.Module:
    """Returns the trained model."""
    torch.manual_seed(0)
    model = network()  # TODO: your model
    if not WEIGHTS.exists():  # TODO: yours is trained already; load its weights
        train(model)
        save_file(model.state_dict(), WEIGHTS)
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def loaders() -> tuple[Loader, Loader, Loader]:
    """Returns batches of (inputs, classes): to train, to choose the plan by, and to report at the end."""
    digits: Any = load_digits()  # TODO: your data
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16.0  # (samples, 1, 8, 8), in [0, 1]
    classes = torch.tensor(digits.target, dtype=torch.int64)[order]
    splits = [
        TensorDataset(images[part], classes[part]) for part in (slice(1000), slice(1000, 1400), slice(1400, None))
    ]
    return (
        DataLoader(splits[0], batch_size=64, shuffle=True),
        DataLoader(splits[1], batch_size=256),
        DataLoader(splits[2], batch_size=256),
    )


def network() -> nn.Module:
    """The architecture, with weights drawn."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train(model: nn.Module, epochs: int = 10) -> None:
    """Trains the model in place: seconds."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    batches = loaders()[0]
    for _ in range(epochs):
        for images, classes in batches:
            optimizer.zero_grad()
            functional.cross_entropy(model(images), classes).backward()
            optimizer.step()
