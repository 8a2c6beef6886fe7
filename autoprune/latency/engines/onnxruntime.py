"""ONNX Runtime on the CPU, all graph optimisations, float32."""

from __future__ import annotations

from pathlib import Path

from autoprune.latency.engines.base import Call, Inputs
from autoprune.latency.engines.export import BATCH, OnnxEngine, arrays


class OnnxRuntime(OnnxEngine):
    """ONNX Runtime's CPU provider."""

    needs = ("onnx", "onnxscript", "onnxruntime")

    def _load(self, path: Path, inputs: Inputs, threads: int) -> Call:
        return onnxruntime_call(path, inputs, threads)


def onnxruntime_call(path: Path, inputs: Inputs, threads: int, optimised: Path | None = None) -> Call:
    """One session of a file; what its optimisations made of the file is written to `optimised`."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # errors are raised, too
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    if inputs and inputs[0].ndim:
        options.add_free_dimension_override_by_name(BATCH, inputs[0].shape[0])
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    binding = session.io_binding()  # inputs and outputs bound once: as fast as this engine can be driven
    for name, array in zip(names, arrays(inputs, len(names)), strict=True):
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for value in session.get_outputs():
        binding.bind_output(value.name)
    session.run_with_iobinding(binding)
    results = binding.copy_outputs_to_cpu()
    for value, array in zip(session.get_outputs(), results, strict=True):
        binding.bind_ortvalue_output(value.name, onnxruntime.OrtValue.ortvalue_from_numpy(array))

    def run() -> object:
        session.run_with_iobinding(binding)
        return results

    return run
