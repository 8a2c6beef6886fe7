"""RMS norm, GELU, rotary embedding as models write them: one operation each, native; nothing else is taken for them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autoprune.repack.graph.capture import capture
from autoprune.repack.graph.passes import simplify
from autoprune.repack.graph.reference import reference
from autoprune.repack.kernels.compiler import host
from autoprune.repack.runtime.program import Program
from tests.repack.test_kernels import assert_stays_inside
from tests.repack.test_native_ops import Run, assert_native, data, simplified, torch_steps
from tests.repack.test_token_kernels import target_of

FEATURES = 21
Function = Callable[["Written", Tensor], Tensor]


class Written(nn.Module):
    """A function of a Linear's result."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(8, FEATURES), function
        self.weight, self.scalar = nn.Parameter(data(FEATURES) + 1), nn.Parameter(data(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.linear(x))


def root(x: Tensor, eps: float = 1e-3) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


NORMS: dict[str, Function] = {
    "llama": lambda m, x: m.weight * (x.float() * root(x.float())).to(x.dtype),
    "without a weight": lambda m, x: x * root(x),
    "of a product": lambda m, x: (lambda y: root(y) * y * m.weight)(x * x),
    "squared by itself": lambda m, x: x * torch.rsqrt(1e-3 + (x * x).mean(-1, True)),
    "heads": lambda m, x: (lambda y: m.weight * (y * root(y)))(x[:, None]),
    "small": lambda m, x: (lambda y: y * root(y, 1e-6))(1e-3 * x),
}
GELUS: dict[str, Function] = {
    "gpt2": lambda m, x: gelu_new(x),
    "cubed by itself": lambda m, x: x * 0.5 * (torch.tanh((x * x * x * 0.044715 + x) * math.sqrt(2 / math.pi)) + 1),
}
OTHERS: dict[str, Function] = {
    "mean of another axis": lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-3),
    "mean of another value": lambda m, x: x * root(x.sigmoid()),
    "the root weighed first": lambda m, x: x * (m.weight * root(x)),
    "mean of cubes": lambda m, x: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 1e-3),
    "of another value": lambda m, x: 0.5 * x.sigmoid() * (1 + torch.tanh(0.8 * (x + 0.044715 * x.pow(3)))),
    "another slope": lambda m, x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x.pow(3)))),
    "a square": lambda m, x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(2)))),
}


def assert_is(function: Function, kind: str, count: int, lanes: int | None) -> None:
    torch.manual_seed(0)
    model, x = Written(function).eval(), data(2, 5, 8)
    graph = simplify(capture(model, (x,)))
    assert [op.kind for op in graph.ops].count(kind) == count
    target = host() if lanes is None else target_of(lanes)
    program = Program(graph, {}, threads=1, target=target)
    with torch.inference_mode():
        for given in (x, data(3, 4, 8)):
            assert torch.allclose(reference(graph, (given,)), model(given), rtol=1e-4, atol=1e-6)
            assert torch.allclose(program(given), model(given), rtol=1e-4, atol=1e-6)
    if count:
        assert torch_steps(graph, x, target=target) == ["linear"]  # it is not packed here
        assert_stays_inside(program, [x])


@pytest.mark.parametrize("lanes", [None, 4])
@pytest.mark.parametrize("name", NORMS)
def test_an_rms_norm_is_one_operation(name: str, lanes: int | None) -> None:
    assert_is(NORMS[name], "rms_norm", 1, lanes)


@pytest.mark.parametrize("lanes", [None, 4])
@pytest.mark.parametrize("name", GELUS)
def test_a_gelu_by_tanh_is_an_activation(name: str, lanes: int | None) -> None:
    torch.manual_seed(0)
    graph = simplify(capture(Written(GELUS[name]).eval(), (data(2, 5, 8),)))
    assert [op.last_activation for op in graph.ops] == ["gelu_tanh"]
    assert_is(GELUS[name], "linear", 1, lanes)


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_looks_alike_stays_as_it_is(name: str) -> None:
    assert_is(OTHERS[name], "rms_norm", 0, None)
    graph = simplify(capture(Written(OTHERS[name]).eval(), (data(2, 5, 8),)))
    assert "gelu_tanh" not in [op.last_activation for op in graph.ops]


def test_a_norm_that_is_read_elsewhere_keeps_its_weight_apart() -> None:
    def both(model: Written, x: Tensor) -> Tensor:
        normed = x * root(x)
        return normed * model.weight + normed.abs()

    assert_is(both, "rms_norm", 1, None)


def rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def heads(x: Tensor) -> Tensor:
    split: Tensor = x.unflatten(-1, (3, 8)).transpose(1, 2)
    return split


WIDE, NARROW = data(70), data(8)  # what is added to them leaves features no other number
ROTARIES: dict[str, tuple[Run, list[tuple[int, ...]]]] = {
    "heads": (lambda x, c, s: (lambda h: h * c + rotated(h) * s)(heads(x)), [(2, 5, 24), (2, 1, 5, 8), (2, 1, 5, 8)]),
    "of all batches": (lambda x, c, s: (lambda h: c * h + s * rotated(h))(heads(x)), [(2, 5, 24), (1, 5, 8), (5, 8)]),
    "sines first": (lambda x, c, s: (lambda y: rotated(y) * s + y * c)(x + WIDE), [(5, 70), (70,), (5, 70)]),
}
NO_ROTARIES: dict[str, tuple[Run, list[tuple[int, ...]]]] = {
    "the other half": (lambda x, c: x * c + torch.cat((x[..., 4:], -x[..., :4]), -1) * c, [(5, 8), (5, 8)]),
    "a part of it": (lambda x, c: x[:, :6] * c + torch.cat((-x[:, 3:6], x[:, :3]), -1) * c, [(5, 8), (5, 6)]),
    "uneven parts": (lambda x, c: x * c + torch.cat((-x[..., 3:], x[..., :3]), -1) * c, [(5, 8), (5, 8)]),
    "of another value": (lambda x, c: x * c + rotated(x * 2) * c, [(5, 8), (5, 8)]),
    "along another axis": (lambda x, c: x * c + torch.cat((-x[2:], x[:2]), 0) * c, [(4, 8), (4, 8)]),
    "repeated": (lambda x, c: x * c + rotated(x) * c, [(5, 8), (2, 5, 8)]),
}


@pytest.mark.parametrize("lanes", [None, 4, 16])
@pytest.mark.parametrize("name", ROTARIES)
def test_a_rotary_embedding_is_one_operation(name: str, lanes: int | None) -> None:
    run, shapes = ROTARIES[name]
    inputs = [data(*shape) for shape in shapes]
    assert "cat" not in str([op.label for op in simplified(run, *inputs).ops])
    assert_native(run, *inputs, lanes=lanes)


@pytest.mark.parametrize("name", NO_ROTARIES)
def test_what_is_turned_otherwise_is_no_rotary_embedding(name: str) -> None:
    run, shapes = NO_ROTARIES[name]
    inputs = [data(*shape) for shape in shapes]

    def fixed(x: Tensor, c: Tensor) -> Tensor:
        y: Tensor = run(x + NARROW, c)
        return y

    assert "rotary" not in [op.kind for op in simplified(fixed, *inputs).ops]
    assert_native(fixed, *inputs)
