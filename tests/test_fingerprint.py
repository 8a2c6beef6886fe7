"""Fingerprints: equal for what is the same, different for what is not, and harmless to whatever is met."""

from __future__ import annotations

import functools
import logging
import random
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

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


def test_sets_and_dictionaries_are_the_same_under_any_hash_seed() -> None:
    code = (
        "from autoprune.identity.fingerprint import fingerprint, function_fingerprints as of\n"
        "words = {'a', 'b', 'c', 'd', 'e'}\n"
        "def f(x): return x in {'p', 'q', 'r', 's'} or x in words\n"
        "print(fingerprint([words, dict.fromkeys(words), {frozenset(words): 1}]), of(f))"
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
