"""Lifting: an operator of torch.export -> the operation it is, where it is one exactly.

A lifting that returns None leaves the operator to torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from autoprune.repack.graph import lengths, views, volumes
from autoprune.repack.graph.activations import SLOPES
from autoprune.repack.graph.einsum import einsum
from autoprune.repack.graph.ops import (
    Activation,
    AdaptiveAvgPool2d,
    Add,
    Attention,
    AvgPool2d,
    Conv2d,
    Experts,
    Gate,
    GlobalAvgPool,
    LayerNorm,
    Linear,
    MaxPool2d,
    Op,
    Recurrent,
    Scale,
    TorchOp,
)
from autoprune.repack.graph.site import Alias, Result, Site


def _pair(value: Any, default: Any = None) -> tuple[int, int] | None:
    """``[3]``, ``[3, 3]`` and (with a default) ``[]`` as two integers; None for anything that is not known now."""
    values = [value] if isinstance(value, int) else list(value or default or [])
    if len(values) == 1:
        values = values * 2
    if len(values) != 2 or not all(type(each) is int for each in values):
        return None
    return values[0], values[1]


def _conv2d(site: Site) -> Result:
    if not site.is_value("input", 4) or not site.is_weight("weight", 4):
        return None
    tensors = site.weights(weight="weight", bias="bias")
    stride, dilation = _pair(site.args["stride"]), _pair(site.args["dilation"])
    if tensors is None or stride is None or dilation is None:
        return None
    padding, more = _padding(site, dilation)
    if padding is None:
        return None
    source, border = site.name("input"), list[Op]()
    if any(more):
        border = [TorchOp.of(f"{site.output} given", "aten.pad.default", ({"ref": source}, [0, more[1], 0, more[0]]))]
        source = border[0].output
    made = Conv2d(
        site.output, (source,), tensors, stride=stride, padding=padding, dilation=dilation,
        groups=site.args["groups"], activation=None, layer=site.layer(),
    )  # fmt: skip
    return (*border, made)


def _padding(site: Site, dilation: tuple[int, int]) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """At either side, and how many rows below and columns to the right there are before it: 1 or 0."""
    given = site.args["padding"]
    if given == "valid":
        return (0, 0), (0, 0)
    if given != "same":
        return _pair(given), (0, 0)
    high, wide = (step * (int(extent) - 1) for step, extent in zip(dilation, site.shape("weight")[2:], strict=True))
    return (high // 2, wide // 2), (high % 2, wide % 2)


def _border(site: Site) -> Result:
    return views.bordered(site) or lengths.pad(site)


def _linear(site: Site) -> Result:
    tensors = site.weights(weight="weight", bias="bias")
    if tensors is None or not site.is_value("input") or len(site.shape("input")) < 2 or not site.is_weight("weight", 2):
        return None
    return Linear(site.output, (site.name("input"),), tensors, activation=None, layer=site.layer())


def _product(site: Site, x: str, weight: str, bias: str | None) -> Result:
    """``x @ weight + bias``, whose weight lies the other way round than a Linear's."""
    if not site.is_value(x) or len(site.shape(x)) < 2 or not site.is_weight(weight, 2):
        return None
    layer = site.layer(weight)
    tensors = {}
    if bias is not None:
        if not site.is_weight(bias, 1):
            return None
        tensors["bias"] = site.name(bias)
    name = site.name(weight)
    tensors["weight"] = site.context.constant(f"{name}.turned", site.context.constants[name].t())
    return Linear(site.output, (site.name(x),), tensors, activation=None, layer=layer)


def _addmm(site: Site) -> Result:
    whole = site.args["beta"] == 1 and site.args["alpha"] == 1 and site.shape("self") == site.shape("mat2")[1:]
    return _product(site, "mat1", "mat2", "self") if whole else None


def _gate(site: Site) -> Result:
    """The predictor of a gated convolution."""
    tensors = site.weights(weight="weight", bias="bias", threshold="threshold")
    if tensors is None or not site.is_value("x", 4):
        return None
    return Gate(site.output, (site.name("x"),), tensors, keep=site.args["keep"])


def _scale(site: Site) -> Result:
    if not site.is_value("y", 4) or not site.is_value("factors", 2):
        return None
    return Scale(site.output, (site.name("y"), site.name("factors")))


def _norm(site: Site) -> Result:
    """Batch norm outside training, as the one operator that the passes know."""
    a = site.args
    if a.get("training") or not site.is_value("input") or a["running_mean"] is None or a["running_var"] is None:
        return None
    names = ("input", "weight", "bias", "running_mean", "running_var")
    args: list[Any] = [None if a[name] is None else {"ref": site.name(name)} for name in names]
    args += [False, a["momentum"], a["eps"], False]
    lifted = TorchOp.of(site.output, "aten.batch_norm.default", tuple(args))
    return lengths.norm(site, lifted) if len(site.shape("input")) == 3 else lifted


def _instance_norm(site: Site) -> Result:
    """A group norm of a channel each."""
    a, channels = site.args, site.shape("input")[1]
    if not a["use_input_stats"] or not site.is_value("input", 4) or not isinstance(channels, int):
        return None
    if a["running_mean"] is not None or a["running_var"] is not None:
        return None  # which it would update
    weights = [None if a[role] is None else {"ref": site.name(role)} for role in ("weight", "bias")]
    args = ({"ref": site.name("input")}, channels, *weights, a["eps"], False)
    return TorchOp.of(site.output, "aten.group_norm.default", args)


def _activation(name: str) -> Callable[[Site], Result]:
    def lifted(site: Site) -> Result:
        return Activation(site.output, (site.name("self"),), name=name) if site.is_value("self") else None

    return lifted


def _gelu(site: Site) -> Result:
    return _activation({"none": "gelu", "tanh": "gelu_tanh"}[site.args["approximate"]])(site)


def _leaky_relu(site: Site) -> Result:
    slope = site.args["negative_slope"]
    return _activation(f"leaky_relu_{slope}")(site) if slope in SLOPES else None


def _clamp(low: str, high: str) -> Callable[[Site], Result]:
    """A ReLU is a clamp from 0, a ReLU6 one from 0 to 6."""

    def lifted(site: Site) -> Result:
        names: dict[Any, str] = {(0, None): "relu", (0, 6): "relu6"}
        name = names.get((site.args.get(low), site.args.get(high)))
        return _activation(name)(site) if name else None

    return lifted


def _max_pool2d(site: Site) -> Result:
    a = site.args
    kernel = _pair(a["kernel_size"])
    stride, padding, dilation = _pair(a["stride"], a["kernel_size"]), _pair(a["padding"]), _pair(a["dilation"])
    if site.result is None:
        return None
    if not site.is_value("self", 4) or kernel is None or stride is None or padding is None or dilation is None:
        return None
    return MaxPool2d(
        site.output, (site.name("self"),), kernel=kernel, stride=stride, padding=padding, dilation=dilation,
        ceil_mode=a["ceil_mode"],
    )  # fmt: skip


def _avg_pool2d(site: Site) -> Result:
    a = site.args
    kernel, stride, padding = _pair(a["kernel_size"]), _pair(a["stride"], a["kernel_size"]), _pair(a["padding"])
    divisor = a["divisor_override"]
    if not site.is_value("self", 4) or kernel is None or stride is None or padding is None:
        return None
    if divisor is not None and divisor < 1:
        return None
    return AvgPool2d(
        site.output, (site.name("self"),), kernel=kernel, stride=stride, padding=padding,
        ceil_mode=a["ceil_mode"], count_include_pad=a["count_include_pad"], divisor=divisor,
    )  # fmt: skip


def _adaptive_avg_pool2d(site: Site) -> Result:
    output = _pair(site.args["output_size"])
    if output is None or not site.is_value("self", 4):
        return None
    if output == (1, 1):
        return GlobalAvgPool(site.output, (site.name("self"),), keepdim=True)
    extent = site.shape("self")[2:]
    if not all(isinstance(size, int) for size in extent):
        return AdaptiveAvgPool2d(site.output, (site.name("self"),), size=output)
    if any(int(size) % parts for size, parts in zip(extent, output, strict=True)):
        return AdaptiveAvgPool2d(site.output, (site.name("self"),), size=output)
    kernel = (int(extent[0]) // output[0], int(extent[1]) // output[1])
    if kernel == (1, 1):
        return Alias(site.name("self"))
    return AvgPool2d(
        site.output, (site.name("self"),), kernel=kernel, stride=kernel, padding=(0, 0), count_include_pad=True
    )


def _mean(site: Site) -> Result:
    axes = site.args["dim"]
    if (
        not site.is_value("self", 4)
        or site.args["dtype"] is not None
        or sorted(axis % 4 for axis in axes or ()) != [2, 3]
    ):
        return None
    return GlobalAvgPool(site.output, (site.name("self"),), keepdim=site.args["keepdim"])


def _add(site: Site) -> Result:
    if not site.is_value("self") or not site.is_value("other") or site.args["alpha"] != 1:
        return None
    if site.shape("self") != site.shape("other"):
        return None
    return Add(site.output, (site.name("self"), site.name("other")), activation=None)


def _layer_norm(site: Site) -> Result:
    size = site.args["normalized_shape"]
    tensors = site.weights(weight="weight", bias="bias")
    if len(size) != 1 or type(size[0]) is not int or tensors is None or not site.is_value("input"):
        return None
    return LayerNorm(site.output, (site.name("input"),), tensors, size=size[0], eps=site.args["eps"])


def _attention(site: Site) -> Result:
    a = site.args
    if a["dropout_p"] or a["enable_gqa"] or not all(site.is_value(name) for name in ("query", "key", "value")):
        return None
    query, key, value = (site.shape(name) for name in ("query", "key", "value"))
    width = query[-1]
    if len(query) < 3 or not isinstance(width, int) or width != key[-1] or key[-2] != value[-2]:
        return None
    given, made = [site.name("query")], list[Op]()
    for name, shape in (("key", key), ("value", value)):
        sizes = _expansion(shape[:-2], query[:-2])
        if sizes is None:
            return None
        given.append(site.name(name))
        if any(size != -1 for size in sizes):  # heads of queries that share one of keys
            each = f"{site.output} {name}"
            made.append(TorchOp.of(each, "aten.expand.default", ({"ref": given[-1]}, [*sizes, -1, -1])))
            given[-1] = each
    if a["attn_mask"] is not None:
        given.append(site.name("attn_mask"))
    scale = a["scale"] if a["scale"] is not None else 1 / math.sqrt(width)
    return (*made, Attention(site.output, tuple(given), scale=scale, causal=a["is_causal"]))


def _expansion(extents: Sequence[int | str], wanted: Sequence[int | str]) -> list[int] | None:
    """What `extents` are expanded to, -1 for one that stays; None where they cannot be those that are wanted."""
    if len(extents) != len(wanted):
        return None
    sizes = []
    for extent, each in zip(extents, wanted, strict=True):
        if extent != each and (extent != 1 or not isinstance(each, int)):
            return None
        sizes.append(-1 if extent == each else int(each))
    return sizes


def _recurrent(site: Site) -> Result:
    a = site.args
    tensors = site.weights(weight="weight", bias="bias")
    given = [name for name in ("gates", "h", "c") if a[name] is not None]
    if tensors is None or not all(site.is_value(name) or site.is_float(a[name], 2) for name in given):
        return None
    return Recurrent(
        site.output, tuple(site.name(name) for name in given), tensors, cell=a["cell"], time_first=a["time_first"],
        reverse=a["reverse"], threshold=a["threshold"], keep=a["keep"], units=None, interleaved=False,
        layer=site.layer(),
    )  # fmt: skip


def _experts(site: Site) -> Result:
    if not site.is_value("input", 2) or not site.is_weight("weight", 3):
        return None
    return Experts(site.output, (site.name("input"), site.name("offs")), {"weight": site.name("weight")})


_LIFTINGS: Mapping[str, Callable[[Site], Result]] = {
    "conv2d.default": _conv2d,
    "conv2d.padding": _conv2d,
    "autoprune.channel_gate.default": _gate,
    "autoprune.scale_channels.default": _scale,
    **lengths.LIFTINGS,
    **volumes.LIFTINGS,
    "pad.default": _border,
    "constant_pad_nd.default": _border,
    "einsum.default": einsum,
    "linear.default": _linear,
    "addmm.default": _addmm,
    "mm.default": lambda site: _product(site, "self", "mat2", None),
    "matmul.default": lambda site: _product(site, "self", "other", None),
    "batch_norm.default": _norm,
    "_native_batch_norm_legit_no_training.default": _norm,
    "instance_norm.default": _instance_norm,
    "relu.default": _activation("relu"),
    "relu6.default": _activation("relu6"),
    "hardtanh.default": _clamp("min_val", "max_val"),
    "clamp.default": _clamp("min", "max"),
    "clamp_min.default": _clamp("min", "max"),
    "silu.default": _activation("silu"),
    "leaky_relu.default": _leaky_relu,
    "gelu.default": _gelu,
    "sigmoid.default": _activation("sigmoid"),
    "tanh.default": _activation("tanh"),
    "hardswish.default": _activation("hardswish"),
    "hardsigmoid.default": _activation("hardsigmoid"),
    "max_pool2d.default": _max_pool2d,
    "max_pool2d_with_indices.default": _max_pool2d,
    "avg_pool2d.default": _avg_pool2d,
    "adaptive_avg_pool2d.default": _adaptive_avg_pool2d,
    "mean.dim": _mean,
    "add.Tensor": _add,
    "layer_norm.default": _layer_norm,
    "autoprune.recurrent.default": _recurrent,
    "scaled_dot_product_attention.default": _attention,
    "transformers.grouped_mm_fallback.default": _experts,
    **views.LIFTINGS,
}


def lifts(target: torch._ops.OpOverload) -> bool:
    """Whether there is a lifting for the operator."""
    return str(target).removeprefix("aten.") in _LIFTINGS


def lift(target: torch._ops.OpOverload, site: Site) -> Result:
    """What a call of an operator with a lifting is; None when it is left to torch."""
    return _LIFTINGS[str(target).removeprefix("aten.")](site)
