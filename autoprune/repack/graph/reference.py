"""What each kind of operation in a graph computes, in torch's own functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoprune.model.channel_gates import saliency, scaled, winners
from autoprune.model.recurrent.cells import run_steps
from autoprune.model.recurrent.names import GATES, by_gate
from autoprune.repack.graph import aten
from autoprune.repack.graph.ir import Graph, Op, Values, build_outputs

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
}


def activate(x: Tensor, name: str | None) -> Tensor:
    """Applies the activation called `name`; none when None."""
    return x if name is None else ACTIVATIONS[name](x)


def _conv2d(op: Op, x: list[Any], w: Mapping[str, Tensor], _: Values) -> Tensor:
    a = op.attributes
    y = F.conv2d(x[0], w["weight"], w.get("bias"), a["stride"], a["padding"], a["dilation"], a["groups"])
    return activate(y if len(x) == 1 else y + x[1], op.activation)


def _gate(op: Op, x: list[Any], w: Mapping[str, Tensor], _: Values) -> Tensor:
    scores = saliency(x[0], w["weight"], w["bias"])
    return winners(scores, w["threshold"], min(op.attributes["keep"], scores.shape[1]))


def _scale(op: Op, x: list[Any], w: Mapping[str, Tensor], _: Values) -> Tensor:
    return scaled(x[0], x[1])


def _gated_conv2d(op: Op, x: list[Any], w: Mapping[str, Tensor], _: Values) -> Tensor:
    a, given, rest = op.attributes, x[0], list(x[1:])
    factors = rest.pop(0) if a["gate"] else None
    if a["live"]:
        silent = scaled(torch.ones_like(given[:, :, :1, :1]), rest.pop(0)) == 0
        given = given.masked_fill(silent, 0.0)
    y = F.conv2d(given, w["weight"], w.get("bias"), a["stride"], a["padding"], a["dilation"], a["groups"])
    y = y if factors is None else scaled(y, factors)
    return activate(y + rest[0] if rest else y, op.activation)


def _linear(op: Op, x: list[Any], w: Mapping[str, Tensor], _: Values) -> Tensor:
    y = F.linear(x[0], w["weight"], w.get("bias"))
    return activate(y if len(x) == 1 else y + x[1], op.activation)


def _max_pool2d(op: Op, x: list[Any], w: Mapping[str, Tensor], _: Values) -> Tensor:
    a = op.attributes
    return F.max_pool2d(x[0], a["kernel"], a["stride"], a["padding"], a["dilation"])


def _avg_pool2d(op: Op, x: list[Any], w: Mapping[str, Tensor], _: Values) -> Tensor:
    a = op.attributes
    return F.avg_pool2d(x[0], a["kernel"], a["stride"], a["padding"], False, a["count_include_pad"])


def _adaptive_avg_pool2d(op: Op, x: list[Any], w: Mapping[str, Tensor], _: Values) -> Tensor:
    output, extents = op.attributes["output"], x[0].shape[-2:]
    if any(type(extent) is not int or extent % parts for extent, parts in zip(extents, output, strict=True)):
        return F.adaptive_avg_pool2d(x[0], output)
    kernel = [extent // parts for extent, parts in zip(extents, output, strict=True)]
    same: Tensor = x[0]
    return same if kernel == [1, 1] else F.avg_pool2d(same, kernel)


def _global_avg_pool(op: Op, x: list[Any], w: Mapping[str, Tensor], _: Values) -> Tensor:
    mean: Tensor = x[0].mean((2, 3), keepdim=op.attributes["keepdim"])
    return mean


def _activation(op: Op, x: list[Any], w: Mapping[str, Tensor], _: Values) -> Tensor:
    return activate(x[0], op.attributes["name"])


def _add(op: Op, x: list[Any], w: Mapping[str, Tensor], _: Values) -> Tensor:
    return activate(x[0] + x[1], op.activation)


def _layer_norm(op: Op, x: list[Any], w: Mapping[str, Tensor], _: Values) -> Tensor:
    return F.layer_norm(x[0], (op.attributes["size"],), w.get("weight"), w.get("bias"), op.attributes["eps"])


def _attention(op: Op, x: list[Any], w: Mapping[str, Tensor], _: Values) -> Tensor:
    return F.scaled_dot_product_attention(x[0], x[1], x[2], scale=op.attributes["scale"])


def _recurrent(op: Op, x: list[Any], w: Mapping[str, Tensor], _: Values) -> Tensor:
    a = op.attributes
    cell, units, gates = a["cell"], a["units"], GATES[a["cell"]]
    given, weight, bias = x[0], w["weight"], w.get("bias")
    hidden = weight.shape[1]
    lead = (2 if cell == "lstm" else 1, *given.shape[:2])
    if given.is_meta:
        return torch.empty((*lead, hidden), dtype=given.dtype, device=given.device)
    if a["interleaved"]:
        given = given.unflatten(-1, (-1, gates)).transpose(-1, -2).flatten(-2)
        weight, bias = by_gate(weight, gates), None if bias is None else by_gate(bias, gates)
    live = weight if units is None else weight[:, units]
    keep = 0 if units is not None and a["keep"] >= len(units) else a["keep"]
    states = run_steps(
        given, lambda state: F.linear(state, live, bias), *[*x[1:], None, None][:2], cell=cell,
        time_first=a["time_first"], reverse=a["reverse"], threshold=a["threshold"], keep=keep,
    )  # fmt: skip
    if units is None:
        return states
    whole: Tensor = states.new_zeros((*lead, hidden))
    whole[..., units] = states
    return whole


def _reshape(op: Op, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
    reshaped: Tensor = x[0].reshape(aten.decode(op.attributes["shape"], values))
    return reshaped


def _scalar(op: Op, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Any:
    a, b = (values[each] if isinstance(each, str) else each for each in op.attributes["args"])
    return SCALARS[op.attributes["fn"]](a, b)


def _torch(op: Op, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Any:
    a = op.attributes
    return aten.call(a["op"], a["args"], a["kwargs"], values, a.get("item"))


KEEPS_ZERO = ("relu", "relu6", "silu", "gelu", "gelu_tanh", "tanh", "hardswish")
"""Activations of which zero is zero."""

PACKED = ("conv2d", "gated_conv2d", "linear", "recurrent")
"""The kinds whose weight is packed."""


def residual_of(op: Op) -> str | None:
    """The value that a convolution or Linear adds to its result."""
    operands = 1 + sum(op.attributes.get(key, False) for key in ("gate", "live"))
    return op.inputs[operands] if len(op.inputs) > operands else None


SCALARS: Mapping[str, Callable[[Any, Any], Any]] = {  # of integers, symbolic ones while torch.export traces
    "size": lambda x, axis: x.shape[axis],
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "sub": lambda a, b: a - b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "max": lambda a, b: max(a, b),
    "min": lambda a, b: min(a, b),
}

Evaluate = Callable[[Op, list[Any], Mapping[str, Tensor], Values], Any]
"""(operation, its inputs, its weights by role, every value so far) -> its output."""

KINDS: Mapping[str, Evaluate] = {
    "conv2d": _conv2d,
    "gate": _gate,
    "scale": _scale,
    "gated_conv2d": _gated_conv2d,
    "linear": _linear,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "global_avg_pool": _global_avg_pool,
    "activation": _activation,
    "add": _add,
    "layer_norm": _layer_norm,
    "attention": _attention,
    "recurrent": _recurrent,
    "reshape": _reshape,
    "scalar": _scalar,
    "torch": _torch,
}


class _Both(Mapping[str, Any]):
    """Values, and constants behind them."""

    def __init__(self, values: Values, constants: Values) -> None:
        self.values_, self.constants = values, constants

    def __getitem__(self, name: str) -> Any:
        return self.values_[name] if name in self.values_ else self.constants[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*self.values_, *self.constants))

    def __len__(self) -> int:
        return len(self.values_) + len(self.constants)


def evaluate_op(op: Op, values: Values, constants: Mapping[str, Tensor]) -> Any:
    """The output of one operation by torch's own functions, given the values so far; works on meta tensors too."""
    both = _Both(values, constants)
    weights = {role: constants[name] for role, name in op.tensors.items()}
    return KINDS[op.kind](op, [both[name] for name in op.inputs], weights, both)


def reference(graph: Graph, inputs: tuple[Tensor, ...]) -> Any:
    """Runs a whole graph by torch's own functions: what every other way of running it is compared with."""
    values: dict[str, Any] = {each.name: x for each, x in zip(graph.inputs, inputs, strict=True)}
    for op in graph.ops:
        values[op.output] = evaluate_op(op, values, graph.constants)
    return build_outputs(graph.outputs, _Both(values, graph.constants))
