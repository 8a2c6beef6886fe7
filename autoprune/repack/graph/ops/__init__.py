"""The operations that a graph is made of: a class each, which carries its attributes, checks and meaning.

What runs them lies elsewhere, in tables by class: `lowering.lower.RULES`, `onnx.forms.MODULES`, `demand.PRODUCTS`,
`tuning.cache_model.ACCESSES` and `tuning.layer_times.FLOPS`; a test asserts that each class has a row in every one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoprune.errors import FileError
from autoprune.repack.graph.ops.attention import Attention
from autoprune.repack.graph.ops.base import Op, Shapes, Values
from autoprune.repack.graph.ops.conv2d import Conv2d, ConvolutionOp, GatedConv2d
from autoprune.repack.graph.ops.elementwise import Activation, Add
from autoprune.repack.graph.ops.experts import Experts
from autoprune.repack.graph.ops.gates import Gate, Scale
from autoprune.repack.graph.ops.layer import FusedLayerOp, LayerOp
from autoprune.repack.graph.ops.layer_norm import LayerNorm
from autoprune.repack.graph.ops.linear import Linear
from autoprune.repack.graph.ops.pooling import AdaptiveAvgPool2d, AvgPool2d, GlobalAvgPool, MaxPool2d, WindowPoolOp
from autoprune.repack.graph.ops.quantize import Quantize
from autoprune.repack.graph.ops.recurrent import Recurrent
from autoprune.repack.graph.ops.reshape import Reshape
from autoprune.repack.graph.ops.rms_norm import RmsNorm
from autoprune.repack.graph.ops.rotary import Rotary
from autoprune.repack.graph.ops.scalar import Scalar
from autoprune.repack.graph.ops.torch_op import TorchOp

__all__ = [
    "OPS", "Activation", "AdaptiveAvgPool2d", "Add", "Attention", "AvgPool2d", "Conv2d", "ConvolutionOp",
    "Experts", "FusedLayerOp", "Gate", "GatedConv2d", "GlobalAvgPool", "LayerNorm", "LayerOp", "Linear", "MaxPool2d",
    "Op", "Quantize", "Recurrent", "Reshape", "RmsNorm", "Rotary", "Scalar", "Scale", "Shapes", "TorchOp", "Values",
    "WindowPoolOp", "op_from_json",
]  # fmt: skip

OPS: Mapping[str, type[Op]] = {
    "conv2d": Conv2d,
    "gate": Gate,
    "scale": Scale,
    "gated_conv2d": GatedConv2d,
    "linear": Linear,
    "max_pool2d": MaxPool2d,
    "avg_pool2d": AvgPool2d,
    "adaptive_avg_pool2d": AdaptiveAvgPool2d,
    "global_avg_pool": GlobalAvgPool,
    "activation": Activation,
    "add": Add,
    "quantize": Quantize,
    "layer_norm": LayerNorm,
    "rms_norm": RmsNorm,
    "rotary": Rotary,
    "attention": Attention,
    "recurrent": Recurrent,
    "experts": Experts,
    "reshape": Reshape,
    "scalar": Scalar,
    "torch": TorchOp,
}


def op_from_json(
    kind: str, output: str, inputs: tuple[str, ...], attributes: Mapping[str, Any],
    tensors: Mapping[str, str] | None = None,
) -> Op:  # fmt: skip
    """The operation that a file describes, not checked yet; raises FileError for an unknown kind or attribute."""
    if kind not in OPS:
        raise FileError(f"the graph holds an operation of the unknown kind {kind!r}.")
    return OPS[kind].from_json(output, inputs, attributes, tensors or {})
