"""OpenVINO on the CPU in int8: NNCF's post-training quantisation, a scale for each filter of a weight."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar

from torch import nn

from autoprune.latency.engines.base import Call, DenseEngine, EnginePrecision, Inputs
from autoprune.latency.engines.export import arrays, onnx_file
from autoprune.latency.engines.openvino import (
    FLOAT32,
    import_openvino,
    import_unreported,
    openvino_call,
    openvino_model,
)
from autoprune.latency.engines.silence import silenced


class OpenVinoInt8(DenseEngine):
    """OpenVINO's CPU plugin, on a model that NNCF quantised with the calibration batches, all of them, by its defaults.

    What stays float computes in float32: OpenVINO's own choice, bfloat16 where the CPU has it, loses more accuracy.
    """

    needs = ("onnx", "onnxscript", "openvino", "nncf")
    install: ClassVar[str] = 'pip install "autoprune[engines-int8]"'
    precision: ClassVar[EnginePrecision] = "int8"

    def _compile(self, model: nn.Module, inputs: Inputs, threads: int, calibration: Sequence[Inputs]) -> Call:
        nncf = import_nncf()
        with onnx_file(model, inputs) as path:
            loaded, values = openvino_model(path, inputs)
            batches = [arrays(batch, len(values)) for batch in calibration]
            with silenced():
                quantised = nncf.quantize(
                    loaded,
                    nncf.Dataset(batches, lambda batch: batch),
                    subset_size=len(batches),
                    model_type=nncf.ModelType.TRANSFORMER if _attends(loaded) else None,
                )
        return openvino_call(quantised, values, threads, FLOAT32, products=("i8", "u8"))


def import_nncf() -> ModuleType:
    """Imports NNCF without its usage statistics, and leaves Python's logging as it was."""
    import_openvino()
    before = logging.getLoggerClass()
    try:
        return import_unreported("nncf")
    finally:
        logging.setLoggerClass(before)


def _attends(model: Any) -> bool:
    """Whether a softmax weighs the rows of a product, as attention does: NNCF treats such models in another way."""
    return any(
        reader.get_node().get_type_name() == "MatMul"
        for op in model.get_ops()
        if op.get_type_name() == "Softmax"
        for reader in op.output(0).get_target_inputs()
    )
