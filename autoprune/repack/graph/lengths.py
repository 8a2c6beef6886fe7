"""Liftings of operators on ``(batch, channels, length)``: what they are on maps of height 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from autoprune.repack.graph.ops import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    Conv2d,
    GlobalAvgPool,
    MaxPool2d,
    Op,
    Reshape,
    TorchOp,
)
from autoprune.repack.graph.site import Result, Site, extents

_Made = Callable[[str, str], Op]  # names of the map it reads and of the one it makes -> the operation


def _on_maps(site: Site, argument: str, make: _Made) -> Result:
    """An operation on the value as a map, between two reshapes."""
    node, source, name = site.args[argument], site.name(argument), site.output
    known = dict(zip(extents(node), enumerate(node.meta["val"].shape), strict=True))

    def extent(given: int | str, value: Any) -> Any:
        if isinstance(given, int):
            return given
        if given in known:
            axis, same = known[given]
            return {"ref": site.context.integers.size(same, source, axis)}
        return {"ref": site.context.integers.extent(value)}

    def lengths(of: Any) -> list[Any]:
        return [extent(*each) for each in zip(extents(of), of.meta["val"].shape, strict=True)]

    result = site.result
    assert result is not None
    batch, channels, length = lengths(node)
    made = make(f"{name} given", f"{name} made")
    return (
        Reshape(f"{name} given", (source,), shape=(batch, channels, 1, length)),
        made,
        Reshape(name, (made.output,), shape=tuple(lengths(result))),
    )


def _one(value: Any, default: Any = None) -> int | None:
    """``3``, ``[3]`` and (with a default) ``[]`` as an integer; None for anything that is not known now."""
    values = [value] if isinstance(value, int) else list(value or [])
    values = values or [_one(default)]
    return values[0] if len(values) == 1 and type(values[0]) is int else None


def _conv1d(site: Site) -> Result:
    tensors = site.weights(weight="weight", bias="bias")
    if tensors is None or not site.is_value("input", 3) or not site.is_weight("weight", 3):
        return None
    stride, dilation, padding = (_one(site.args[name]) for name in ("stride", "dilation", "padding"))
    if isinstance(site.args["padding"], str):
        span = (dilation or 1) * (int(site.shape("weight")[2]) - 1)
        padding = 0 if site.args["padding"] == "valid" else None if span % 2 else span // 2
    if stride is None or dilation is None or padding is None:
        return None
    layer, name = site.layer(), tensors["weight"]
    tensors["weight"] = site.context.constant(f"{name}.map", site.context.constants[name].unsqueeze(2))
    return _on_maps(
        site, "input",
        lambda given, made: Conv2d(
            made, (given,), tensors, stride=(1, stride), padding=(0, padding), dilation=(1, dilation),
            groups=site.args["groups"], activation=None, layer=layer,
        ),
    )  # fmt: skip


def norm(site: Site, lifted: TorchOp) -> Result:
    """A batch norm on lengths, given as what it is on a map."""
    rest, more = lifted.args[1:], lifted.kwargs
    return _on_maps(
        site, "input", lambda given, made: TorchOp.of(made, lifted.op, ({"ref": given}, *rest), more)
    )  # fmt: skip


def _group_norm(site: Site) -> Result:
    if not site.is_value("input", 3):
        return None
    a = site.args
    weights = [None if a[role] is None else {"ref": site.name(role)} for role in ("weight", "bias")]
    rest = (a["num_groups"], *weights, a["eps"], False)
    return _on_maps(
        site, "input", lambda given, made: TorchOp.of(made, "aten.group_norm.default", ({"ref": given}, *rest))
    )  # fmt: skip


def _max_pool1d(site: Site) -> Result:
    a = site.args
    if site.result is None:
        return None
    kernel, stride = _one(a["kernel_size"]), _one(a["stride"], a["kernel_size"])
    padding, dilation = _one(a["padding"]), _one(a["dilation"])
    if not site.is_value("self", 3) or kernel is None or stride is None or padding is None or dilation is None:
        return None
    return _on_maps(
        site, "self",
        lambda given, made: MaxPool2d(
            made, (given,), kernel=(1, kernel), stride=(1, stride), padding=(0, padding), dilation=(1, dilation),
            ceil_mode=a["ceil_mode"],
        ),
    )  # fmt: skip


def _avg_pool1d(site: Site) -> Result:
    a = site.args
    kernel, stride, padding = _one(a["kernel_size"]), _one(a["stride"], a["kernel_size"]), _one(a["padding"])
    if not site.is_value("self", 3) or kernel is None or stride is None or padding is None:
        return None
    return _on_maps(
        site, "self",
        lambda given, made: AvgPool2d(
            made, (given,), kernel=(1, kernel), stride=(1, stride), padding=(0, padding), ceil_mode=a["ceil_mode"],
            count_include_pad=a["count_include_pad"],
        ),
    )  # fmt: skip


def pad(site: Site) -> Result:
    """At both ends of a length."""
    a = site.args
    pads, mode, value = a["pad"], a.get("mode", "constant"), a["value"]
    if not site.is_value("self", 3) or len(pads) != 2 or any(type(each) is not int for each in pads) or value:
        return None

    def make(given: str, made: str) -> Op:
        return TorchOp.of(made, "aten.pad.default", ({"ref": given}, [*pads, 0, 0], mode))

    return _on_maps(site, "self", make)


def _adaptive_avg_pool1d(site: Site) -> Result:
    size = _one(site.args["output_size"])
    if not site.is_value("self", 3) or size is None:
        return None
    if size == 1:
        return _on_maps(site, "self", lambda given, made: GlobalAvgPool(made, (given,), keepdim=True))
    return _on_maps(site, "self", lambda given, made: AdaptiveAvgPool2d(made, (given,), size=(1, size)))


def _adaptive_max_pool1d(site: Site) -> Result:
    size = _one(site.args["output_size"])
    if not site.is_value("self", 3) or size is None or site.result is None:
        return None

    def make(given: str, made: str) -> Op:
        pool = TorchOp.of(made, "aten.adaptive_max_pool2d.default", ({"ref": given}, [1, size]))
        return replace(pool, item=0)

    return _on_maps(site, "self", make)


LIFTINGS: Mapping[str, Callable[[Site], Result]] = {
    "conv1d.default": _conv1d,
    "conv1d.padding": _conv1d,
    "group_norm.default": _group_norm,
    "max_pool1d.default": _max_pool1d,
    "max_pool1d_with_indices.default": _max_pool1d,
    "avg_pool1d.default": _avg_pool1d,
    "adaptive_avg_pool1d.default": _adaptive_avg_pool1d,
    "adaptive_max_pool1d.default": _adaptive_max_pool1d,
}
