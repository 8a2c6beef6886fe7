"""Dense engines: what a repacked model has to beat. One file and one row an engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from autoprune.latency.engines.base import DenseEngine
from autoprune.precision import Precision, RunPrecision
from autoprune.registry import Registry

ENGINES: Registry[DenseEngine] = Registry(
    "dense engine",
    {
        "eager": "autoprune.latency.engines.eager:Eager",
        "channels_last": "autoprune.latency.engines.channels_last:ChannelsLast",
        "compile": "autoprune.latency.engines.compile:Compile",
        "onnxruntime": "autoprune.latency.engines.onnxruntime:OnnxRuntime",
        "openvino": "autoprune.latency.engines.openvino:OpenVino",
        "openvino_bf16": "autoprune.latency.engines.openvino_bf16:OpenVinoBf16",
        "onnxruntime_int8": "autoprune.latency.engines.onnxruntime_int8:OnnxRuntimeInt8",
        "openvino_int8": "autoprune.latency.engines.openvino_int8:OpenVinoInt8",
    },
)


_ALIKE: Mapping[RunPrecision | Precision, tuple[str, ...]] = {"float32": ("float32",), "bf16": ("float32", "bf16")}
"""Precision of a repacked model -> those of the engines that do as exact a work; of any where it is not here."""


def baselines(precision: RunPrecision | Precision = "float32") -> tuple[str, ...]:
    """The engines that a model repacked in this precision is compared with.

    In float32 those that do the same work as the model itself, all in float32; in bf16 those in bf16 too. Who accepts
    the error of bytes could run the dense model in any precision: all of them.
    """
    alike = _ALIKE.get(precision)
    return tuple(name for name in ENGINES if alike is None or ENGINES.get(name).precision in alike)


def best_engine(ms: Mapping[str, float], among: Iterable[str] | None = None) -> str:
    """The fastest dense engine.

    Args:
        ms: what was timed -> milliseconds; what is no dense engine does not count.
        among: the rows of ENGINES that count: `baselines` when None, all of ENGINES for the best of any precision.
    """
    return min((name for name in (baselines() if among is None else among) if name in ms), key=lambda name: ms[name])


__all__ = ["ENGINES", "DenseEngine", "baselines", "best_engine"]
