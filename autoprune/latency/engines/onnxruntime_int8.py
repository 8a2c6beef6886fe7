"""ONNX Runtime on the CPU in int8: its own quantisation, unsigned activations and signed weights, a scale a filter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from autoprune.errors import AutopruneError
from autoprune.latency.engines.base import Call, DenseEngine, EnginePrecision, Inputs
from autoprune.latency.engines.export import arrays, onnx_file
from autoprune.latency.engines.onnxruntime import onnxruntime_call
from autoprune.latency.engines.silence import silenced
from autoprune.latency.timer import Protocol, measure_together

INTEGER_PRODUCTS = {
    *("QLinearConv", "QLinearMatMul", "QGemm"),  # what a statically quantised product becomes
    *("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),  # a dynamically quantised one
    *("QAttention", "DynamicQuantizeLSTM"),
}
STAYS_FLOAT = {"Softmax", "LayerNormalization"}  # and attention's own products: bytes lose too much accuracy there
TRIAL = Protocol(samples=5, warmup=1)

Quantise = Callable[[Path, Path], None]


class OnnxRuntimeInt8(DenseEngine):
    """ONNX Runtime's CPU provider, on the faster of two models; `note` says which that is.

    One is quantised statically, with ranges of activations from the calibration batches; the other dynamically, with
    those of each call, which suits Linears and recurrent layers.
    """

    needs = ("onnx", "onnxscript", "onnxruntime")
    precision: ClassVar[EnginePrecision] = "int8"

    def _compile(self, model: nn.Module, inputs: Inputs, threads: int, calibration: Sequence[Inputs]) -> Call:
        with onnx_file(model, inputs) as path:
            whole = _preprocessed(path)
            ways: dict[str, Quantise] = {"static": partial(_static, calibration=calibration), "dynamic": _dynamic}
            calls: dict[str, Call] = {}
            refused: list[AutopruneError] = []
            for name, quantise in ways.items():
                try:
                    with self.reasons():
                        calls[name] = _call(whole, quantise, name, inputs, threads)
                except AutopruneError as error:
                    refused.append(error)
        if not calls:
            raise refused[0]
        taken = next(iter(calls))
        if len(calls) > 1:
            times = measure_together(calls, Protocol(TRIAL.samples, TRIAL.warmup, threads))
            taken = min(times, key=lambda name: times[name].median_ms)
        self.note = f"{taken} quantisation"
        return calls[taken]


def _preprocessed(path: Path) -> Path:
    """The file made ready as ONNX Runtime asks for: operators fused, shapes known, weights inside."""
    import onnx
    from onnxruntime.quantization import quant_pre_process

    inside, ready = path.with_name("inside.onnx"), path.with_name("ready.onnx")
    onnx.save(onnx.load(path), inside)
    with silenced():
        quant_pre_process(str(inside), str(ready), skip_symbolic_shape=True)
    return ready


def _static(path: Path, out: Path, calibration: Sequence[Inputs]) -> None:
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    graph = onnx.load(path).graph
    names, weights = [value.name for value in graph.input], {tensor.name for tensor in graph.initializer}
    feeds = (dict(zip(names, arrays(batch, len(names)), strict=True)) for batch in calibration)
    quantization.quantize_static(
        str(path),
        str(out),
        _Feeds(feeds),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        op_types_to_quantize=sorted({*QDQRegistry, *QLinearOpsRegistry} - STAYS_FLOAT),
        nodes_to_exclude=[node.name for node in graph.node if node.op_type == "MatMul" and not weights & {*node.input}],
    )


def _dynamic(path: Path, out: Path) -> None:
    from onnxruntime import quantization

    quantization.quantize_dynamic(str(path), str(out), per_channel=True, weight_type=quantization.QuantType.QInt8)


def _call(path: Path, quantise: Quantise, name: str, inputs: Inputs, threads: int) -> Call:
    """The model quantised in one way; raises AutopruneError where it would run in float32 all the same."""
    import onnx

    out, optimised = path.with_name(f"{name}.onnx"), path.with_name(f"{name}.optimised.onnx")
    with silenced():
        quantise(path, out)
    call = onnxruntime_call(out, inputs, threads, optimised)
    kinds = {node.op_type for node in onnx.load(optimised, load_external_data=False).graph.node}
    if not kinds & INTEGER_PRODUCTS:
        raise AutopruneError(
            f"onnxruntime_int8 would run none of this model's products in int8 ({name} quantisation left "
            f"{', '.join(sorted(kinds))}): it would be float32 under another name."
        )
    return call


class _Feeds:
    """What ONNX Runtime reads calibration batches from."""

    def __init__(self, feeds: Any) -> None:
        self._feeds = feeds

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)
