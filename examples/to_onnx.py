"""Write a pruned model as ONNX and run it in ONNX Runtime. Needs: pip install "autoprune[engines]"."""

from __future__ import annotations

import onnxruntime
import torch
from torch import nn

import autoprune

torch.manual_seed(0)
first, second = nn.Linear(64, 256), nn.Linear(256, 256)
model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(256, 10)).eval()
x = torch.randn(1, 64)
with torch.no_grad():
    for layer in (first, second):
        layer.weight[::2] = 0.0  # every other neuron is cut: it is not in the file
        layer.bias[::2] = 0.0

report = autoprune.export_onnx(model, x, "model.onnx", engine="onnxruntime")
print(f"{report.dense_bytes:,} bytes dense, {report.file_bytes:,} as ONNX")
for check in report.checked:
    print(check)  # every installed engine that reads ONNX was compared with the model
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
(output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
torch.testing.assert_close(torch.from_numpy(output), model(x), rtol=1e-3, atol=1e-4)
print("ONNX Runtime gives what the model gives")
