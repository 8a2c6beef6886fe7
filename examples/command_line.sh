#!/usr/bin/env bash
# Compress your own model from the command line: a module with two functions is all it takes.
set -euo pipefail

cat >my_project.py <<'PYTHON'
import torch
from sklearn.datasets import load_digits

def build():  # your trained model; here one that fine-tuning has to train
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))

def loaders():  # (train, validation), iterables of (inputs, class indices)
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    batches = list(zip((x.float() / 16).split(64), y.split(64)))
    return batches[:20], batches[20:-1]
PYTHON

# Usual is a target such as --speedup 3, and no --set: those here make the example short.
autoprune apply --model my_project:build --data my_project:loaders --accuracy-drop 0.5 --run-dir compressed \
    --set 'latency.engines=["eager"]' --set latency.samples=10 --set finetune.settings.epochs=3
ls compressed # report.html, repacked.safetensors, masked.safetensors, ...
