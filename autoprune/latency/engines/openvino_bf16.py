"""OpenVINO on the CPU as it comes: bfloat16 where the processor has it, so not the same work as float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from autoprune.latency.engines.base import Call
from autoprune.latency.engines.export import OnnxEngine
from autoprune.latency.engines.openvino import openvino_call


class OpenVinoBf16(OnnxEngine):
    """OpenVINO's CPU plugin with its own choice of precision."""

    needs = ("onnx", "onnxscript", "openvino")
    float32: ClassVar[bool] = False

    def _load(self, path: Path, inputs: tuple[Any, ...], threads: int) -> Call:
        return openvino_call(path, inputs, threads, {})
