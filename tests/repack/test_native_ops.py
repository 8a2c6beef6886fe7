"""Operators that run natively: whole programs without a step of torch, right for any shape, inside their buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.repack import repack
from autoprune.repack.graph.capture import capture
from autoprune.repack.graph.ir import Graph, Input
from autoprune.repack.graph.ops import Attention, LayerOp, Linear, Op, Scalar, TorchOp
from autoprune.repack.graph.passes import simplify
from autoprune.repack.graph.reference import reference
from autoprune.repack.kernels.compiler import Target, host
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.lowering.steps import TorchStep
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.runtime.program import Program
from autoprune.repack.weights.packed import pack
from tests.laws.test_program import told
from tests.repack.test_kernels import assert_stays_inside
from tests.repack.test_token_kernels import target_of

Run = Callable[..., Any]


_CAPTURED: dict[tuple[Any, ...], Graph] = {}


class Calls(nn.Module):
    """A function of tensors as a model."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)


def simplified(run: Run, *inputs: Tensor) -> Graph:
    """Captured once for all the targets that it runs on; of the inputs it is extents and types that count."""
    key = (run, *((x.shape, x.dtype, x.stride()) for x in inputs))
    if key not in _CAPTURED:
        _CAPTURED[key] = simplify(capture(Calls(run).eval(), inputs))
    return _CAPTURED[key]


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


@pytest.mark.slow
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
    split: Tensor = x.unflatten(-1, (2, width)).transpose(1, 2)
    return split


@cache
def attended(*masks: Any, causal: bool = False, widths: tuple[int, int] = (8, 5)) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        (a, b), mask = (heads(x, widths[0]) for x in (q, k)), next(iter(more or masks), None)
        y = F.scaled_dot_product_attention(a, b, heads(v, widths[1]), mask, is_causal=causal)
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
    assert_native(attended(), *QKV, allowed, lanes=lanes)
    assert_native(attended(data(21, 37)), *QKV, lanes=lanes)
    assert_native(attended(causal=True), *QKV, lanes=lanes)
    assert_native(attended(causal=True, widths=(3, 5)), *(data(1, 1, 2 * n) for n in (3, 3, 5)), lanes=lanes)


@pytest.mark.parametrize("lanes", [None, 4, 16])
@pytest.mark.parametrize("queries", [1, 3])
def test_attention_of_few_queries_is_native(queries: int, lanes: int | None) -> None:
    inputs = (data(2, queries, 16), *QKV[1:])
    masked = torch.where(torch.rand(2, 1, queries, 37) < 0.5, 0.0, -torch.inf)
    masked[0, :, 0] = -torch.inf  # a query that may look at nothing
    for more in ((), (data(2, 2, queries, 37),), (data(queries, 37) + LOWEST,), (masked,)):
        assert_native(attended(), *inputs, *more, lanes=lanes)
    assert_native(attended(widths=(3, 35)), data(1, queries, 6), data(1, 5, 6), data(1, 5, 70), lanes=lanes)


@pytest.mark.parametrize("lanes", [4, 16])
def test_attention_takes_any_leading_axes(lanes: int) -> None:
    run: Run = lambda x: F.scaled_dot_product_attention(x, x.roll(1, 0), x)  # noqa: E731
    for shape in ((3, 5, 8), (2, 3, 1, 7, 4), (1, 2, 3, 13, 8)):
        graph = simplified(run, data(*shape))
        program = Program(graph, {}, threads=1, target=target_of(lanes))
        assert torch.allclose(program(data(*shape)), run(data(*shape)), atol=1e-5)


@pytest.mark.parametrize("lanes", [None, 4])
@pytest.mark.parametrize("queries", [1, 21])
def test_heads_of_queries_that_share_keys_are_native(queries: int, lanes: int | None) -> None:
    shared: Run = lambda q, k, v, *mask: F.scaled_dot_product_attention(heads(q, 8), k, v, *mask)  # noqa: E731
    q, mask = data(2, queries, 16), data(queries, 37)
    assert_native(shared, q, data(2, 1, 37, 8), data(2, 1, 37, 5), lanes=lanes)
    assert_native(shared, q, data(2, 2, 37, 8), data(2, 1, 37, 5), mask, lanes=lanes)


def test_queries_that_share_one_of_many_keys_are_left_to_torch() -> None:
    graph = simplified(F.scaled_dot_product_attention, data(1, 2, 5, 8), data(3, 2, 7, 8), data(3, 2, 7, 4))
    assert [op.kind for op in graph.ops].count("attention") == 0


MATRICES: dict[str, tuple[Run, list[tuple[int, ...]]]] = {
    "product": (lambda x, y: x @ y, [(2, 3, 13, 7), (2, 3, 7, 33)]),
    "product of a turned one": (lambda x, y: x @ y.transpose(-2, -1), [(2, 3, 29, 70), (2, 3, 33, 70)]),
    "product with turned rows": (lambda x, y: x.transpose(1, 2) @ y, [(2, 9, 40), (2, 9, 5)]),
    "product of few rows": (lambda x, y: x @ y, [(2, 3, 3, 70), (2, 3, 70, 151)]),
    "product of a row": (lambda x, y: x @ y[..., 1:-1], [(2, 3, 1, 5), (2, 3, 5, 9)]),
    "product of few rows with a turned one": (lambda x, y: x @ y.transpose(-2, -1), [(2, 3, 2, 70), (2, 3, 37, 70)]),
    "product of a row with a turned one": (lambda x, y: x @ y.transpose(-2, -1), [(3, 1, 3), (3, 5, 3)]),
    "one right matrix": (lambda x, y: x @ y, [(2, 5, 6, 8), (8, 17)]),
    "one left matrix": (lambda x, y: x @ y, [(6, 8), (3, 8, 17)]),
    "bmm": (lambda x, y: torch.bmm(x, y), [(3, 1, 8), (3, 8, 31)]),
    "softmax": (lambda x: x.softmax(-1), [(2, 5, 77)]),
    "softmax of columns": (lambda x: x.softmax(1), [(2, 37, 5)]),
    "softmax in floats": (lambda x: F.softmax(x, -1, dtype=torch.float32).to(x.dtype), [(2, 5, 77)]),
    "softmax of few": (lambda x: x.softmax(-1), [(2, 5, 7)]),
    "softmax of a vector": (lambda x: x.softmax(-1), [(2, 5, 16)]),
    "stack": (lambda x, y: torch.stack([-y, x], -1).flatten(2), [(2, 5, 19), (2, 5, 19)]),
    "past and new keys": (lambda x, y: torch.cat([x, y.transpose(1, 2)], 2) + 1, [(1, 4, 9, 16), (1, 1, 4, 16)]),
    "past and new keys of many": (lambda x, y: torch.cat([x, y.transpose(1, 2)], -2), [(2, 4, 9, 8), (2, 3, 4, 8)]),
    "an empty cache": (lambda x: torch.cat([torch.tensor([]), x.transpose(1, 2)], -2), [(1, 3, 2, 8)]),
    "stack in front": (lambda x, y: torch.stack([x, y], 1), [(2, 5, 19), (2, 5, 19)]),
    "mean": (lambda x: x.mean(1), [(2, 33, 21)]),
    "mean of many columns": (lambda x: x.mean(1), [(2, 33, 150)]),
    "functions of many": (lambda x: x.exp() * x.neg() - x, [(3, 211)]),
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


def test_what_is_beside_nothing_is_not_copied() -> None:
    def cached(x: Tensor, y: Tensor) -> Tensor:
        """As caches of transformers begin."""
        return torch.cat([torch.cat([torch.tensor([]), x], -2), y], -2)

    graph = simplified(cached, data(1, 2, 5, 4), data(1, 2, 1, 4))
    assert len(graph.ops) == 1
    assert_native(cached, data(1, 2, 5, 4), data(1, 2, 1, 4))
    wide: Run = lambda x: torch.cat([torch.zeros(0, dtype=torch.float64), x], 0) * 2  # noqa: E731
    assert torch.equal(Program(simplified(wide, data(2, 3)), {}, threads=1)(data(2, 3)), wide(data(2, 3)))


def test_softmax_of_what_is_not_finite_is_torchs() -> None:
    x = data(4, 20)
    x[0, 3], x[1, 4], x[2] = float("nan"), float("-inf"), float("-inf")
    assert_native(lambda x: x.softmax(-1), x)


MASKS: dict[str, Run] = {
    "where": lambda x, m: torch.where(m, x, -x),
    "where, repeated": lambda x, m: torch.where(m[:, :, :1], x, x[:, :1]),
    "where or a number": lambda x, m: torch.where(m[:1], x, 0.5),
    "a number or where": lambda x, m: torch.where(m, -2, x),
    "numbers": lambda x, m: torch.where(m, 0.0, -1e30) + x,
    "one boolean": lambda x, m: torch.where(m[0, 0, 0], x, 1.0),
    "filled": lambda x, m: x.masked_fill(m, 3),
    "filled, turned": lambda x, m: x.transpose(1, 2).masked_fill(m.transpose(1, 2), -1.0),
    "filled, in steps": lambda x, m: x[..., ::2].masked_fill(m[..., ::2], -1.0),
}


@pytest.mark.parametrize("lanes", [None, 4, 16])
@pytest.mark.parametrize("name", MASKS)
def test_what_booleans_pick_is_native(name: str, lanes: int | None) -> None:
    assert_native(MASKS[name], data(2, 6, 38), data(2, 6, 38) > 0, lanes=lanes)


def test_numbers_that_booleans_pick_may_be_no_floats() -> None:
    run: Run = lambda x, m: x + torch.where(m, 1, 2)  # noqa: E731
    x, m = data(2, 6, 38), data(2, 6, 38) > 0
    assert torch.equal(Program(simplified(run, x, m), {}, threads=1)(x, m), run(x, m))


# What models write out ------------------------------------------------------------------------------------------------


class ByHand(nn.Module):
    """Attention as many models write it."""

    def __init__(self, scores: Run, product: Run | None = None) -> None:
        super().__init__()
        self.qkv, self.scores, self.product = nn.Linear(12, 2 * (4 + 4 + 6)), scores, product
        self.bias = nn.Parameter(data(2, 9, 9))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (2, 14)).transpose(1, 2).split([4, 4, 6], -1)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) if self.product else q @ k.transpose(-2, -1)
        shares = self.scores(self, scores).softmax(-1)
        y = torch.einsum("b h i j, b h j d -> b h i d", shares, v) if self.product else shares @ v
        return y.transpose(1, 2).flatten(2)


BY_HAND: dict[str, Run] = {
    "scaled": lambda m, s: s * 0.5,
    "divided": lambda m, s: s / 2,
    "as it is": lambda m, s: s,
    "biased": lambda m, s: s * 0.5 + m.bias,
    "bias first": lambda m, s: m.bias + s,
    "filled": lambda m, s: s.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf),
    "filled with the lowest": lambda m, s: (s * 0.5).masked_fill(m.bias > 0, LOWEST),
}


@pytest.mark.parametrize("einsum", [False, True])
@pytest.mark.parametrize("name", BY_HAND)
def test_attention_by_hand_is_attention(name: str, einsum: bool) -> None:
    model = ByHand(BY_HAND[name], torch.einsum if einsum else None).eval()
    x = data(2, 9, 12)
    graph = simplify(capture(model, (x,)))
    assert [op.kind for op in graph.ops].count("attention") == 1
    assert not any(op.label in ("aten.softmax.int", "aten.matmul.default") for op in graph.ops)
    for given_input in (x, data(3, 9, 12)):
        assert torch.allclose(reference(graph, (given_input,)), model(given_input), atol=1e-5)


@pytest.mark.parametrize("scores", [lambda m, s: (s + m.bias) * 0.5, lambda m, s: s.masked_fill(m.bias > 0, -2.0)])
def test_what_is_no_attention_stays_as_it_is(scores: Run) -> None:
    model, x = ByHand(scores).eval(), data(2, 9, 12)
    graph = simplify(capture(model, (x,)))
    assert "attention" not in [op.kind for op in graph.ops]
    assert torch.allclose(reference(graph, (x,)), model(x), atol=1e-5)


def test_an_integer_that_is_added_is_no_mask() -> None:
    class Added(nn.Module):
        def forward(self, x: Tensor, n: Tensor) -> Tensor:
            return ((x @ x.transpose(1, 2)) + n).softmax(-1) @ x

    x, n = data(2, 5, 4), torch.randint(0, 3, (2, 5, 5))
    graph = simplify(capture(Added(), (x, n)))
    assert torch.allclose(reference(graph, (x, n)), Added()(x, n), atol=1e-5)


# Lengths ------------------------------------------------------------------------------------------------------------


def lengths_net() -> nn.Module:
    class Lengths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv1d(3, 8, 5, padding=2, bias=False), nn.BatchNorm1d(8)
            self.first, self.last = nn.Conv1d(8, 8, 3, padding="same", dilation=2), nn.Conv1d(8, 8, 3, padding=1)
            self.down, self.head = nn.Conv1d(8, 6, 2, 2, groups=2), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool1d(F.relu(self.norm(self.stem(x))), 3, 1, 1)
            x = F.gelu(x + self.last(F.relu(self.first(x))))
            x = F.avg_pool1d(self.down(x), 3, 2, ceil_mode=True)
            y: Tensor = self.head(F.adaptive_avg_pool1d(x, 1).flatten(1))
            return y

    torch.manual_seed(0)
    net = Lengths().eval()
    assert net.norm.running_var is not None
    nn.init.uniform_(net.norm.running_var, 0.5, 2)
    return net


def test_lengths_are_maps_of_height_one(tmp_path: Path) -> None:
    net, x = lengths_net(), data(2, 3, 40)
    graph = simplify(capture(net, (x,)))
    kinds = [op.kind for op in graph.ops if op.kind not in ("reshape", "scalar")]
    assert kinds == ["conv2d", "max_pool2d", *["conv2d"] * 3, "avg_pool2d", "global_avg_pool", "linear"]
    assert [op.last_activation for op in graph.ops if op.kind == "conv2d"] == ["relu", "relu", "gelu", None]
    assert {op.layer for op in graph.ops if isinstance(op, LayerOp)} == {"stem", "first", "last", "down", "head"}
    for given_input in (x, data(3, 3, 40)):
        assert torch.allclose(reference(graph, (given_input,)), net(given_input), atol=1e-5)
    fast = repack(net, x, form="program", threads=1, cache=told(tmp_path, Tiling))
    for given_input in (x, data(3, 3, 40)):
        assert torch.allclose(fast(given_input), net(given_input), atol=1e-5)


def test_a_length_stays_free(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(3, 8, 5, 2), nn.ReLU(), nn.Conv1d(8, 4, 3, padding=1)).eval()
    fast = repack(net, data(2, 3, 40), form="program", threads=1, cache=told(tmp_path, Tiling))
    for shape in ((2, 3, 40), (1, 3, 57)):
        assert torch.allclose(fast(data(*shape)), net(data(*shape)), atol=1e-5)


# Maps ---------------------------------------------------------------------------------------------------------------

WEIGHT, BIAS = data(6), data(6) + 1
MAPS: dict[str, tuple[Run, tuple[int, ...]]] = {
    "group norm": (lambda x: F.group_norm(x, 3, WEIGHT, BIAS), (2, 6, 5, 7)),
    "group norm of one group": (lambda x: F.group_norm(x, 1), (1, 6, 9, 33)),
    "instance norm": (lambda x: F.instance_norm(x, weight=WEIGHT, bias=BIAS), (2, 6, 4, 5)),
    "group norm of lengths": (lambda x: F.group_norm(x, 2, WEIGHT), (2, 6, 41)),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), (2, 3, 5, 9)),
    "nearest, uneven": (lambda x: F.interpolate(x, size=(7, 20)), (1, 3, 5, 9)),
    "nearest, smaller": (lambda x: F.interpolate(x, scale_factor=0.6), (1, 3, 11, 17)),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=(2, 3), mode="bilinear"), (2, 3, 5, 17)),
    "bilinear, corners": (lambda x: F.interpolate(x, size=(8, 33), mode="bilinear", align_corners=True), (1, 3, 5, 7)),
    "border of zeros": (lambda x: F.pad(x, (1, 2, 0, 3)), (2, 3, 5, 7)),
    "border, and columns that are cut": (lambda x: F.pad(x, (3, -4, -1, 2)), (2, 3, 5, 40)),
    "border at one side": (lambda x: F.pad(x, (0, 1)), (2, 3, 5, 16)),
    "border that is cut": (lambda x: F.pad(x, (-1, -2, 1, 0)), (2, 3, 5, 16)),
    "border of reflections": (lambda x: F.pad(x, (2, 1, 1, 2), "reflect"), (1, 3, 5, 18)),
    "border of the edge": (lambda x: F.pad(x, (2, 1, 1, 2), "replicate"), (1, 3, 5, 18)),
    "border from the other side": (lambda x: F.pad(x, (2, 1, 1, 2), "circular"), (1, 3, 5, 18)),
    "pool to uneven parts": (lambda x: F.adaptive_avg_pool2d(x, (3, 7)), (2, 3, 8, 19)),
    "pool to more": (lambda x: F.adaptive_avg_pool2d(x, (7, 7)), (1, 3, 4, 4)),
    "pool to wide parts": (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), (2, 3, 6, 38)),
    "largest of parts": (lambda x: F.adaptive_max_pool2d(x, (3, 2)), (2, 3, 6, 38)),
    "largest of uneven parts": (lambda x: F.adaptive_max_pool2d(x, (3, 7)), (2, 3, 8, 19)),
    "largest of all": (lambda x: F.adaptive_max_pool2d(x, 1), (2, 3, 7, 9)),
    "largest, where it lies left out": (lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True)[0], (2, 3, 9, 9)),
    "border of lengths": (lambda x: F.pad(x, (3, 0)), (2, 6, 30)),
    "border of reflected lengths": (lambda x: F.pad(x, (3, 2), "reflect"), (1, 6, 30)),
    "lengths to parts": (lambda x: F.adaptive_avg_pool1d(x, 4), (2, 6, 32)),
    "lengths to uneven parts": (lambda x: F.adaptive_avg_pool1d(x, 5), (1, 6, 32)),
    "largest of parts of lengths": (lambda x: F.adaptive_max_pool1d(x, 4), (2, 6, 30)),
    "largest of lengths, where it lies left out": (
        lambda x: F.max_pool1d(x, 2, return_indices=True)[0],
        (2, 6, 30),
    ),
}


@pytest.mark.parametrize("lanes", [None, 4])
@pytest.mark.parametrize("name", MAPS)
def test_what_works_on_maps_is_native(name: str, lanes: int | None) -> None:
    run, shape = MAPS[name]
    x = data(*shape)

    def between(x: Tensor) -> Tensor:  # other steps on maps
        y: Tensor = run(x.relu()).relu()
        return F.max_pool2d(y, 3, 1, 1) if y.dim() == 4 else y

    for inside in (run, between):
        wanted, graph = inside(x), simplified(inside, x)
        target = host() if lanes is None else target_of(lanes)
        assert torch_steps(graph, x, target=target) == []
        program = Program(graph, {}, threads=1, target=target)
        assert torch.allclose(program(x), wanted, atol=1e-4)
    if lanes is not None:
        assert_stays_inside(program, [x])


ROLLS: dict[str, Run] = {
    "one axis": lambda x: x.roll(2, 1),
    "backwards": lambda x: x.roll(-1, -1),
    "two axes": lambda x: torch.roll(x, (-3, -2), (1, 2)),
    "further than it is long": lambda x: x.roll(13, 2),
}


@pytest.mark.parametrize("name", ROLLS)
def test_rolls_are_copies(name: str) -> None:
    assert_native(lambda x: ROLLS[name]((x * 2).unflatten(1, (6, 8, 5))), data(2, 240), lanes=4)


def test_a_roll_along_a_free_extent_may_be_longer_than_it() -> None:
    for tokens in (6, 3, 1):
        assert_native(lambda x: x.roll(4, 1) * 2, data(2, tokens, 8))


def test_a_roll_by_the_whole_extent_does_nothing() -> None:
    graph = simplified(lambda x: x.unflatten(1, (6, 8)).roll(6, 1) * 2, data(2, 48))
    assert [op.label for op in graph.ops if op.kind == "torch"] == ["aten.mul.Tensor"]


def test_a_border_of_nothing_does_nothing() -> None:
    graph = simplified(lambda x: F.pad(x, (0, 0, 0, 0)) * 2, data(2, 48))
    assert [op.label for op in graph.ops if op.kind == "torch"] == ["aten.mul.Tensor"]


def test_parts_that_hold_no_numbers_stay_where_they_are() -> None:
    """A window with fewer columns than others must not look at its neighbour's."""
    x = data(1, 2, 5, 19)
    x[0, 0, 0, 3], x[0, 1, 4, 11], x[0, 1, 2, 8] = torch.nan, torch.inf, torch.inf
    for pool in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d):
        assert_native(lambda x, pool=pool: pool(x, (3, 7)), x)


def test_where_the_largest_lies_is_left_to_torch() -> None:
    def both(x: Tensor) -> Tensor:
        y, index = F.adaptive_max_pool2d(x, 2, return_indices=True)
        return y + index

    assert_native(both, data(1, 3, 8, 8), left=["aten.adaptive_max_pool2d.default"])


def test_standardised_weights_are_constants() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = F.batch_norm(self.weight.reshape(1, 8, -1), None, None, training=True).reshape_as(self.weight)
            return F.conv2d(x, weight, self.bias)

    net, x = nn.Sequential(Standardised(3, 8, 3)).eval(), data(1, 3, 7, 7)
    graph = simplify(capture(net, (x,)))
    assert [op.kind for op in graph.ops] == ["conv2d"]
    assert torch.allclose(reference(graph, (x,)), net(x), atol=1e-5)


# Graphs of files ------------------------------------------------------------------------------------------------------

Shapes = list[tuple[int, ...]]

MISFITS: dict[str, tuple[Run, Shapes, Shapes]] = {  # what is captured, and what a call brings
    "product": (lambda x, y: x @ y, [(2, 13, 7), (2, 7, 33)], [(2, 13, 900), (2, 7, 33)]),
    "product of a turned one": (lambda x, y: x @ y.mT, [(2, 13, 7), (2, 33, 7)], [(2, 13, 9), (2, 33, 7)]),
    "one right matrix": (lambda x, y: x @ y, [(2, 5, 8), (8, 17)], [(2, 5, 8), (5, 17)]),
    "mm": (lambda x, y: x.mm(y), [(6, 8), (8, 17)], [(6, 9), (8, 17)]),
    "bmm of more": (lambda x, y: x.bmm(y), [(3, 4, 8), (3, 8, 31)], [(1, 4, 8), (3, 8, 31)]),
    "group norm": (lambda x: F.group_norm(x, 3), [(2, 6, 5, 7)], [(2, 7, 5, 7)]),
}


@pytest.mark.parametrize("name", MISFITS)
def test_extents_that_do_not_fit_are_an_error(name: str) -> None:
    """A file may leave any extent free, and need no condition of it."""
    run, shapes, others = MISFITS[name]
    program = Program(simplified(run, *(data(*shape) for shape in shapes)), {}, threads=1)
    program.plan(tuple(shapes))
    with pytest.raises(AutopruneError, match="does not take what it is given"):
        program.plan(tuple(others))


def written(*ops: Op, constants: dict[str, Tensor] | None = None, **inputs: Tensor) -> Graph:
    """A graph as a file may hold it, which returns what its last operation computes."""
    given = tuple(Input(name, tuple(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in inputs.items())
    return Graph(given, ops, ops[-1].output, constants or {})


SCORED = [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)]
ATTENDED = Attention("y", ("q", "k", "v", "m"), scale=1.0)


@pytest.mark.parametrize("booleans", [False, True])
@pytest.mark.parametrize("shape", [(6, 7), (2, 7), (2, 5, 7), (5, 9), (4, 1, 5, 7)])
def test_a_mask_that_does_not_fit_is_an_error(shape: tuple[int, ...], booleans: bool) -> None:
    q, k, v = (data(*each) for each in SCORED)
    mask = data(5, 7) > 0 if booleans else data(5, 7)
    program = Program(written(ATTENDED, q=q, k=k, v=v, m=mask), {}, threads=1)
    program.plan((*SCORED, (5, 7)))
    with pytest.raises(AutopruneError, match="does not take what it is given"):
        program.plan((*SCORED, shape))


@pytest.mark.parametrize("shape", [(4, 1, 5, 7), (1, 1, 3, 5, 7)])
def test_a_mask_of_more_than_the_scores_is_left_to_torch(shape: tuple[int, ...]) -> None:
    """Which takes it while nothing is computed, and refuses it then."""
    q, k, v = (data(1, *each[1:]) for each in SCORED)
    mask = data(*shape)
    graph = written(ATTENDED, q=q, k=k, v=v, m=mask)
    assert torch_steps(graph, q, k, v, mask) == ["attention"]
    with pytest.raises(AutopruneError, match="does not take these values"):
        Program(graph, {}, threads=1)(q, k, v, mask)


@pytest.mark.parametrize("groups", [0, -3, 4, 12, 2**40])
def test_groups_that_do_not_part_the_channels_are_an_error(groups: int) -> None:
    x = data(2, 6, 5, 7)
    program = Program(written(TorchOp.of("y", "aten.group_norm.default", ({"ref": "x"}, groups)), x=x), {}, threads=1)
    with pytest.raises(AutopruneError, match="does not take what it is given"):
        program.plan((tuple(x.shape),))


def test_a_number_of_groups_may_be_computed() -> None:
    x = data(2, 6, 5, 7)
    norm = TorchOp.of("y", "aten.group_norm.default", ({"ref": "x"}, {"ref": "n"}))
    program = Program(written(Scalar.of("n", "size", ("x", 0)), norm, x=x), {}, threads=1)
    assert torch.allclose(program(x), F.group_norm(x, 2), atol=1e-5)


def test_booleans_pick_from_arguments_by_name() -> None:
    x, z = data(3, 20), data(1, 20)
    refs: Any = {name: {"ref": name} for name in "mxz"}
    chosen = TorchOp.of("y", "aten.where.self", (refs["m"],), {"other": refs["z"], "self": refs["x"]})
    filled = TorchOp.of("y", "aten.masked_fill.Scalar", (refs["x"],), {"value": 2.0, "mask": refs["m"]})
    for op, wanted in ((chosen, torch.where(x > 0, x, z)), (filled, x.masked_fill(x > 0, 2.0))):
        graph = written(op, m=x > 0, x=x, z=z)
        assert torch_steps(graph, x > 0, x, z) == []
        assert torch.equal(Program(graph, {}, threads=1)(x > 0, x, z), wanted)


@pytest.mark.parametrize("between", [False, True])
def test_what_a_mask_adds_takes_no_name_of_the_graph(between: bool) -> None:
    q, k, v = (data(*shape) for shape in SCORED)
    mask, other = data(5, 7) > 0, data(5, 7)
    named = TorchOp.of("m added", "aten.neg.default", ({"ref": "o"},))
    ops = [*([ATTENDED] if between else []), named, replace(ATTENDED, output="z")]
    graph = written(*ops, q=q, k=k, v=v, m=mask, o=other)
    wanted = F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
    assert torch.allclose(Program(graph, {}, threads=1)(q, k, v, mask, other), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["y before", "y before x"])
def test_a_sum_before_it_is_one_takes_no_name_of_the_graph(name: str) -> None:
    x, more, weight = data(40, 8), data(90, 8), data(8, 8)
    first = Linear("y", ("x", "x"), {"weight": "w"}, activation=None)
    ops = [first, *(replace(first, output=new, inputs=(old,)) for new, old in ((name, "o"), ("z", name)))]
    graph = written(*ops, constants={"w": weight}, x=x, o=more)
    program = Program(graph, {op.output: Weights.of(pack(weight), None) for op in ops}, threads=1)
    assert torch.allclose(program(x, more), more @ weight.T @ weight.T, atol=1e-4)
