"""Inputs that are one object, share memory, carry flags or have chance extents: each stays an input of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.latency.engines import ENGINES
from autoprune.latency.engines.export import OnnxEngine
from autoprune.repack import ProgramModel, export_onnx, load, repack, save
from autoprune.repack.probes import agrees, probes

Inputs = tuple[Tensor, ...]


class Gate(nn.Module):
    """Two features, one of which gates the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return cast("Tensor", self.left(a) * self.right(b).sigmoid())


class Cell(nn.Module):
    """An LSTM whose states come from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(6, 4, batch_first=True)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return cast("Tensor", self.cell(x, (h, c))[0])


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cast("Tensor", self.heads(q, k, v)[0])


class Ids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(9, 4), nn.Embedding(7, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, words: Tensor, kinds: Tensor) -> Tensor:
        return cast("Tensor", self.out(self.words(words) + self.kinds(kinds)))


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def one_object() -> Inputs:
    x = drawn(3, 6)
    return x, x


def overlapping() -> Inputs:
    storage = drawn(5, 6)
    return storage[:3], storage[2:]


def made_for_inference() -> Inputs:
    with torch.inference_mode():
        x = drawn(3, 6)
    return x, x


GATED: dict[str, Callable[[], Inputs]] = {
    "one object": one_object,
    "views of one storage": overlapping,
    "expanded": lambda: (drawn(1, 6).expand(3, 6), drawn(3, 1).expand(3, 6)),
    "negated by a flag": lambda: (torch._neg_view(drawn(3, 6)), torch._neg_view(drawn(3, 7)[:, 1:])),
    "not contiguous": lambda: (drawn(6, 3).t(), drawn(3, 12)[:, ::2]),
    "with gradients": lambda: (drawn(3, 6).requires_grad_(), drawn(3, 6).requires_grad_()),
    "parameters": lambda: (nn.Parameter(drawn(3, 6)),) * 2,
    "made for inference": made_for_inference,
}


@pytest.mark.parametrize("name", GATED)
def test_each_input_is_one_of_its_own(name: str, tmp_path: Path) -> None:
    model, example = Gate().eval(), GATED[name]()
    fast = repack(model, example, form="program")
    assert isinstance(fast, ProgramModel)
    save(fast, tmp_path / "gate.packed")
    loaded = load(tmp_path / "gate.packed")
    for given in (example, example[::-1], (drawn(3, 6), torch._neg_view(drawn(3, 9)[:, :6])), (drawn(2, 6),) * 2):
        with torch.no_grad():
            wanted = model(*given)
            for got in (fast(*given), loaded(*given), fast.bind(*given)()):
                torch.testing.assert_close(got, wanted)


def zeros_twice() -> tuple[nn.Module, Inputs, Inputs]:
    zeros = torch.zeros(1, 3, 4)
    return Cell(), (drawn(3, 5, 6), zeros, zeros), (drawn(3, 5, 6), drawn(1, 3, 4), drawn(1, 4, 3).mT)


def attention_to_itself() -> tuple[nn.Module, Inputs, Inputs]:
    x = drawn(2, 5, 6)
    return Attend(), (x, x, x), (drawn(2, 5, 6), drawn(2, 6, 6)[:, 1:], drawn(2, 7, 6)[:, 2:])


def ids_twice() -> tuple[nn.Module, Inputs, Inputs]:
    ids = torch.zeros(2, 5, dtype=torch.int64)
    return Ids(), (ids, ids), (torch.arange(8).reshape(2, 4).repeat(1, 2)[:, :5], torch.arange(10).reshape(2, 5) % 7)


@pytest.mark.parametrize("made", [zeros_twice, attention_to_itself, ids_twice])
@pytest.mark.parametrize("form", ["program", "modules"])
def test_examples_that_are_one_tensor_stay_several_inputs(
    made: Callable[[], tuple[nn.Module, Inputs, Inputs]], form: Any
) -> None:
    model, example, given = made()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(repack(model, example, form=form)(*given), model(*given))


def test_a_dense_engine_and_an_exported_file_take_two_inputs_for_one_object(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    engine = ENGINES.get("onnxruntime")()
    assert isinstance(engine, OnnxEngine)
    model, example = Gate().eval(), one_object()
    other = drawn(3, 6), torch._neg_view(drawn(3, 9)[:, :6])
    export_onnx(model, example, tmp_path / "gate.onnx")
    loaded, dense = engine.load(tmp_path / "gate.onnx", other, 1), engine.prepare(model, example, 1)
    for call, given in ((loaded, other), (dense, example)):
        (got,) = cast("Any", call())
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), model(*given))


class Turned(nn.Module):
    """Torch negates and conjugates by flags between the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.out(torch._neg_view(x) + 1))


def test_flags_between_operators_keep_their_sign() -> None:
    model, x = Turned().eval(), drawn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(repack(model, x)(x), model(x))


class Wrapped(Tensor):
    """A tensor without memory."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...]) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, shape)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError("nothing may be computed")


def test_a_tensor_without_memory_is_refused() -> None:
    fast = repack(nn.Linear(4, 3), drawn(2, 4), form="program")
    with pytest.raises(AutopruneError, match="takes dense tensors, not Wrapped"):
        fast(Wrapped((2, 4)))


def test_the_check_draws_values_that_the_model_takes() -> None:
    ids, lengths = torch.tensor([[3, 3], [5, 5]]), torch.tensor([2, 1])
    mask, scores, ones = torch.zeros(2, 3, dtype=torch.bool), torch.tensor([[0.0, -torch.inf]]), torch.ones(2, 2)
    drawn_, turned, plain = probes((ids, lengths, mask, scores, ones, "text"))
    assert {3, 5} >= set(drawn_[0].flatten().tolist())
    assert drawn_[2].dtype == torch.bool
    assert not drawn_[2][:, 0].any()
    assert drawn_[3][0, 0] == 0
    assert 0.5 <= float(drawn_[4].min()) < float(drawn_[4].max()) <= 1.5
    assert turned[1].tolist() == [1, 2]
    assert plain[5] == "text"
    larger, *_ = probes((ids, ones), [(3, 2), (3, 4)])
    assert [tuple(x.shape) for x in larger] == [(3, 2), (3, 4)]


def test_what_differs_only_elsewhere_is_found() -> None:
    x = torch.full((2, 3), 2.0)
    example = (x, x)
    assert agrees(lambda a, b: a * b, lambda a, b: a * b, example)
    assert agrees(lambda a, b: a * b, lambda a, b: a * a, example) is False
    assert agrees(lambda a, b: a * b, lambda a, b: (a * b)[:2], example, [(3, 3), (3, 3)]) is False


def test_extents_that_the_model_refuses_are_told_apart() -> None:
    linear = nn.Linear(3, 2)
    assert agrees(linear, linear, (drawn(2, 3),), [(2, 4)]) is None
