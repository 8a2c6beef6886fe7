"""OpenVINO on the CPU, tuned for the latency of one request, float32."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import nn

from autoprune.latency.engines.base import Call, DenseEngine
from autoprune.latency.engines.export import arrays, onnx_file


class OpenVino(DenseEngine):
    """OpenVINO's CPU plugin. By itself it would take bfloat16 where the CPU has it: not the same work."""

    needs = ("onnx", "onnxscript", "openvino")

    def _compile(self, model: nn.Module, inputs: tuple[Any, ...], threads: int) -> Call:
        return openvino_call(model, inputs, threads, {"INFERENCE_PRECISION_HINT": "f32"})


def openvino_call(model: nn.Module, inputs: tuple[Any, ...], threads: int, precision: Mapping[str, str]) -> Call:
    """One request of the CPU plugin, with the settings of `precision` besides those for latency."""
    openvino = import_openvino()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, **precision}
    with onnx_file(model, inputs) as path:
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    request = compiled.create_infer_request()
    for at, array in enumerate(arrays(inputs, len(compiled.inputs))):
        # Bound once: giving the arrays with each call costs a tenth of a millisecond. Copied, because a request
        # does not keep an array alive whose memory it shares.
        request.set_input_tensor(at, openvino.Tensor(array, shared_memory=False))
    return lambda: tuple(request.infer(share_outputs=True).values())


def import_openvino() -> ModuleType:
    """Imports openvino without its usage statistics.

    `import openvino` alone reports to its makers over the network, from a forked process, and leaves files in
    the home folder. Where its telemetry package is not installed it takes a silent stub instead; so here.
    """
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    missing = object()
    before = sys.modules.get("openvino_telemetry", missing)
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # what makes an import fail
    try:
        return importlib.import_module("openvino")
    finally:
        if before is missing:
            del sys.modules["openvino_telemetry"]
        else:
            sys.modules["openvino_telemetry"] = before  # type: ignore[assignment]
