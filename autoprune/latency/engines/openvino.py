"""OpenVINO on the CPU, tuned for the latency of one request, float32."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from autoprune.latency.engines.base import Call
from autoprune.latency.engines.export import OnnxEngine, arrays


class OpenVino(OnnxEngine):
    """OpenVINO's CPU plugin. By itself it would take bfloat16 where the CPU has it: not the same work."""

    needs = ("onnx", "onnxscript", "openvino")

    def _load(self, path: Path, inputs: tuple[Any, ...], threads: int) -> Call:
        return openvino_call(path, inputs, threads, {"INFERENCE_PRECISION_HINT": "f32"})


def openvino_call(path: Path, inputs: tuple[Any, ...], threads: int, precision: Mapping[str, str]) -> Call:
    """One request of the CPU plugin, with the settings of `precision` besides those for latency."""
    openvino = import_openvino()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, **precision}
    core = openvino.Core()
    model = core.read_model(str(path))
    values = arrays(inputs, len(model.inputs))
    if model.is_dynamic():
        model.reshape({at: array.shape for at, array in enumerate(values)})
    compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    for at, array in enumerate(values):
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
