#!/usr/bin/env bash
# OpenVINO returns one row and column more than ONNX Runtime and torch for a ceil-mode MaxPool with padding: -3.4e38.
#
# Versions:   openvino 2026.4.1, onnxruntime 1.32.0, onnx 1.23.2, Python 3.11, Linux x86-64.
# Behaviour:  MaxPool (opset 22) of kernel 2, stride 2, padding 1 and ceil_mode=1 over 9x9. A last window would begin in
#             the padding alone. Such windows "are ignored", says the operator's specification since opset 22; onnx's
#             reference, ONNX Runtime and torch do so at every opset. OpenVINO keeps it, and it holds the lowest float.
# Output seen:
#   reference   (1, 1, 5, 5) least value 0.0
#   onnxruntime (1, 1, 5, 5) least value 0.0
#   openvino    (1, 1, 6, 6) least value -3.4028235e+38
# Why it matters: SqueezeNet, GoogLeNet, many detectors and ResNets of older frameworks use such pools. What follows fails
#             by its shape at best; behind a global pool or a resize the numbers are silently wrong. Compare an exported
#             file with the model in every engine that will run it, not in one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --no-deps openvino==2026.4.1 # without its telemetry
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

x = np.arange(81, dtype=np.float32).reshape(1, 1, 9, 9)
pool = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1)
graph = helper.make_graph(
    [pool],
    "pool",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, None, None])],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
onnx.checker.check_model(model)
onnx.save(model, "m.onnx")
reference = ReferenceEvaluator(model).run(None, {"x": x})[0]
right = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
core = openvino.Core()
other = core.compile_model(core.read_model("m.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
print("reference  ", reference.shape, "least value", reference.min())
print("onnxruntime", right.shape, "least value", right.min())
print("openvino   ", other.shape, "least value", other.min())
assert right.shape == (1, 1, 5, 5) and right.min() == 0 and np.array_equal(right, reference)
assert other.shape == (1, 1, 6, 6) and other.min() < -3e38, "the behaviour has changed"
assert np.array_equal(other[..., :5, :5], right)
PYTHON
