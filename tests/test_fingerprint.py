"""Fingerprints: equal for what is the same, different for what is not, and harmless to whatever is met."""

from __future__ import annotations

import array
import collections
import datetime
import fractions
import functools
import importlib
import logging
import random
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from autoprune.identity.fingerprint import (
    architecture_fingerprint,
    fingerprint,
    function_fingerprints,
    model_fingerprints,
)


def function(source: str) -> Any:
    space: dict[str, Any] = {"torch": torch, "__name__": "a_module_of_the_users"}
    exec(source, space)  # noqa: S102 - sources of these tests
    return space["f"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("def f(m): return 0.5", "def f(m): return 0.6"),
        ("def f(m): return m.sum()", "def f(m): return m.mean()"),
        ("def f(m, k=1): return k", "def f(m, k=2): return k"),
        ("def f(m, *, k=1): return k", "def f(m, *, k=2): return k"),
        ("def f(m): return (lambda: 1)()", "def f(m): return (lambda: 2)()"),
        ("def f(m): return m in {1, 2}", "def f(m): return m in {1, 3}"),
        ("def g(m): return 1\ndef f(m): return g(m)", "def g(m): return 2\ndef f(m): return g(m)"),
        ("K = 1\ndef f(m): return [K for _ in m]", "K = 2\ndef f(m): return [K for _ in m]"),
        (
            "class A:\n def g(s): return 1\ndef f(m): return A().g()",
            "class A:\n def g(s): return 2\ndef f(m): return A().g()",
        ),
        (
            "class A:\n K = 1\n def g(s): return s.K\ndef f(m): return A().g()",
            "class A:\n K = 2\n def g(s): return s.K\ndef f(m): return A().g()",
        ),
        (
            "import types\nn = types.SimpleNamespace(k=1)\ndef f(m): return n.k",
            "import types\nn = types.SimpleNamespace(k=2)\ndef f(m): return n.k",
        ),
        (
            "import types\nu = types.ModuleType('u')\nu.k = 1\ndef f(m): return u.k",
            "import types\nu = types.ModuleType('u')\nu.k = 2\ndef f(m): return u.k",
        ),
        ("x = torch.ones(3)\ndef f(m): return x", "x = torch.ones(3).double()\ndef f(m): return x"),
        *(
            (source.replace("VALUE", "1"), source.replace("VALUE", "2"))
            for source in (
                "class A:\n @torch.no_grad()\n def __call__(s, m): return VALUE\nf = A()",
                "class A:\n @torch.no_grad()\n def g(s): return VALUE\n def __call__(s, m): return s.g()\nf = A()",
                "class A:\n def g(s): return VALUE\n def h(s, m): return s.g()\nf = A().h",
                "class A:\n @torch.autocast('cpu')\n def g(s): return VALUE\ndef f(m): return A().g()",
                "class A:\n K = VALUE\ndef f(m): return A.K",
                "class A:\n def __init__(s): s.k = VALUE\ndef f(m): return A().k",
                "from functools import *\nclass A:\n @cached_property\n def k(s): return VALUE\n"
                " def __call__(s, m): return s.k\nf = A()",
                "from functools import *\nclass A:\n def g(s, k): return k\n h = partialmethod(g, VALUE)\n"
                " def __call__(s, m): return s.h()\nf = A()",
                "import enum\nclass A(enum.Enum):\n K = VALUE\ndef f(m): return A.K.value",
                "class A(list): pass\na = A()\na.k = VALUE\ndef f(m): return a.k",
                "class A(dict): pass\na = A()\na.k = VALUE\ndef f(m): return a.k",
                "class A(float):\n def g(s): return VALUE\na = A(1.0)\ndef f(m): return a.g()",
                "class A:\n __slots__ = 'k'\na = A()\na.k = VALUE\ndef f(m): return a.k",
                "class A: pass\na = A()\na.k_1 = VALUE\ndef f(m): return sum(getattr(a, f'k_{i}') for i in m)",
                "K = VALUE\ndef f(m): return globals()['K']",
                "def f(m): return f.k\nf.k = VALUE",
            )
        ),
    ],
)
def test_functions_differ_by_what_they_do_and_read(one: str, other: str) -> None:
    assert function_fingerprints(function(one)) == function_fingerprints(function(one))
    assert function_fingerprints(function(one)) != function_fingerprints(function(other))


@pytest.mark.parametrize(
    "same",
    [
        "# a comment\n\n\ndef f(m):\n\n    return m + 1",
        "def another_name(m): return m + 1\nf = another_name",
        "UNUSED = 5\ndef f(m): return m + 1",
    ],
)
def test_functions_are_the_same_wherever_they_stand(same: str) -> None:
    assert function_fingerprints(function(same)) == function_fingerprints(function("def f(m): return m + 1"))


def reading(value: Any) -> Callable[..., Any]:
    return lambda: value


DATA = TensorDataset(torch.arange(6.0))


@pytest.mark.parametrize(
    "make",
    [
        lambda k: collections.deque([k]),
        lambda k: collections.UserDict({"k": k}),
        lambda k: {k: 1}.keys(),
        lambda k: Decimal(k),
        lambda k: fractions.Fraction(k, 7),
        lambda k: datetime.date(2020, k, 1),
        lambda k: re.compile(str(k)),
        lambda k: bytearray([k]),
        lambda k: memoryview(bytes([k])),
        lambda k: array.array("f", [k]),
        lambda k: {"k": k}.get,
        lambda k: torch.distributions.Normal(0.0, float(k)),
        lambda k: LogisticRegression(C=k).fit([[0.0], [1.0]], [0, 1]),
        lambda k: LogisticRegression().fit([[0.0], [k]], [0, 1]).predict,
        lambda k: DataLoader(DATA, sampler=[0, k]),
        lambda k: DataLoader(DATA, batch_sampler=[[0, k]]),
        lambda k: DataLoader(DATA, shuffle=k == 1),
        lambda k: DataLoader(DATA, collate_fn=reading(k)),
        lambda k: DataLoader(Subset(DATA, [k])),
    ],
)
def test_objects_of_installed_classes_are_known_by_what_they_hold(make: Callable[[int], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert function_fingerprints(reading(make(1))) == function_fingerprints(reading(make(1)))
        assert function_fingerprints(reading(make(1))) != function_fingerprints(reading(make(2)))
        assert fingerprint([make(1)]) != fingerprint([make(2)])


class Bar:
    """Of a library: how far something is, since when, and where that is shown."""

    def __init__(self, started: float) -> None:
        self.started, self.shown_at = started, sys.stderr


Bar.__module__ = "sklearn"


def test_what_goes_on_by_itself_is_known_by_its_type() -> None:
    for one, other in (
        (Bar(1.0), Bar(2.0)),
        (random.Random(1), random.Random(2)),
        (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
        (np.random.default_rng(1), np.random.default_rng(2)),
        (iter([1]), iter([2])),
    ):
        assert fingerprint([one]) == fingerprint([other])


class Guarded:
    """Raises when a library's way of copying would run its code."""

    def __init__(self, k: int) -> None:
        self.k = k

    def told(self) -> int:
        return self.k

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AssertionError

    __getstate__ = __iter__ = __eq__ = __repr__ = __reduce_ex__  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


def test_no_code_of_a_user_runs() -> None:
    class Deque(collections.deque[int]):
        def __iter__(self) -> Any:
            raise AssertionError

    assert fingerprint([Guarded(1)]) != fingerprint([Guarded(2)])
    assert fingerprint(Deque()) == fingerprint(Deque())


def test_notes_that_no_code_reads_are_no_part_of_an_object() -> None:
    source = "class A: pass\na = A()\na.k, a.started = 1, @\ndef f(m): return a.k, getattr(a, 'x', 0)"
    assert function_fingerprints(function(source.replace("@", "1"))) == function_fingerprints(
        function(source.replace("@", "2"))
    )


@pytest.mark.parametrize("imported", [True, False])
def test_modules_of_a_users_package_are_followed(
    imported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = f"pieces_{imported}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    inner = tmp_path / package / "inner.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    within = [f"def f(m):\n from {package}.inner import h\n return h()"]
    within += [f"def f(m):\n import {package}.inner as q\n return q.K"]
    outside = [f"import {package}.inner\ndef f(m): return {package}.inner.{name}" for name in ("K", "h()")]

    def found(value: int) -> list[dict[str, str]]:
        inner.write_text(f"K = {value}\ndef h(): return {value}")
        importlib.invalidate_caches()
        for name in (f"{package}.inner", package):
            sys.modules.pop(name, None)
        if imported:
            importlib.import_module(f"{package}.inner")
        told = [function_fingerprints(function(source)) for source in (within + outside if imported else within)]
        assert imported == (package in sys.modules)
        return told

    one, same, other = found(1), found(1), found(2)
    assert one == same
    assert all(a != b for a, b in zip(one, other, strict=True))


def tensors() -> list[Tensor]:
    ones = torch.ones(2, 3)
    return [
        ones, ones.double(), ones.T, ones.reshape(-1), torch._neg_view(ones), ones.bool(), ones.bfloat16(), ones[:, :0],
        torch.tensor(1.0), ones.to_sparse(), ones.to("meta"),
        torch.ones(3, dtype=torch.complex64).mul(1j).conj(), torch.ones(3, dtype=torch.complex64).mul(1j),
    ]  # fmt: skip


def test_tensors_are_known_by_type_shape_and_values() -> None:
    assert [fingerprint(x) for x in tensors()] == [fingerprint(x) for x in tensors()]
    assert len({fingerprint(x) for x in tensors()}) == len(tensors())
    assert fingerprint(torch.eye(4)[:, ::2]) == fingerprint(torch.eye(4)[:, ::2].contiguous())


class Lazy:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __call__(self, model: nn.Module) -> float:
        return 1.0


def test_nothing_that_is_met_does_harm() -> None:
    around: dict[str, Any] = {}
    around["itself"] = around
    deep: list[Any] = []
    for _ in range(3000):
        deep = [deep]
    odd = [around, deep, threading.Lock(), logging.getLogger("x"), sys.stdout, random.Random(0), iter([1]), object()]
    odd += [np.random.default_rng(), torch.Generator(), np.array([None, 1], dtype=object), range(3), ..., Lazy()]
    assert fingerprint(odd) == fingerprint(odd)
    for each in (Lazy(), max, functools.lru_cache(len), nn.CrossEntropyLoss, torch.relu):
        assert function_fingerprints(each)


def recursive(n: int) -> int:
    return recursive(n - 1) if n else len(str(torch.ones(n)))


def test_a_function_may_read_itself() -> None:
    assert function_fingerprints(recursive) == function_fingerprints(recursive)


class Shared(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.load_state_dict(self.a.state_dict())
        if tied:
            self.b.weight = self.a.weight


def test_weights_that_are_shared_are_not_those_that_are_merely_equal() -> None:
    torch.manual_seed(0)
    tied = model_fingerprints(Shared(True))
    torch.manual_seed(0)
    equal = model_fingerprints(Shared(False))
    assert [name for name in tied["weights"] if tied["weights"][name] != equal["weights"][name]] == ["b.weight"]


def test_an_architecture_is_the_same_whatever_its_weights() -> None:
    def built(act: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), act, nn.LSTM(4, 4), nn.BatchNorm1d(4))

    assert architecture_fingerprint(built(nn.ReLU())) == architecture_fingerprint(built(nn.ReLU()))
    kinds = [nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)]
    assert len({architecture_fingerprint(built(kind)) for kind in kinds}) == len(kinds)
    traced = [torch.fx.symbolic_trace(built(kind)[:2]) for kind in (nn.ReLU(), nn.Tanh())]  # type: ignore[index]
    assert architecture_fingerprint(traced[0]) != architecture_fingerprint(traced[1])


class Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(2, 2), scale
        self.scale_0 = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def scaled(block: Any, x: Tensor) -> Tensor:
    return block(x) * block.scale  # type: ignore[no-any-return]


class OfAChild(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[0](x) * self[0].scale  # type: ignore[no-any-return]


class ByAHelper(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return scaled(self[0], x)


class ByNumber(nn.Sequential):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return sum(getattr(self[0], f"scale_{i}") for i in range(1)) * x  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [OfAChild, ByAHelper, ByNumber])
def test_attributes_count_whoever_reads_them(kind: type[nn.Module]) -> None:
    assert architecture_fingerprint(kind(Block(1.0))) == architecture_fingerprint(kind(Block(1.0)))
    assert architecture_fingerprint(kind(Block(1.0))) != architecture_fingerprint(kind(Block(2.0)))
    assert architecture_fingerprint(Block(1.0)) == architecture_fingerprint(Block(2.0))


def test_a_forward_of_an_objects_own_counts() -> None:
    def replaced(scale: float) -> nn.Module:
        model = nn.Sequential(nn.ReLU())
        forward = model.forward
        model.forward = lambda x: forward(x) * scale  # type: ignore[method-assign, no-untyped-call]
        return model

    assert architecture_fingerprint(replaced(1.0)) == architecture_fingerprint(replaced(1.0))
    assert architecture_fingerprint(replaced(1.0)) != architecture_fingerprint(replaced(2.0))


@pytest.mark.slow
def test_sets_and_dictionaries_are_the_same_under_any_hash_seed() -> None:
    code = (
        "from autoprune.identity.fingerprint import fingerprint, function_fingerprints as of\n"
        "words = {'a', 'b', 'c', 'd', 'e'}\n"
        "class Node:\n"
        "    def __init__(self, name): self.name, self.others = name, set()\n"
        "nodes = {Node(w) for w in words}\n"
        "for node in nodes: node.others |= nodes\n"
        "def f(x): return x in {'p', 'q', 'r', 's'} or x in words or nodes\n"
        "print(fingerprint([words, dict.fromkeys(words), {frozenset(words): 1}]), fingerprint(nodes), of(f))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
