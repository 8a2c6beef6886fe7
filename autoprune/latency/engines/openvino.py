"""OpenVINO on the CPU, tuned for the latency of one request, float32."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from autoprune.errors import AutopruneError
from autoprune.latency.engines.base import Call, Inputs
from autoprune.latency.engines.export import OnnxEngine, arrays

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
PRODUCTS = {"Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNCell", "RNNSeq"}  # the plugin's own names


class OpenVino(OnnxEngine):
    """OpenVINO's CPU plugin. By itself it would take bfloat16 where the CPU has it: not the same work."""

    needs = ("onnx", "onnxscript", "openvino")

    def _load(self, path: Path, inputs: Inputs, threads: int) -> Call:
        return openvino_call(*openvino_model(path, inputs), threads, FLOAT32)


def openvino_model(path: Path, inputs: Inputs) -> tuple[Any, list[NDArray[Any]]]:
    """The model of an ONNX file for inputs of these very shapes, and the inputs as its arrays."""
    model = import_openvino().Core().read_model(str(path))
    values = arrays(inputs, len(model.inputs))
    if model.is_dynamic():
        model.reshape({at: array.shape for at, array in enumerate(values)})
    return model, values


def openvino_call(
    model: Any, values: Sequence[NDArray[Any]], threads: int, settings: Mapping[str, str], products: Sequence[str] = ()
) -> Call:
    """One request of the CPU plugin.

    Args:
        model: OpenVINO's.
        values: its inputs.
        threads: of one inference.
        settings: besides those for latency.
        products: OpenVINO's types that count as the engine's precision; empty where any does.

    Raises:
        AutopruneError: no product of weights runs in one of these types.
    """
    openvino = import_openvino()
    latency = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(model, "CPU", {**latency, **settings})
    if products and not (types := product_types(compiled)) & {*products}:
        raise AutopruneError(
            f"OpenVINO would run none of this model's products in {' or '.join(products)} here, but in "
            f"{', '.join(sorted(types)) or 'none at all'}: it would be another engine's work under this one's name."
        )
    request = compiled.create_infer_request()
    for at, array in enumerate(values):
        # Bound once: giving the arrays with each call costs a tenth of a millisecond. Copied, because a request
        # does not keep an array alive whose memory it shares.
        request.set_input_tensor(at, openvino.Tensor(array, shared_memory=False))
    return lambda: tuple(request.infer(share_outputs=True).values())


def product_types(compiled: Any) -> set[str]:
    """The types in which a compiled model multiplies by weights, as OpenVINO names them: f32, bf16, i8, u8."""
    infos = (op.get_rt_info() for op in compiled.get_runtime_model().get_ops())
    return {str(info["runtimePrecision"].astype(str)) for info in infos if info["layerType"].astype(str) in PRODUCTS}


def import_openvino() -> ModuleType:
    """Imports openvino without its usage statistics.

    `import openvino` alone reports to its makers over the network, from a forked process, and leaves files in
    the home folder. Where its telemetry package is not installed it takes a silent stub instead; so here.
    """
    return import_unreported("openvino")


def import_unreported(name: str) -> ModuleType:
    """Imports a package that takes a stub where OpenVINO's telemetry is not installed, as if it were not."""
    if name in sys.modules:
        return sys.modules[name]
    missing = object()
    before = sys.modules.get("openvino_telemetry", missing)
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # what makes an import fail
    try:
        return importlib.import_module(name)
    finally:
        if before is missing:
            del sys.modules["openvino_telemetry"]
        else:
            sys.modules["openvino_telemetry"] = before  # type: ignore[assignment]
