"""Laws of every class of operations: its name and attributes in files, and its row in every table by class."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass
from typing import Annotated, Any

import pytest
from torch import Tensor

from autoprune.errors import FileError
from autoprune.repack.graph import demand
from autoprune.repack.graph.ops import OPS, LayerOp, Op, Values, op_from_json
from autoprune.repack.graph.ops.attributes import integer
from autoprune.repack.lowering import lower
from autoprune.repack.onnx import forms
from autoprune.repack.tuning import cache_model, layer_times

LAYERS: list[type[Op]] = [cls for cls in OPS.values() if issubclass(cls, LayerOp)]
TABLES: dict[str, tuple[Mapping[Any, Any], list[type[Op]]]] = {
    "lowering.lower.RULES": (lower.RULES, list(OPS.values())),
    "onnx.forms.MODULES": (forms.MODULES, list(OPS.values())),
    "graph.demand.PRODUCTS": (demand.PRODUCTS, list(OPS.values())),
    "tuning.layer_times.FLOPS": (layer_times.FLOPS, list(OPS.values())),
    "tuning.cache_model.ACCESSES": (cache_model.ACCESSES, LAYERS),
}
PAIR = {"stride": [2, 1], "padding": [1, 0]}
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "conv2d": {**PAIR, "dilation": [1, 2], "groups": 2, "activation": None, "layer": "body.0"},
    "gate": {"keep": 3},
    "scale": {},
    "gated_conv2d": {**PAIR, "dilation": [1, 1], "groups": 1, "activation": "relu", "gate": True, "live": False},
    "linear": {"activation": "gelu", "layer": ""},
    "max_pool2d": {**PAIR, "kernel": [3, 2], "dilation": [1, 1]},
    "avg_pool2d": {**PAIR, "kernel": [3, 2], "count_include_pad": True},
    "adaptive_avg_pool2d": {"output": [7, 7]},
    "global_avg_pool": {"keepdim": False},
    "activation": {"name": "tanh"},
    "add": {"activation": "relu6"},
    "quantize": {"scale": 0.5, "zero_point": 3},
    "layer_norm": {"size": 8, "eps": 1e-5},
    "rms_norm": {"eps": 1e-6},
    "rotary": {},
    "experts": {},
    "attention": {"scale": 1},
    "recurrent": {
        "cell": "lstm", "time_first": False, "reverse": True, "threshold": 0.0, "keep": 0, "units": [0, 2],
        "interleaved": True,
    },
    "reshape": {"shape": [{"ref": "n"}, -1, 4]},
    "scalar": {"fn": "add", "args": ["n", 1]},
    "torch": {"op": "aten.cat.default", "args": [[{"ref": "x"}, {"ref": "y"}], 1], "kwargs": {}, "item": 0},
}  # fmt: skip


@pytest.mark.parametrize("table", TABLES)
def test_every_class_has_a_row_in_every_table(table: str) -> None:
    rows, classes = TABLES[table]
    missing = [cls.__name__ for cls in classes if cls not in rows]
    assert not missing, f"{table} has no row for {', '.join(missing)}"
    unknown = [cls.__name__ for cls in rows if cls not in classes]
    assert not unknown, f"{table} has rows for {', '.join(unknown)}, which no graph holds"


def test_files_name_each_class_by_its_kind() -> None:
    assert {kind: cls.kind for kind, cls in OPS.items()} == {kind: kind for kind in OPS}
    assert len(set(OPS.values())) == len(OPS)


@pytest.mark.parametrize("kind", OPS)
def test_attributes_come_back_from_files_as_they_were(kind: str) -> None:
    written = ATTRIBUTES[kind]
    op = op_from_json(kind, "z", ("x", "y"), written, {"weight": "w"})
    assert type(op) is OPS[kind]
    assert json.dumps(op.attributes, sort_keys=True) == json.dumps(written, sort_keys=True)
    assert op_from_json(kind, op.output, op.inputs, op.attributes, op.tensors) == op
    with pytest.raises(FrozenInstanceError):
        op.output = "other"  # type: ignore[misc]


@pytest.mark.parametrize("kind", OPS)
def test_attributes_that_a_class_does_not_have_are_refused(kind: str) -> None:
    with pytest.raises(FileError, match="it takes"):
        op_from_json(kind, "z", ("x",), {**ATTRIBUTES[kind], "more": 1})
    for name in ATTRIBUTES[kind]:
        without = {key: value for key, value in ATTRIBUTES[kind].items() if key != name}
        if name not in ("layer", "item"):  # they may be missing
            with pytest.raises(FileError, match="it takes"):
                op_from_json(kind, "z", ("x",), without)
        else:
            assert op_from_json(kind, "z", ("x",), without).attributes == without
            with pytest.raises(FileError, match=f"has {name} = None"):
                op_from_json(kind, "z", ("x",), {**without, name: None})


@pytest.mark.parametrize("kind", OPS)
def test_an_operation_reads_what_its_input_is_replaced_by(kind: str) -> None:
    inputs = {"scalar": ("n",)}.get(kind, ("x", "y"))
    op = op_from_json(kind, "z", inputs, ATTRIBUTES[kind])
    for name in op.reads:
        other = op.with_input(name, "other")
        assert [each if each != "other" else name for each in other.reads] == list(op.reads)
        assert type(other) is type(op)


@dataclass(frozen=True, kw_only=True)
class Rounded(Op):
    """A class with an attribute that came later."""

    kind = "rounded"

    bits: Annotated[int, integer(2, 32)] = 32

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Any:
        return x[0]


def test_a_default_is_left_out_of_files() -> None:
    assert Rounded("y", ("x",)).attributes == {}
    assert Rounded.from_json("y", ("x",), {}, {}) == Rounded("y", ("x",))
    assert Rounded("y", ("x",), bits=8).attributes == {"bits": 8}
    Rounded("y", ("x",), bits=8).check({})
    with pytest.raises(FileError, match="bits = None"):
        Rounded.from_json("y", ("x",), {"bits": None}, {}).check({})


@dataclass(frozen=True, kw_only=True)
class Unchecked(Rounded):
    """A class with an attribute that files could give any value."""

    kind = "unchecked"

    mode: str


def test_an_attribute_without_a_check_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Unchecked\.mode has no check"):
        Unchecked.from_json("y", ("x",), {"mode": "up"}, {})
