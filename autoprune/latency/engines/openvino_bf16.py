"""OpenVINO on the CPU as it comes: bfloat16 where the processor has it, so not the same work as float32."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from autoprune.latency.engines.base import Call, DenseEngine
from autoprune.latency.engines.openvino import openvino_call


class OpenVinoBf16(DenseEngine):
    """OpenVINO's CPU plugin with its own choice of precision."""

    needs = ("onnx", "onnxscript", "openvino")
    float32: ClassVar[bool] = False

    def _compile(self, model: nn.Module, inputs: tuple[Any, ...], threads: int) -> Call:
        return openvino_call(model, inputs, threads, {})
