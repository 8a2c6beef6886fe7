"""Compress your own trained model in one call: search, prune, fine-tune, repack, measure."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autoprune

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
train = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=64, shuffle=True, drop_last=True)

model = nn.Sequential(
    *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
for _ in range(3):
    for x, y in train:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def evaluate(model: nn.Module) -> float:
    """Accuracy, in [0, 1]: higher is better."""
    return float((model(images[1400:]).argmax(dim=1) == labels[1400:]).float().mean())


quick = {"search": {"episodes": 4}, "finetune": {"settings": {"epochs": 3}}, "latency": {"engines": ["eager"]}}
done = autoprune.compress(model.eval(), train, evaluate, images[:1], autoprune.Target(sparsity=0.75), config=quick)
print(done.report)
print("one image:", done.model(images[:1]).argmax(dim=1))  # done.model is called like the original
