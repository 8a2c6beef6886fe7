#!/usr/bin/env bash
# ONNX Runtime's float32 Sigmoid is exactly 0 from -18 down; float32 itself goes on to 1e-38.
#
# Versions:   onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6, Python 3.11, Linux x86-64.
# Behaviour:  sigmoid(-18) is 1.5e-8. ONNX Runtime returns 0 there and below, and off by a factor of two from -16 on:
#             its approximation has an absolute error of some 5e-8, not a relative one.
# Output seen:
#   x      onnxruntime    right
#   -16    5.9604645e-08  1.1253516e-07
#   -17    8.940697e-08   4.1399375e-08
#   -18    0.0            1.522998e-08
#   -40    0.0            4.248354e-18
#   log(sigmoid(-40)): onnxruntime -inf right -40
# Why it matters: torch's exporter writes logsigmoid as Log(Sigmoid(x)), so a finite loss or score becomes -inf. Products
#             and ratios of small gates are off by any factor. A check by absolute tolerance never sees it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

nodes = [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Log", ["s"], ["y"])]
told = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xsy"]
graph = helper.make_graph(nodes, "gate", told[:1], told[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
onnx.checker.check_model(model)
x = np.array([-16, -17, -18, -40], np.float32)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
sigmoid, log = session.run(None, {"x": x})
right = (1 / (1 + np.exp(-x.astype(np.float64)))).astype(np.float32)
print("x      onnxruntime    right")
for each in zip(x, sigmoid, right):
    print("{:<6.0f} {!s:<14} {:.8g}".format(*each))
print("log(sigmoid(-40)): onnxruntime", log[-1], "right", -40)
assert right[2] > 1e-8 and right[3] > 4e-18
assert sigmoid[2] == sigmoid[3] == 0 and log[3] == -np.inf, "the behaviour has changed"
assert sigmoid[1] > 1.5 * right[1], "the behaviour has changed"
PYTHON
