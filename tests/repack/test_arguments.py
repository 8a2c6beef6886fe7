"""What a file may give torch's operators: no number, and no value, for an element type or a memory format."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autoprune.errors import FileError
from autoprune.repack.graph.ops import Op, op_from_json

X, N, FLOAT32 = {"ref": "x"}, {"ref": "n"}, {"dtype": "float32"}


def torch_op(name: str, args: list[Any], kwargs: dict[str, Any] | None = None) -> Op:
    given = kwargs or {}
    reads = [each["ref"] for each in [*args, *given.values()] if isinstance(each, dict) and "ref" in each]
    return op_from_json("torch", "y", tuple(dict.fromkeys(reads)), {"op": name, "args": args, "kwargs": given})


@pytest.mark.parametrize(
    "op",
    [
        torch_op("aten.softmax.int", [X, -1]),
        torch_op("aten.softmax.int", [X, -1, None]),
        torch_op("aten.softmax.int", [X, -1, FLOAT32]),
        torch_op("aten.softmax.int", [X, -1], {"dtype": FLOAT32}),
        torch_op("aten.sum.dim_IntList", [X, [1], False], {"dtype": FLOAT32}),
        torch_op("aten.full.default", [[2, N], 0.5], {"dtype": FLOAT32}),
    ],
)
def test_element_types_are_taken_by_name(op: Op) -> None:
    reads = ("n", *op.inputs) if op.attributes["op"] == "aten.full.default" else op.inputs
    replace(op, inputs=reads).check({})


@pytest.mark.parametrize(
    ("op", "argument"),
    [
        (torch_op("aten.softmax.int", [X, -1, 6]), "dtype"),  # 6 is torch's number for float32
        (torch_op("aten.softmax.int", [X, -1, N]), "dtype"),
        (torch_op("aten.softmax.int", [X, -1], {"dtype": 6}), "dtype"),
        (torch_op("aten.softmax.int", [X, FLOAT32]), "dim"),
        (torch_op("aten.sum.dim_IntList", [X, [1], False], {"dtype": N}), "dtype"),
        (torch_op("aten.contiguous.default", [X], {"memory_format": 0}), "memory_format"),
        (torch_op("aten.full.default", [[2], 0.5], {"layout": 0}), "layout"),
    ],
)
def test_numbers_and_values_are_refused(op: Op, argument: str) -> None:
    with pytest.raises(FileError, match=f"for '{argument}'"):
        op.check({})
