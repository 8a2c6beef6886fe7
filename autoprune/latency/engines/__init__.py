"""Dense engines: what a repacked model has to beat. One file and one row an engine."""

from autoprune.latency.engines.base import DenseEngine
from autoprune.registry import Registry

ENGINES: Registry[DenseEngine] = Registry(
    "dense engine",
    {
        "eager": "autoprune.latency.engines.eager:Eager",
        "channels_last": "autoprune.latency.engines.channels_last:ChannelsLast",
        "onnxruntime": "autoprune.latency.engines.onnxruntime:OnnxRuntime",
        "openvino": "autoprune.latency.engines.openvino:OpenVino",
    },
)

__all__ = ["ENGINES", "DenseEngine"]
