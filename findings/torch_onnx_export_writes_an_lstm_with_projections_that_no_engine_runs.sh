#!/usr/bin/env bash
# torch.onnx.export writes an LSTM with proj_size as one LSTM node, drops the projection, and says nothing.
#
# Versions:   torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0, Python 3.11, Linux x86-64.
# Behaviour:  ONNX has no projections. The file holds one LSTM in which the projection's width is taken for the hidden
#             size: of the 64 rows of the gates 16 are left, and the weight of the projection is missing. export()
#             returns, onnx.checker accepts the file, ONNX Runtime loads it, and the first run fails.
# Output seen:
#   exported and checked: 1 LSTM, weights [[1, 1, 4], [1, 1, 16], [1, 16, 8], [1, 16, 4]]
#   the projection's weight (4, 16) is in the file: False
#   ONNX Runtime: [ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running LSTM node. Name:'node_lstm__2'
#   Status Message: Input initial_c must have shape {1,1,4}. Actual:{1,1,16}
# Why it matters: an export that "succeeded" fails in production. The same model is an ordinary LSTM over the state before
#             the projection, with the recurrent weight W_hh W_hr, and so can be exported.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging

import onnx
import onnxruntime
import torch

logging.disable(logging.CRITICAL)
torch.manual_seed(0)


class Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(8, 16, batch_first=True, proj_size=4)

    def forward(self, x):
        return self.lstm(x)[0]


x = torch.randn(1, 5, 8)
torch.onnx.export(Tagger().eval(), (x,), "m.onnx", dynamo=True, verbose=False)
onnx.checker.check_model("m.onnx")
graph = onnx.load("m.onnx").graph
weights = [list(each.dims) for each in graph.initializer if len(each.dims) == 3]
kept = any(sorted(each.dims) == [4, 16] for each in graph.initializer)
print("exported and checked:", [node.op_type for node in graph.node].count("LSTM"), "LSTM, weights", weights)
print("the projection's weight (4, 16) is in the file:", kept)
session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
try:
    session.run(None, {session.get_inputs()[0].name: x.numpy()})
except Exception as error:
    told = str(error)
    print("ONNX Runtime:", told[:300])
else:
    raise SystemExit("it runs: the behaviour has changed")
assert "initial_c must have shape" in told
assert not kept, "the projection is written: the behaviour has changed"
PYTHON
