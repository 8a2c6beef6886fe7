"""Whether a graph that came from a file is well formed: every type, range and shape that native code relies on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from autoprune.errors import FileError
from autoprune.model.recurrent.names import GATES
from autoprune.repack.graph import aten, extents
from autoprune.repack.graph.ir import Graph, Input, Op
from autoprune.repack.graph.reference import ACTIVATIONS, SCALARS

LARGEST = 2**31 - 1  # of any extent, stride or padding

Check = Callable[[Any], bool]


def _integer(low: int, high: int = LARGEST) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _pair(low: int) -> Check:
    fits = _integer(low)
    return lambda value: isinstance(value, list) and len(value) == 2 and all(map(fits, value))


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _activation(value: Any) -> bool:
    return value is None or _named_activation(value)


def _named_activation(value: Any) -> bool:
    return isinstance(value, str) and value in ACTIVATIONS


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _extents(value: Any) -> bool:
    """Of a reshape: integers (-1 for the one that follows from the rest) and references."""

    def fine(extent: Any) -> bool:
        return _integer(-1)(extent) or (isinstance(extent, dict) and len(extent) == 1 and _text(extent.get("ref")))

    return isinstance(value, list) and all(map(fine, value)) and value.count(-1) <= 1


def _places(value: Any) -> bool:
    """None, or integers >= 0 that rise."""
    if value is None:
        return True
    numbers = isinstance(value, list) and bool(value) and all(map(_integer(0), value))
    return numbers and all(before < after for before, after in itertools.pairwise(value))


def _scalar_args(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_text(x) or _integer(-LARGEST)(x) for x in value)


@dataclass(frozen=True)
class Schema:
    """What one kind of operation must look like.

    Attributes:
        inputs: how many at least and at most.
        attributes: all of them, and what each must satisfy.
        optional: attributes that may be missing.
        tensors: role -> (axes, whether it must be there).
    """

    inputs: tuple[int, int]
    attributes: Mapping[str, Check] = field(default_factory=dict)
    optional: Mapping[str, Check] = field(default_factory=dict)
    tensors: Mapping[str, tuple[int, bool]] = field(default_factory=dict)


_GEOMETRY = {"stride": _pair(1), "padding": _pair(0)}
SCHEMAS: Mapping[str, Schema] = {
    "conv2d": Schema(
        (1, 2),
        {**_GEOMETRY, "dilation": _pair(1), "groups": _integer(1), "activation": _activation},
        {"layer": _text},
        {"weight": (4, True), "bias": (1, False)},
    ),
    "gate": Schema(
        (1, 1), {"keep": _integer(0)}, tensors={"weight": (2, True), "bias": (1, True), "threshold": (1, True)}
    ),
    "scale": Schema((2, 2)),
    "gated_conv2d": Schema(
        (2, 4),
        {
            **_GEOMETRY,
            "dilation": _pair(1),
            "groups": _integer(1, 1),
            "activation": _activation,
            "gate": _flag,
            "live": _flag,
        },
        {"layer": _text},
        {"weight": (4, True), "bias": (1, False)},
    ),
    "linear": Schema((1, 2), {"activation": _activation}, {"layer": _text}, {"weight": (2, True), "bias": (1, False)}),
    "max_pool2d": Schema((1, 1), {**_GEOMETRY, "kernel": _pair(1), "dilation": _pair(1)}),
    "avg_pool2d": Schema((1, 1), {**_GEOMETRY, "kernel": _pair(1), "count_include_pad": _flag}),
    "adaptive_avg_pool2d": Schema((1, 1), {"output": _pair(1)}),
    "global_avg_pool": Schema((1, 1), {"keepdim": _flag}),
    "activation": Schema((1, 1), {"name": _named_activation}),
    "add": Schema((2, 2), {"activation": _activation}),
    "layer_norm": Schema(
        (1, 1), {"size": _integer(1), "eps": _number}, tensors={"weight": (1, False), "bias": (1, False)}
    ),
    "attention": Schema((3, 3), {"scale": _number}),
    "recurrent": Schema(
        (1, 3),
        {
            "cell": lambda cell: _text(cell) and cell in GATES,
            "time_first": _flag,
            "reverse": _flag,
            "threshold": lambda threshold: _number(threshold) and 0.0 <= threshold <= LARGEST,
            "keep": _integer(0),
            "units": _places,
            "interleaved": _flag,
        },
        {"layer": _text},
        {"weight": (2, True), "bias": (1, False)},
    ),
    "reshape": Schema((1, 1), {"shape": _extents}),
    "scalar": Schema((0, 2), {"fn": lambda fn: _text(fn) and fn in SCALARS, "args": _scalar_args}),
    "torch": Schema(
        (0, LARGEST),
        {"op": _text, "args": lambda args: isinstance(args, list), "kwargs": lambda kwargs: isinstance(kwargs, dict)},
        {"item": _integer(0)},
    ),
}


def check_op(op: Op, constants: Mapping[str, Tensor]) -> None:
    """Raises FileError unless the operation fits its kind's schema and its weights fit each other."""
    schema = SCHEMAS.get(op.kind)
    if schema is None:
        raise FileError(f"the graph holds an operation of the unknown kind {op.kind!r}.")
    what = f"the operation {op.output!r} ({op.kind})"
    if (
        not all(isinstance(name, str) for name in op.inputs)
        or not schema.inputs[0] <= len(op.inputs) <= schema.inputs[1]
    ):
        raise FileError(f"{what} has the inputs {list(op.inputs)!r}.")
    _check_attributes(op, schema, what)
    _check_tensors(op, schema, constants, what)
    if op.kind in _MORE:
        _MORE[op.kind](op, constants, what)


def _check_attributes(op: Op, schema: Schema, what: str) -> None:
    allowed = {**schema.attributes, **schema.optional}
    missing = set(schema.attributes) - set(op.attributes)
    if missing or set(op.attributes) - set(allowed):
        raise FileError(f"{what} has the attributes {sorted(op.attributes)}; it takes {sorted(allowed)}.")
    for name, value in op.attributes.items():
        if not allowed[name](value):
            raise FileError(f"{what} has {name} = {value!r}.")


def _check_tensors(op: Op, schema: Schema, constants: Mapping[str, Tensor], what: str) -> None:
    missing = {role for role, (_, needed) in schema.tensors.items() if needed} - set(op.tensors)
    if missing or set(op.tensors) - set(schema.tensors):
        raise FileError(f"{what} has the weights {sorted(op.tensors)}; it takes {sorted(schema.tensors)}.")
    for role, name in op.tensors.items():
        if not isinstance(name, str) or name not in constants:
            raise FileError(f"{what} has the {role} {name!r}, which is missing.")
        tensor = constants[name]
        if tensor.ndim != schema.tensors[role][0] or not tensor.is_floating_point():
            raise FileError(f"{what} has a {role} of shape {tuple(tensor.shape)} and type {tensor.dtype}.")


def _check_layer(op: Op, constants: Mapping[str, Tensor], what: str) -> None:
    weight = constants[op.tensors["weight"]]
    bias = constants[op.tensors["bias"]] if "bias" in op.tensors else None
    if min(weight.shape) < 1 or (bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype)):
        raise FileError(f"{what} has a weight of shape {tuple(weight.shape)} and a bias that does not fit it.")
    if weight.shape[0] % op.attributes.get("groups", 1):
        raise FileError(f"{what} has {weight.shape[0]} filters in {op.attributes['groups']} groups.")


def _check_gate(op: Op, constants: Mapping[str, Tensor], what: str) -> None:
    weight, bias, threshold = (constants[op.tensors[role]] for role in ("weight", "bias", "threshold"))
    if min(weight.shape) < 1 or bias.shape != weight.shape[:1] or threshold.numel() != 1:
        raise FileError(f"{what} has a weight of shape {tuple(weight.shape)} and a bias that does not fit it.")
    if len({weight.dtype, bias.dtype, threshold.dtype}) > 1:
        raise FileError(f"{what} has weights of types that differ.")
    if op.attributes["keep"] > len(weight):
        raise FileError(f"{what} keeps {op.attributes['keep']} of {len(weight)} groups.")


def _check_gated(op: Op, constants: Mapping[str, Tensor], what: str) -> None:
    _check_layer(op, constants, what)
    operands = 1 + op.attributes["gate"] + op.attributes["live"]
    if operands == 1 or len(op.inputs) not in (operands, operands + 1):
        raise FileError(f"{what} has {len(op.inputs)} inputs.")


def _check_recurrent(op: Op, constants: Mapping[str, Tensor], what: str) -> None:
    _check_layer(op, constants, what)
    rows, hidden = constants[op.tensors["weight"]].shape
    cell, units = op.attributes["cell"], op.attributes["units"]
    live = hidden if units is None else len(units)
    if rows != GATES[cell] * live or (units is not None and units[-1] >= hidden):
        raise FileError(f"{what} has a weight of shape {(rows, hidden)} for {live} units of {hidden}.")
    if op.attributes["keep"] > hidden:
        raise FileError(f"{what} keeps {op.attributes['keep']} of {hidden} units.")
    if len(op.inputs) not in (1, 3 if cell == "lstm" else 2):
        raise FileError(f"{what} has {len(op.inputs)} inputs.")
    if units is not None and (len(op.inputs) > 1 or not op.attributes["interleaved"]):
        raise FileError(f"{what} leaves units out, and has a state to begin with or another order of its gates.")


def _check_layer_norm(op: Op, constants: Mapping[str, Tensor], what: str) -> None:
    for role, name in op.tensors.items():
        if tuple(constants[name].shape) != (op.attributes["size"],):
            raise FileError(f"{what} has a {role} of {constants[name].numel()} for {op.attributes['size']} features.")


def _check_scalar(op: Op, constants: Mapping[str, Tensor], what: str) -> None:
    args = op.attributes["args"]
    if op.attributes["fn"] == "size" and not (_text(args[0]) and type(args[1]) is int):
        raise FileError(f"{what} takes the size of {args!r}.")
    if op.inputs != tuple(dict.fromkeys(x for x in args if isinstance(x, str))):
        raise FileError(f"{what} has the inputs {list(op.inputs)!r} for the arguments {args!r}.")


def _check_pool(op: Op, constants: Mapping[str, Tensor], what: str) -> None:
    sizes = zip(op.attributes["kernel"], op.attributes["padding"], strict=True)
    if any(2 * padding > kernel for kernel, padding in sizes):
        raise FileError(f"{what} pads more than half its kernel.")


def _check_torch(op: Op, constants: Mapping[str, Tensor], what: str) -> None:
    name, args, kwargs = (op.attributes[key] for key in ("op", "args", "kwargs"))
    aten.check_encoded(args, what)
    for key, value in kwargs.items():
        if not isinstance(key, str):
            raise FileError(f"{what} holds the argument {key!r}.")
        aten.check_encoded(value, what)
    if op.inputs != tuple(dict.fromkeys(aten.references([args, list(kwargs.values())]))):
        raise FileError(f"{what} has the inputs {list(op.inputs)!r} for other arguments.")
    aten.check_arguments(name, args, kwargs, what)


_MORE: Mapping[str, Callable[[Op, Mapping[str, Tensor], str], None]] = {
    "conv2d": _check_layer,
    "gate": _check_gate,
    "gated_conv2d": _check_gated,
    "linear": _check_layer,
    "recurrent": _check_recurrent,
    "layer_norm": _check_layer_norm,
    "scalar": _check_scalar,
    "max_pool2d": _check_pool,
    "avg_pool2d": _check_pool,
    "torch": _check_torch,
}


def check_input(given: Input) -> None:
    """Raises FileError unless it has a name, a shape and a known type."""
    if not isinstance(given.name, str) or not all(map(_integer(0), given.shape)):
        raise FileError(f"the input {given.name!r} has the shape {given.shape!r}.")
    if len(given.free) > len(given.shape) or not all(n is None or _integer(0)(n) for n in given.free):
        raise FileError(f"the input {given.name!r} has the free extents {list(given.free)!r}.")
    aten.decode_dtype(given.dtype)


def check_outputs(outputs: Any) -> None:
    """Raises FileError unless the structure is one that `Graph.outputs` describes."""
    if outputs is None or isinstance(outputs, (str, bool)) or _number(outputs):
        return
    if isinstance(outputs, dict) and len(outputs) == 1:
        ((tag, content),) = outputs.items()
        if tag == "text" and _text(content):
            return
        if tag in ("tuple", "list") and isinstance(content, list):
            for each in content:
                check_outputs(each)
            return
        if tag in ("dict", "ordered", "record") and isinstance(content, list):
            keys = (str,) if tag == "record" else (str, int)
            if not all(isinstance(x, list) and len(x) == 2 and type(x[0]) in keys for x in content):
                raise FileError(f"the graph returns a dictionary of {content!r}.")
            if len({key for key, _ in content}) < len(content):
                raise FileError(f"the graph returns a dictionary with a key given twice: {content!r}.")
            for _, each in content:
                check_outputs(each)
            return
    raise FileError(f"the graph returns {outputs!r}.")


def define(name: Any, known: set[str]) -> None:
    """Adds a name; raises FileError when it is taken or no name."""
    if not isinstance(name, str) or not name or name in known:
        raise FileError(f"the graph defines {name!r} twice, or it is no name.")
    known.add(name)


def fields(data: Any, types: Mapping[str, type], what: str) -> dict[str, Any]:
    """Returns `data`; raises FileError unless it is an object with exactly these fields of these types."""
    if not isinstance(data, dict) or set(data) != set(types):
        raise FileError(f"{what} must be an object with the fields {sorted(types)}.")
    for name, kind in types.items():
        if not isinstance(data[name], kind):
            raise FileError(f"the field {name!r} of {what} is {data[name]!r}.")
    return data


def validate(graph: Graph) -> Graph:
    """Returns it; raises FileError unless every name is defined before use and every operation well formed."""
    known = set(graph.constants)
    for each in graph.inputs:
        check_input(each)
        define(each.name, known)
    for op in graph.ops:
        check_op(op, graph.constants)
        for name in op.reads:
            if name not in known:
                raise FileError(f"{op.output!r} reads {name!r} before it is defined.")
        define(op.output, known)
    for condition in graph.conditions:
        extents.check(condition, extents.examples(graph.inputs))
    check_outputs(graph.outputs)
    for name in graph.output_names():
        if name not in known:
            raise FileError(f"the graph returns {name!r}, which is never defined.")
    return graph


def to_json(graph: Graph) -> dict[str, Any]:
    """Everything but the constants."""
    return {
        "inputs": [{**vars(each), "shape": list(each.shape), "free": list(each.free)} for each in graph.inputs],
        "ops": [
            {
                "kind": op.kind,
                "output": op.output,
                "inputs": list(op.inputs),
                "attributes": dict(op.attributes),
                "tensors": dict(op.tensors),
            }
            for op in graph.ops
        ],
        "outputs": graph.outputs,
        "conditions": list(graph.conditions),
    }


def from_json(data: Any, constants: Mapping[str, Tensor]) -> Graph:
    """Rebuilds and validates a graph; raises FileError when `data` is no graph."""
    types: dict[str, type] = {"inputs": list, "ops": list, "outputs": object, "conditions": list}
    top = fields(data, types, "the graph")
    inputs = []
    for row in top["inputs"]:
        row = fields(row, {"name": str, "shape": list, "dtype": str, "free": list}, "an input")
        inputs.append(Input(row["name"], tuple(row["shape"]), row["dtype"], tuple(row["free"])))
    ops = []
    types = {"kind": str, "output": str, "inputs": list, "attributes": dict, "tensors": dict}
    for row in top["ops"]:
        row = fields(row, types, "an operation")
        ops.append(Op(row["kind"], row["output"], tuple(row["inputs"]), row["attributes"], row["tensors"]))
    try:
        return validate(Graph(tuple(inputs), tuple(ops), top["outputs"], dict(constants), tuple(top["conditions"])))
    except RecursionError:
        raise FileError("the graph is nested too deeply.") from None
