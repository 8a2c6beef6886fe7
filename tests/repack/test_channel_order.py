"""The order of channels that int8 layers read: fewer lanes, the same function."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.model.arguments import Arguments
from autoprune.patterns import PATTERNS
from autoprune.registry import Choice
from autoprune.repack.graph.capture import capture
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import LayerOp
from autoprune.repack.graph.passes import simplify
from autoprune.repack.graph.reference import reference
from autoprune.repack.quantize import Settings, order_channels, quantised_graph
from autoprune.repack.quantize.permute import traded
from autoprune.repack.weights.quads import QUAD, cost_of


class Branches(nn.Module):
    """A residual sum, a depthwise convolution, a pooling and a flattened map between layers of 32 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.inner = nn.Conv2d(32, 48, 3, padding=1)
        self.deep = nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.outer = nn.Conv2d(48, 32, 1)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 4, 24), nn.ReLU(), nn.Linear(24, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.outer(self.deep(self.inner(x).relu()).relu())).relu()
        result: Tensor = self.head(nn.functional.max_pool2d(x, 2))
        return result


def masked_(model: nn.Module, pattern: Choice, sparsity: float, seed: int) -> nn.Module:
    """Small integers for weights, so that sums are exact in any order, all but the stem masked at random."""
    generator = torch.Generator().manual_seed(seed)
    made = PATTERNS.create(pattern)
    for name, weight in model.named_parameters():
        values = torch.randint(1, 4, weight.shape, generator=generator).float()
        values *= torch.randint(0, 2, weight.shape, generator=generator) * 2.0 - 1.0
        weight.data = values
        if weight.ndim > 1 and not name.startswith(("stem", "deep")):
            saliency = torch.rand(weight.shape, generator=generator)
            weight.data *= made.select(saliency, sparsity, made.arrange(saliency, sparsity))
    return model.eval()


def graph_of(model: nn.Module, x: Tensor) -> Graph:
    return simplify(capture(model, Arguments.of((x,)).ordered(model)))


def weight_of(graph: Graph, layer: str) -> Tensor:
    (op,) = (op for op in graph.ops if isinstance(op, LayerOp) and op.layer == layer)
    return graph.constants[op.tensors["weight"]]


def cost(graph: Graph, layer: str, size: int = 8, whole: int = 3) -> float:
    return cost_of(weight_of(graph, layer).numpy() != 0, size, whole)


PATTERNS_TRIED = (
    Choice("unstructured"),
    Choice("group", {"size": 8}),
    Choice("group", {"size": 8, "permute": True}),
    Choice("group", {"size": 16}),
)


@pytest.mark.slow
@settings(max_examples=12)  # a graph is captured for each
@given(st.sampled_from(PATTERNS_TRIED), st.sampled_from((0.5, 0.8, 0.95)), st.integers(0, 99))
def test_a_graph_computes_the_same_to_the_last_bit(pattern: Choice, sparsity: float, seed: int) -> None:
    x = torch.randint(-3, 4, (2, 3, 4, 4), generator=torch.Generator().manual_seed(seed)).float()
    graph = graph_of(masked_(Branches(), pattern, sparsity, seed), x)
    ordered = order_channels(graph)
    with torch.inference_mode():
        assert torch.equal(reference(ordered, (x,)), reference(graph, (x,)))
    assert ordered.output_names() == graph.output_names()


def test_a_quantised_graph_computes_the_same() -> None:
    torch.manual_seed(0)
    model, x = Branches().eval(), torch.randn(8, 3, 4, 4)
    pattern = PATTERNS.create(Choice("group", {"size": 8, "permute": True}))
    for layer in (model.inner, model.outer):
        saliency = layer.weight.detach().abs()
        layer.weight.data *= pattern.select(saliency, 0.7, pattern.arrange(saliency, 0.7))
    graph = graph_of(model, x)
    ordered = order_channels(graph)
    assert not torch.equal(weight_of(ordered, "inner"), weight_of(graph, "inner"))
    layers = [op.output for op in graph.ops if isinstance(op, LayerOp)]
    made = [quantised_graph(each, layers, [(x,)], Settings()).graph for each in (graph, ordered)]
    with torch.inference_mode():
        whole, plain, other = (reference(each, (x,)) for each in (graph, *made))
    noise = (plain - whole).abs().mean()
    assert noise > 0
    assert (other - plain).abs().mean() <= 0.05 * noise


def shuffled(channels: int, size: int) -> Tensor:
    """The channels, in any order within groups of `size`."""
    generator = torch.Generator().manual_seed(5)
    return torch.cat([start + torch.randperm(size, generator=generator) for start in range(0, channels, size)])


@pytest.mark.parametrize("size", [8, 16])
def test_channels_that_live_together_find_each_other_within_their_group(size: int) -> None:
    first, second = nn.Conv2d(16, 64, 1), nn.Conv2d(64, 64, 3, padding=1)
    model = masked_(nn.Sequential(first, nn.ReLU(), second), Choice("group", {"size": size, "block": 4}), 0.75, 1)
    x = torch.ones(1, 16, 6, 6)
    whole = cost(graph_of(model, x), "2", size)
    order = shuffled(64, size)
    for weight in (first.weight, first.bias):
        assert weight is not None
        weight.data = weight.data[order]
    second.weight.data = second.weight.data[:, order]
    graph = graph_of(model, x)
    ordered = order_channels(graph)
    assert cost(graph, "2", size) > 1.1 * whole
    assert cost(ordered, "2", size) <= whole
    assert cost(ordered, "0", size) <= cost(graph, "0", size)
    assert torch.equal(reference(ordered, (x,)), reference(graph, (x,)))


def test_filters_that_share_what_they_keep_become_neighbours() -> None:
    inner, last = nn.Conv2d(64, 64, 3), nn.Conv2d(64, 32, 1)
    model = masked_(nn.Sequential(nn.Conv2d(16, 64, 3), nn.ReLU(), inner, last), Choice("group", {"size": 8}), 0.8, 2)
    last.weight.data = torch.ones_like(last.weight)  # every filter is needed
    x = torch.ones(1, 16, 8, 8)
    grouped = cost(graph_of(model, x), "2")
    inner.weight.data = inner.weight.data[torch.randperm(64, generator=torch.Generator().manual_seed(3))]
    graph = graph_of(model, x)
    ordered = order_channels(graph)
    assert cost(graph, "2") > 1.5 * grouped
    assert cost(ordered, "2") <= grouped
    assert torch.equal(reference(ordered, (x,)), reference(graph, (x,)))


def test_what_would_gain_nothing_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 1))
    graph = graph_of(masked_(model, Choice("group", {"size": 8, "block": 4}), 0.7, 4), torch.ones(1, 16, 8, 8))
    assert dict(order_channels(graph).constants) == dict(graph.constants)


@given(st.integers(0, 999), st.integers(40, 200), st.sampled_from((1, 3)))
def test_trades_come_near_the_best_lanes_of_eight_channels(seed: int, cells: int, whole: int) -> None:
    generator = np.random.default_rng(seed)
    kept = generator.random((8, cells)) < 0.3
    members = np.arange(QUAD + 1)
    table = np.where(members >= whole, 1.0, 0.4 * members) * (members > 0)
    cost = np.repeat(table[:, None], cells, axis=1).astype(np.float32)

    def total(order: np.ndarray) -> float:
        return float(table[kept[order].reshape(2, QUAD, cells).sum(axis=1)].sum())

    def split(first: tuple[int, ...]) -> np.ndarray:
        return np.array([*first, *(each for each in range(8) if each not in first)])

    best = min(total(split(first)) for first in itertools.combinations(range(8), QUAD))
    order = traded(kept, cost, np.arange(8) // QUAD)
    assert sorted(order) == list(range(8))
    assert total(order) <= total(np.arange(8)) + 1e-4
    assert total(order) <= 1.1 * best
