"""Operators that are written another way for ONNX compute what they computed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from autoprune.repack.onnx.rewrites import REWRITES, rewritten
from autoprune.tracing import tracing

_aten = torch.ops.aten
CEIL = [{"kernel_size": k, "stride": 2, "padding": p, "ceil_mode": True} for k, p in itertools.product((2, 3), (0, 1))]
MASK = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
FLOATS = torch.where(MASK, 0.5, -torch.inf)


def assert_rewritten(
    function: Callable[..., Any], *inputs: Tensor, module: nn.Module | None = None, atol: float = 2e-6
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = module

        def forward(self, *given: Tensor) -> Any:
            return function(*given)

    with tracing():
        before = torch.export.export(Model(), inputs, strict=False)
        after = rewritten(before)
    assert after is not before
    wanted, got = (pytree.tree_leaves(each.module()(*inputs)) for each in (before, after))
    for right, ours in zip(wanted, got, strict=True):
        torch.testing.assert_close(ours, right, atol=atol, rtol=1e-5)
    assert [node for node in after.graph.nodes if node.target in REWRITES and _awkward(node)] == []


def _awkward(node: torch.fx.Node) -> bool:
    """Whether a pool still rounds up, a mask is still given to attention, or an LSTM still has projections."""
    arguments = node.args
    if node.target is _aten.lstm.input:
        assert isinstance(arguments[2], (list, tuple))
        return len(arguments[2]) % 2 == 1
    return True in arguments[4:] or (node.target is _aten.scaled_dot_product_attention.default and len(arguments) > 3)


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("options", CEIL)
def test_pools_that_round_up(options: dict[str, Any], size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size + 1)
    assert_rewritten(lambda x: functional.max_pool2d(x, **options), x)
    for counted in (True, False):
        assert_rewritten(lambda x, counted=counted: functional.avg_pool2d(x, count_include_pad=counted, **options), x)
    assert_rewritten(lambda x: functional.avg_pool2d(x, divisor_override=5, **options), x)


def test_pools_of_other_axes() -> None:
    torch.manual_seed(0)
    line, block = torch.randn(2, 3, 10), torch.randn(2, 3, 6, 7, 8)
    assert_rewritten(lambda x: functional.max_pool1d(x, 3, 2, 1, 2, ceil_mode=True), line)
    assert_rewritten(lambda x: functional.avg_pool1d(x, 3, 2, 1, True), line)
    assert_rewritten(lambda x: functional.max_pool3d(x, 3, 2, 1, ceil_mode=True), block)
    assert_rewritten(lambda x: functional.avg_pool3d(x, 3, 2, 1, True, False), block)
    assert_rewritten(lambda x: functional.avg_pool2d(x, 3, 2, 1, True), torch.randn(3, 8, 8))  # no batch


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("to", [{"size": (5, 12)}, {"scale_factor": 0.6}])
def test_antialiased_resizing(mode: str, to: dict[str, Any]) -> None:
    torch.manual_seed(0)
    assert_rewritten(lambda x: functional.interpolate(x, mode=mode, antialias=True, **to), torch.randn(2, 3, 9, 10))


def test_circular_padding() -> None:
    assert_rewritten(lambda x: functional.pad(x, (1, 2, 0, 3), "circular"), torch.arange(24.0).reshape(1, 2, 3, 4))


def test_numbers_that_are_small() -> None:
    x = torch.linspace(-100, 100, 201)
    assert_rewritten(functional.logsigmoid, x, atol=1e-40)
    assert_rewritten(lambda x: torch.log(x.relu() + 1e-12), x)


@pytest.mark.parametrize("mask", [MASK, FLOATS])
def test_attention_with_a_row_that_is_masked_whole(mask: Tensor) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 3, 4)
    assert_rewritten(functional.scaled_dot_product_attention, q, k, v, mask)
    assert_rewritten(
        lambda q, k, v, mask: functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3), q, k, v, mask
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch is slower with them
@pytest.mark.parametrize(("layers", "bidirectional", "batch_first", "bias"), [
    (1, False, True, True), (2, True, True, True), (2, True, False, False),
])  # fmt: skip
def test_lstms_with_projections(layers: int, bidirectional: bool, batch_first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(5, 6, layers, bias, batch_first, bidirectional=bidirectional, proj_size=3).eval()
    states, batch = layers * (1 + bidirectional), 2 if batch_first else 4
    x, h, c = torch.randn(2, 4, 5), torch.randn(states, batch, 3), torch.randn(states, batch, 6)
    assert_rewritten(lambda x: lstm(x), x, module=lstm)
    assert_rewritten(lambda x, h, c: lstm(x, (h, c)), x, h, c, module=lstm)


def test_other_operators_are_left() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.ReLU())
    with tracing():
        before = torch.export.export(model, (torch.randn(1, 3, 12, 12),), strict=False)
        after = rewritten(before)
    assert [n.target for n in after.graph.nodes] == [n.target for n in before.graph.nodes]
