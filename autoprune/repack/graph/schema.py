"""Whether a graph that came from a file is well formed: every type, range and shape that native code relies on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from autoprune.errors import FileError
from autoprune.repack.graph import aten, extents
from autoprune.repack.graph.ir import Graph, Input
from autoprune.repack.graph.ops import Quantize, Recurrent, op_from_json
from autoprune.repack.graph.ops.attributes import integer, is_number


def check_input(given: Input) -> None:
    """Raises FileError unless it has a name, a shape and a known type."""
    if not isinstance(given.name, str) or not all(map(integer(0), given.shape)):
        raise FileError(f"the input {given.name!r} has the shape {given.shape!r}.")
    if len(given.free) > len(given.shape) or not all(n is None or integer(0)(n) for n in given.free):
        raise FileError(f"the input {given.name!r} has the free extents {list(given.free)!r}.")
    aten.decode_dtype(given.dtype)


def check_outputs(outputs: Any) -> None:
    """Raises FileError unless the structure is one that `Graph.outputs` describes."""
    if outputs is None or isinstance(outputs, (str, bool)) or is_number(outputs):
        return
    if isinstance(outputs, dict) and len(outputs) == 1:
        ((tag, content),) = outputs.items()
        if tag == "text" and isinstance(content, str):
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
        op.check(graph.constants)
        for name in op.reads:
            if name not in known:
                raise FileError(f"{op.output!r} reads {name!r} before it is defined.")
        define(op.output, known)
    _check_grids(graph)
    for condition in graph.conditions:
        extents.check(condition, extents.examples(graph.inputs))
    check_outputs(graph.outputs)
    for name in graph.output_names():
        if name not in known:
            raise FileError(f"the graph returns {name!r}, which is never defined.")
    return graph


def _check_grids(graph: Graph) -> None:
    """Raises FileError unless every layer with int8 weights reads a value on a grid, or makes its states be on one."""
    on_grid: set[str] = set()
    for op in graph.ops:
        if isinstance(op, Quantize) or (op.picks and op.inputs[0] in on_grid):
            on_grid.add(op.output)
        if "scale" in op.tensors and op.inputs[0] not in on_grid and not isinstance(op, Recurrent):
            raise FileError(f"{op.output!r} has int8 weights and reads {op.inputs[0]!r}, which lies on no grid.")


def to_json(graph: Graph) -> dict[str, Any]:
    """Everything but the constants."""
    return {
        "inputs": [{**vars(each), "shape": list(each.shape), "free": list(each.free)} for each in graph.inputs],
        "ops": [
            {
                "kind": op.kind,
                "output": op.output,
                "inputs": list(op.inputs),
                "attributes": op.attributes,
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
        inputs_of, about = tuple(row["inputs"]), row["attributes"]
        ops.append(op_from_json(row["kind"], row["output"], inputs_of, about, row["tensors"]))
    try:
        return validate(Graph(tuple(inputs), tuple(ops), top["outputs"], dict(constants), tuple(top["conditions"])))
    except RecursionError:
        raise FileError("the graph is nested too deeply.") from None
