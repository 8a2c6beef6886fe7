#!/usr/bin/env bash
# Attention whose row is masked whole is zeros in torch, and the mean of all values, masked ones too, once exported.
#
# Versions:   torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0, openvino 2026.4.1, Python 3.11, Linux x86-64.
# Behaviour:  scaled_dot_product_attention with a boolean mask, one row of it all False. torch returns zeros for that row.
#             The exporter writes the mask as a large negative number that is added before the softmax, so all keys of the
#             row are equally likely again. ONNX Runtime and OpenVINO agree with each other, not with torch.
# Output seen:
#   torch       [0. 0. 0. 0.]
#   onnxruntime equals the mean of the values, openvino too
# Why it matters: such rows occur in padded batches (a sequence of length 0), block-sparse and windowed masks. An example
#             without one passes every comparison; two engines that agree look like a proof.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --no-deps openvino==2026.4.1 # without its telemetry
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging

import numpy as np
import onnxruntime
import openvino
import torch
from torch.nn.functional import scaled_dot_product_attention

logging.disable(logging.CRITICAL)
torch.manual_seed(0)


class Attention(torch.nn.Module):
    def forward(self, x, mask):
        return scaled_dot_product_attention(x, x, x, mask)


x, mask = torch.randn(1, 1, 3, 4), torch.ones(1, 1, 3, 3, dtype=torch.bool)
mask[..., 1, :] = False
wanted = Attention()(x, mask).numpy()
mean = x.mean(2).numpy()[0, 0]
torch.onnx.export(Attention(), (x, mask), "m.onnx", dynamo=True, verbose=False)
given = [x.numpy(), mask.numpy()]
session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
names = [each.name for each in session.get_inputs()]
core = openvino.Core()
compiled = core.compile_model(core.read_model("m.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
found = {"onnxruntime": session.run(None, dict(zip(names, given)))[0], "openvino": compiled(given)[0]}
print("torch      ", wanted[0, 0, 1], "  mean of the values", mean)
assert not wanted[0, 0, 1].any()
for name, got in found.items():
    print(f"{name:<11}", got[0, 0, 1])
    assert np.allclose(got[0, 0, 1], mean, atol=1e-5), "the behaviour has changed"
    assert np.allclose(got[0, 0, [0, 2]], wanted[0, 0, [0, 2]], atol=1e-5)
PYTHON
