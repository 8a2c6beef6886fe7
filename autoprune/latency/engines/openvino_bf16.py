"""OpenVINO on the CPU as it comes: bfloat16 where the processor has it, so not the same work as float32."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from autoprune.latency.engines.base import Call, EnginePrecision, Inputs
from autoprune.latency.engines.export import OnnxEngine
from autoprune.latency.engines.openvino import openvino_call, openvino_model


class OpenVinoBf16(OnnxEngine):
    """OpenVINO's CPU plugin with its own choice of precision, where that is bfloat16."""

    needs = ("onnx", "onnxscript", "openvino")
    precision: ClassVar[EnginePrecision] = "bf16"

    def _load(self, path: Path, inputs: Inputs, threads: int) -> Call:
        return openvino_call(*openvino_model(path, inputs), threads, {}, products=("bf16",))
