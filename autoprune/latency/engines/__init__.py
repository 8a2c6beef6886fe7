"""Dense engines: what a repacked model has to beat. One file and one row an engine."""

from __future__ import annotations

from autoprune.latency.engines.base import DenseEngine
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
    },
)


def baselines() -> tuple[str, ...]:
    """The engines that do the same work as the model itself: all in float32."""
    return tuple(name for name in ENGINES if ENGINES.get(name).float32)


__all__ = ["ENGINES", "DenseEngine", "baselines"]
