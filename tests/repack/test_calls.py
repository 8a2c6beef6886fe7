"""Programs are called as their models are and return what they return: names, keywords, plain values, containers."""

from __future__ import annotations

import copy
import json
import pickle
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.errors import AutopruneError, FileError
from autoprune.model.arguments import Arguments
from autoprune.repack import ProgramModel, Record
from autoprune.repack.graph.calls import Signature
from autoprune.repack.outputs import same_output


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Answer:
    logits: Tensor
    hidden: Any = None
    note: str = "plain"


@dataclass(frozen=True)
class Frozen:
    logits: Tensor

    def __post_init__(self) -> None:
        assert self.logits.dim() == 2


@dataclass
class ModelOutput(OrderedDict[str, Any]):
    """As a well-known library has them: fields that are None are no keys."""

    logits: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for name in ("logits", "hidden"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)


class Capitals(Base):
    def forward(self, X: Tensor, Mask: Tensor, *, Scale: float | None = None) -> Tensor:
        y: Tensor = self.body(X) * Mask
        out: Tensor = self.head(y if Scale is None else y * Scale)
        return out


class Keywords(Base):
    def forward(
        self, *, ids: Tensor, mask: Tensor | None = None, as_dict: bool = True, mode: str = "mean"
    ) -> Tensor | dict[str, Any]:
        y = self.body(ids)
        out: Tensor = self.head(y if mask is None else y * mask)
        return {"logits": out, "mode": mode} if as_dict else out


class Nested(Base):
    def forward(self, batch: dict[str, Tensor], states: Any, pair: Pair) -> tuple[Tensor, Tensor]:
        return self.head(self.body(batch["x"]) + states[0] + pair.second), states[1]


class Free(Base):
    def forward(self, *xs: Tensor, **named: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(xs[0]) + xs[1] * named["weight"])
        return y


class Unread(Base):
    def forward(self, x: Tensor, unread: Tensor) -> Tensor:
        y: Tensor = self.head(x)
        return y


class Returning(Base):
    """Returns what `build` makes of two tensors and its input."""

    def __init__(self, build: Any) -> None:
        super().__init__()
        self.build = build
        self.register_buffer("numbers", torch.arange(3.0))

    def forward(self, x: Tensor) -> Any:
        return self.build(self, x, self.head(x), self.body(x))


def x(batch: int = 2, width: int = 16) -> Tensor:
    return torch.rand(batch, width) + 0.5


def program(model: nn.Module, inputs: Any) -> ProgramModel:
    fast = autoprune.repack(model.eval(), inputs, form="program")
    assert isinstance(fast, ProgramModel)
    return fast


def stored(fast: ProgramModel, folder: Path) -> Any:
    autoprune.save(fast, folder / "fast.safetensors")
    return autoprune.load(folder / "fast.safetensors")


CALLS: dict[str, tuple[type[Base], Any, list[Arguments]]] = {
    "capitals": (
        Capitals,
        (x(), x()),
        [Arguments(x(3), x(3)), Arguments(x(), Mask=x()), Arguments(Mask=x(), X=x()), Arguments(x(), x(), Scale=None)],
    ),
    "a mapping": (Capitals, {"Scale": 2.0, "Mask": x(), "X": x()}, [Arguments(x(), x(), Scale=2.0)]),
    "keywords alone": (
        Keywords,
        {"mask": x(), "ids": x()},
        [Arguments(ids=x(), mask=x()), Arguments(mask=x(3), mode="mean", ids=x(3), as_dict=True)],
    ),
    "plain values": (Keywords, {"ids": x(), "as_dict": False}, [Arguments(ids=x(), as_dict=False, mask=None)]),
    "a number of numpy's": (
        Keywords,
        {"ids": x(), "as_dict": np.bool_(False)},
        [Arguments(ids=x(), as_dict=False, mask=None), Arguments(ids=x(), as_dict=np.bool_(False))],
    ),
    "containers": (
        Nested,
        ({"x": x()}, (x(), x(2, 3)), Pair("text", x())),
        [
            Arguments({"x": x()}, (x(), x(2, 3)), Pair("text", x())),
            Arguments(pair=Pair("text", x()), states=[x(), x(2, 3)], batch=OrderedDict(x=x())),
        ],
    ),
    "any number": (Free, Arguments(x(), x(), weight=x(1)), [Arguments(x(), x(), weight=x(1))]),
    "an input that nothing reads": (Unread, (x(), x()), [Arguments(x(3), x(3)), Arguments(unread=x(), x=x())]),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_program_is_called_as_its_model_is(name: str, tmp_path: Path) -> None:
    build, inputs, calls = CALLS[name]
    model = build()
    fast = program(model, inputs)
    loaded = stored(fast, tmp_path)
    with torch.no_grad():
        for call in calls:
            expected = call.call(model)
            for each in (fast, loaded, copy.deepcopy(fast)):
                assert same_output(call.call(each), expected)
            assert same_output(fast.bind(*call.args, **call.kwargs)(), expected)


@pytest.mark.parametrize("name", CALLS)
def test_packed_layers_take_the_same_calls(name: str) -> None:
    build, inputs, calls = CALLS[name]
    model = build()
    fast = autoprune.repack(model.eval(), inputs, form="modules", choose=lambda *_: "jit")
    with torch.no_grad():
        for call in calls:
            assert same_output(call.call(fast), call.call(model))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: m(x()), "takes X, Mask, Scale, not <0>"),
        (lambda m: m(x(), x(), x()), "not <0>, <1>, <2>"),
        (lambda m: m(x(), mask=x()), "not <0>, mask"),
        (lambda m: m(x(), x(), X=x()), "not <0>, <1>, X"),
        (lambda m: m(x(), x(), Scale=2.0), "Scale is fixed in this program: None"),
        (lambda m: m(x(), 3.0), "Mask is a float, and was a tensor"),
    ],
)
def test_a_call_that_a_program_was_not_made_for_is_an_error(call: Any, told: str) -> None:
    with pytest.raises(AutopruneError, match=told):
        call(program(Capitals(), (x(), x())))


RETURNED: dict[str, Any] = {
    "named tuple": lambda m, x, y, z: Pair(y, [z, None]),
    "dataclass": lambda m, x, y, z: Answer(y, (z, {"a": y}), note="said"),
    "frozen dataclass": lambda m, x, y, z: Frozen(y),
    "model output": lambda m, x, y, z: ModelOutput(logits=y),
    "records inside": lambda m, x, y, z: {"a": Pair(Frozen(y), Answer(z)), "b": [Frozen(z)]},
    "ordered": lambda m, x, y, z: OrderedDict(b=y, a=(z, 2.5, "text", True)),
    "a size": lambda m, x, y, z: (y, y.shape),
    "a default": lambda m, x, y, z: defaultdict(list, a=y, b=OrderedDict(c=z, d=Frozen(y))),
    "numbered": lambda m, x, y, z: {0: y, 1: z},
    "torch's own": lambda m, x, y, z: y.max(1),
    "inputs and constants": lambda m, x, y, z: (x, m.numbers, y, x.shape[0], x),
}


@pytest.mark.parametrize("name", RETURNED)
def test_a_program_returns_what_its_model_returns(name: str, tmp_path: Path) -> None:
    model = Returning(RETURNED[name])
    fast = program(model, x())
    loaded = stored(fast, tmp_path)
    given = x(5)
    with torch.no_grad():
        expected, got = model.eval()(given), fast(given)
        assert same_output(got, expected)
        assert same_output(fast.bind(given)(), expected)
        assert same_output(plain(loaded(given)), plain(expected))


def plain(value: Any) -> Any:
    """Records, whatever their class, as dictionaries."""
    if isinstance(value, Record):
        return {name: plain(value[name]) for name in value.keys()}  # noqa: SIM118 - a tuple
    if isinstance(value, torch.Size):
        return {str(axis): extent for axis, extent in enumerate(value)}
    if isinstance(value, (Pair, torch.return_types.max)):
        names = getattr(value, "_fields", ("values", "indices"))
        return {name: plain(each) for name, each in zip(names, value, strict=True)}
    if isinstance(value, (Answer, Frozen)):
        return {name: plain(each) for name, each in vars(value).items()}
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, (tuple, list)) else value


class Named(nn.Module):
    """Its arguments are called like its own tensors, one of them in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(8, 8))
        self.masks = nn.Module()
        self.masks.register_buffer("0", torch.arange(8.0))

    def forward(self, x: Tensor, masks: list[Tensor]) -> Tensor:
        scale: Tensor = self.masks.get_buffer("0")
        return x @ self.x * scale + masks[0]


def test_arguments_may_be_called_like_the_models_own_tensors() -> None:
    model, call = Named().eval(), (torch.randn(2, 8), [torch.randn(2, 8)])
    fast = autoprune.repack(model, call, form="program")
    with torch.inference_mode():
        assert same_output(fast(*call), model(*call))


def test_a_record_is_read_as_its_class_was() -> None:
    record: Any = Record({"logits": 1, "hidden": None, "count": 3})
    logits, *rest = record
    assert (logits, rest) == (record.logits, [None, 3]) == (record["logits"], list(record[1:]))
    assert (record.count, record[-1], record.keys()) == (3, 3, ("logits", "hidden", "count"))
    assert repr(record) == "Record(logits=1, hidden=None, count=3)"
    assert pickle.loads(pickle.dumps(record)).hidden is None  # noqa: S301 - ours
    with pytest.raises(AttributeError, match="logits, hidden, count, not 'loss'"):
        _ = record.loss
    with pytest.raises(KeyError):
        _ = record["loss"]


@pytest.mark.parametrize(
    "row",
    [
        None,
        {},
        [[]],
        [["x", "either", "x", True], ["x", "either", None, True]],
        [["x", "elsewhere", "x", True]],
        [["x", "either", "x", 1]],
        [["x", "either", {"call": ["x"]}, True]],
        [["x", "either", "y", True]],
        [[3, "either", "x", True]],
    ],
)
def test_parameters_in_a_file_are_checked(row: Any) -> None:
    with pytest.raises(FileError):
        Signature.from_json(json.loads(json.dumps(row)), ["x"])


def test_a_file_of_a_model_called_by_keyword_takes_the_same_names(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    autoprune.export_onnx(Capitals().eval(), {"Mask": x(), "X": x(), "Scale": 0.5}, tmp_path / "model.onnx")
    assert [each.name for each in onnx.load(tmp_path / "model.onnx").graph.input] == ["X", "Mask"]
