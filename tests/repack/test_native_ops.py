"""Operators that run natively: whole programs without a step of torch, right for any shape, inside their buffers."""

from __future__ import annotations

from collections.abc import Callable
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
from tests.repack.test_token_kernels import LANES, target_of

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


def assert_native(run: Run, *inputs: Tensor, lanes: int | None = None, threads: int = 1) -> None:
    """Native throughout and equal to torch; with `lanes` also enclosed."""
    target = host() if lanes is None else target_of(lanes)
    graph = simplified(run, *inputs)
    assert torch_steps(graph, *inputs, target=target) == []
    program = Program(graph, {}, threads=threads, target=target)
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
@given(pool=pools(), lanes=st.sampled_from([None, *LANES]))
def test_any_pooling_is_native(pool: tuple[Run, Tensor], lanes: int | None) -> None:
    assert_native(*pool, lanes=lanes)


@pytest.mark.parametrize("ceil", [False, True])
def test_a_window_in_the_border_alone_has_no_largest(ceil: bool) -> None:
    run: Run = lambda x: F.max_pool2d(x.relu(), 2, 1, 1, 2, ceil)  # noqa: E731
    x = data(1, 2, 1, 1)
    assert run(x).isinf().all()
    assert_native(run, x)
