#!/usr/bin/env bash
# ExportedProgram.run_decompositions gives other numbers where a model writes into what a disabled dropout returned.
#
# Versions:   torch 2.13.0, Python 3.11, Linux x86-64.
# Behaviour:  without training, F.dropout(y, 0.5, False) returns y itself, so "z = F.dropout(y, 0.5, False); z.add_(1)"
#             changes y, too. The exported program does the same. run_decompositions takes the dropout for a new tensor:
#             its y keeps the value from before the addition. There is no error and no warning.
# Output seen:
#   eager:          y = 1.0, z = 1.0
#   exported:       y = 1.0, z = 1.0
#   decompositions: y = 0.0, z = 1.0
# Why it matters: what reads a model through its functional form (exporters, compilers for devices, pruning tools) gets
#             another model, of code as usual as a residual branch with an in-place sum behind a dropout.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.nn import functional


class Branch(torch.nn.Module):
    def forward(self, x):
        y = x * 2
        z = functional.dropout(y, 0.5, False)
        z.add_(1)
        return y, z


x = torch.zeros(1)
exported = torch.export.export(Branch().eval(), (x,))
forms = {"eager": Branch().eval(), "exported": exported.module(), "decompositions": exported.run_decompositions().module()}
found = {name: [float(value) for value in form(x)] for name, form in forms.items()}
for name, (y, z) in found.items():
    print(f"{name + ':':<15} y = {y}, z = {z}")
assert found["eager"] == found["exported"] == [1.0, 1.0]
assert found["decompositions"] == [0.0, 1.0], "the two are one tensor: the behaviour has changed"
PYTHON
