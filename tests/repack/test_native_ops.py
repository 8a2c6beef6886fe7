"""Operators that run natively: whole programs without a step of torch, right for any shape, inside their buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.repack.graph.capture import capture
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.passes import simplify
from autoprune.repack.kernels.compiler import Target, host
from autoprune.repack.lowering.steps import TorchStep
from autoprune.repack.runtime.program import Program
from tests.repack.test_kernels import assert_stays_inside
from tests.repack.test_token_kernels import target_of

Run = Callable[..., Any]


class Calls(nn.Module):
    """A function of tensors as a model."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)


def simplified(run: Run, *inputs: Tensor) -> Graph:
    return simplify(capture(Calls(run).eval(), inputs))


def torch_steps(graph: Graph, *inputs: Tensor, target: Target | None = None) -> list[str]:
    """The operators that torch would run."""
    program = Program(graph, {}, threads=1, target=target or host())
    steps = program.plan(tuple(tuple(x.shape) for x in inputs)).lowered.steps
    return [step.op.label for step in steps if isinstance(step, TorchStep)]


def assert_native(run: Run, *inputs: Tensor, lanes: int | None = None, left: Sequence[str] = ()) -> None:
    """Native but for `left`, and equal to torch; with `lanes` also enclosed."""
    target = host() if lanes is None else target_of(lanes)
    graph = simplified(run, *inputs)
    assert torch_steps(graph, *inputs, target=target) == list(left)
    program = Program(graph, {}, threads=1, target=target)
    wanted = run(*inputs)
    got = program(*inputs)
    assert got.shape == wanted.shape
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
    if lanes is not None:
        assert_stays_inside(program, list(inputs))


def data(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# Poolings -----------------------------------------------------------------------------------------------------------


@st.composite
def pools(draw: st.DrawFn) -> tuple[Run, Tensor]:
    """Any pooling torch takes, and a map for it."""
    kernel, stride = (draw(st.tuples(st.integers(1, 4), st.integers(1, 4))) for _ in range(2))
    largest = draw(st.booleans())
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3))) if largest else (1, 1)
    spans = [step * (size - 1) + 1 for size, step in zip(kernel, dilation, strict=True)]
    padding = tuple(draw(st.integers(0, size // 2)) for size in kernel)
    ceil = draw(st.booleans())
    least = [max(1, span - 2 * pad) for span, pad in zip(spans, padding, strict=True)]
    x = data(draw(st.integers(1, 2)), 3, *(draw(st.integers(low, low + 20)) for low in least))
    x = x.relu() if draw(st.booleans()) else x
    if largest:
        return lambda x: F.max_pool2d(x.relu(), kernel, stride, padding, dilation, ceil), x
    counted, divisor = draw(st.booleans()), draw(st.sampled_from([None, 1, 5]))
    return lambda x: F.avg_pool2d(x, kernel, stride, padding, ceil, counted, divisor), x


@settings(max_examples=25, deadline=None)
@given(pool=pools(), lanes=st.sampled_from([None, 4, 16]))
def test_any_pooling_is_native(pool: tuple[Run, Tensor], lanes: int | None) -> None:
    assert_native(*pool, lanes=lanes)


@pytest.mark.parametrize("ceil", [False, True])
def test_a_window_in_the_border_alone_has_no_largest(ceil: bool) -> None:
    run: Run = lambda x: F.max_pool2d(x.relu(), 2, 1, 1, 2, ceil)  # noqa: E731
    x = data(1, 2, 1, 1)
    assert run(x).isinf().all()
    assert_native(run, x)


# Matrices and rows --------------------------------------------------------------------------------------------------


def heads(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (2, width)).transpose(1, 2)


def attended(*masks: Any, causal: bool = False, widths: tuple[int, int] = (8, 5)) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        (a, b), mask = (heads(x, widths[0]) for x in (q, k)), more or masks
        y = F.scaled_dot_product_attention(a, b, heads(v, widths[1]), *mask, is_causal=causal)
        return y.transpose(1, 2).flatten(2)

    return run


QKV = (data(2, 21, 16), data(2, 37, 16), data(2, 37, 10))
LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("lanes", [None, 4, 16])
def test_attention_with_what_is_added_is_native(lanes: int | None) -> None:
    for shape in ((21, 37), (2, 1, 21, 37), (1, 2, 1, 37), (2, 2, 21, 37))[: 4 if lanes is None else 1]:
        allowed = torch.rand(shape) < 0.5
        allowed[..., :2, :] = False  # queries that may look at nothing
        for mask in (data(*shape), torch.where(allowed, 0.0, LOWEST), torch.where(allowed, 0.0, -torch.inf)):
            assert_native(attended(), *QKV, mask, lanes=lanes)
    assert_native(attended(), *QKV, allowed, left=["aten.where.Scalar"])
    assert_native(attended(data(21, 37)), *QKV, lanes=lanes)
    assert_native(attended(causal=True), *QKV, lanes=lanes)
    assert_native(attended(causal=True, widths=(3, 5)), *(data(1, 1, 2 * n) for n in (3, 3, 5)), lanes=lanes)


@pytest.mark.parametrize("lanes", [4, 16])
def test_attention_takes_any_leading_axes(lanes: int) -> None:
    run: Run = lambda x: F.scaled_dot_product_attention(x, x.roll(1, 0), x)  # noqa: E731
    for shape in ((3, 5, 8), (2, 3, 1, 7, 4), (1, 2, 3, 13, 8)):
        graph = simplified(run, data(*shape))
        program = Program(graph, {}, threads=1, target=target_of(lanes))
        assert torch.allclose(program(data(*shape)), run(data(*shape)), atol=1e-5)


MATRICES: dict[str, tuple[Run, list[tuple[int, ...]]]] = {
    "product": (lambda x, y: x @ y, [(2, 3, 13, 7), (2, 3, 7, 33)]),
    "product of a turned one": (lambda x, y: x @ y.transpose(-2, -1), [(2, 3, 29, 70), (2, 3, 33, 70)]),
    "product with turned rows": (lambda x, y: x.transpose(1, 2) @ y, [(2, 9, 40), (2, 9, 5)]),
    "one right matrix": (lambda x, y: x @ y, [(2, 5, 6, 8), (8, 17)]),
    "one left matrix": (lambda x, y: x @ y, [(6, 8), (3, 8, 17)]),
    "bmm": (lambda x, y: torch.bmm(x, y), [(3, 1, 8), (3, 8, 31)]),
    "softmax": (lambda x: x.softmax(-1), [(2, 5, 77)]),
    "softmax of columns": (lambda x: x.softmax(1), [(2, 37, 5)]),
    "softmax of one": (lambda x: x.softmax(2), [(3, 5, 1)]),
    "stack": (lambda x, y: torch.stack([-y, x], -1).flatten(2), [(2, 5, 19), (2, 5, 19)]),
    "stack in front": (lambda x, y: torch.stack([x, y], 1), [(2, 5, 19), (2, 5, 19)]),
    "mean": (lambda x: x.mean(1), [(2, 33, 21)]),
    "mean, last": (lambda x: x.mean(-1, keepdim=True), [(2, 7, 81)]),
    "sum": (lambda x: x.sum((1, 3)), [(2, 5, 7, 19)]),
    "sum of columns": (lambda x: x.transpose(1, 2).sum((0, 2)), [(3, 5, 7)]),
    "sum of all": (lambda x: x.sum((0, 1)), [(3, 37)]),
    "functions": (lambda x: (x.abs() + 1).rsqrt() + x.square().sqrt() + (-x).exp() + x.pow(2), [(3, 37)]),
}


@pytest.mark.parametrize("lanes", [None, 4, 16])
@pytest.mark.parametrize("name", MATRICES)
def test_what_works_on_matrices_is_native(name: str, lanes: int | None) -> None:
    run, shapes = MATRICES[name]
    assert_native(run, *(data(*shape) for shape in shapes), lanes=lanes)


def test_softmax_of_what_is_not_finite_is_torchs() -> None:
    x = data(4, 20)
    x[0, 3], x[1, 4], x[2] = float("nan"), float("-inf"), float("-inf")
    assert_native(lambda x: x.softmax(-1), x)
