#!/usr/bin/env bash
# torch.onnx.export takes a number of at most 1e-8 for zero: "x + 1e-10" is written as "x".
#
# Versions:   torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0, Python 3.11, Linux x86-64.
# Behaviour:  the exporter's optimizer (on by default) has a rule that removes an addition of 0. Its constant matches with
#             an absolute tolerance of 1e-8. The epsilon that keeps a logarithm or a quotient finite is gone from the file,
#             without a warning. With optimize=False it stays.
# Output seen:
#   operators, optimize=True: ['Relu', 'Log']; log(relu(-1) + 1e-10) = -inf, torch: -23.02585
#   operators, optimize=False: ['Relu', 'Constant', 'Add', 'Log']; log(relu(-1) + 1e-10) = -23.02585, torch: -23.02585
# Why it matters: a check on random inputs passes, since only values near zero differ. Pruned networks have many exact
#             zeros, and so meet it more often than dense ones: -inf or NaN in production, finite in every test.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging
import math

import onnx
import onnxruntime
import torch

logging.disable(logging.CRITICAL)


class Entropy(torch.nn.Module):
    def forward(self, x):
        return torch.log(torch.relu(x) + 1e-10)


x = torch.tensor([[-1.0, 2.0]])
wanted = Entropy()(x)
found = {}
for optimize in (True, False):
    torch.onnx.export(Entropy(), (x,), "m.onnx", dynamo=True, verbose=False, optimize=optimize)
    operators = [node.op_type for node in onnx.load("m.onnx").graph.node]
    session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    print(f"operators, optimize={optimize}: {operators}; log(relu(-1) + 1e-10) = {got[0, 0]:.5f}, torch: {wanted[0, 0]:.5f}")
    found[optimize] = ("Add" in operators, float(got[0, 0]))
assert found[True] == (False, -math.inf), "the epsilon is kept: the behaviour has changed"
assert found[False][0] and abs(found[False][1] + 23.02585) < 1e-3
PYTHON
