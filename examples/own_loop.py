"""Prune in your own training loop: three calls, then repack and save."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import autoprune

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

pruning = autoprune.PruningHooks(model, images[:1], "gradual", sparsity=0.9)  # before the optimizer
optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
pruning.start(optimizer, total_steps=500)
for _ in range(500):
    batch = torch.randint(1400, (64,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
    optimizer.step()
    pruning.after_step()
masks = pruning.finish()  # weights are zero where these are False

fast = autoprune.repack(model.eval(), images[:1])
autoprune.save(fast, "fast.safetensors")
kept = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
accuracy = (fast(images[1400:]).argmax(dim=1) == labels[1400:]).float().mean()
print(f"{kept:.1%} of the weights, {accuracy:.1%} accuracy, in fast.safetensors")
