"""Capturing a model as a graph, simplifying it, and its form in files."""

from __future__ import annotations

import copy
import json
import math
from functools import cache
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.errors import FileError
from autoprune.repack import repack
from autoprune.repack.graph import aten, schema
from autoprune.repack.graph.capture import capture
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.ops import op_from_json
from autoprune.repack.graph.passes import simplify
from autoprune.repack.graph.reference import reference
from autoprune.repack.graph.torch_export import CaptureError
from autoprune.tasks.zoo import build_model


def settled(model: nn.Module) -> nn.Module:
    """In eval mode, with batch norms that do something."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.3)
                nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def same(given: Any, wanted: Any) -> bool:
    """Whether two outputs have one structure and, up to rounding, one value."""
    if isinstance(wanted, Tensor):
        return given.shape == wanted.shape and torch.allclose(given, wanted, rtol=1e-4, atol=1e-4)
    if isinstance(wanted, (list, tuple)):
        return type(given) is type(wanted) and len(given) == len(wanted) and all(map(same, given, wanted))
    if isinstance(wanted, dict):
        return list(given) == list(wanted) and all(same(given[key], wanted[key]) for key in wanted)
    return type(given) is type(wanted) and given == wanted


def check(model: nn.Module, *shape: int, dynamic: bool = True) -> Graph:
    """Captures with a batch of 1 and compares for batches of 1 and 5; returns the simplified graph."""
    settled(model)
    graph = capture(model, (torch.randn(shape),))
    assert graph.inputs[0].batched == dynamic
    small = simplify(graph)
    for batch in (1, 5) if dynamic else shape[:1]:
        x = torch.randn(batch, *shape[1:])
        with torch.no_grad():
            wanted = model(x.clone())
            assert same(reference(graph, (x,)), wanted)
            assert same(reference(small, (x,)), wanted)
    read = schema.from_json(json.loads(json.dumps(schema.to_json(small), allow_nan=False)), small.constants)
    assert (read.inputs, read.ops, read.outputs) == (small.inputs, small.ops, small.outputs)
    return small


def kinds(graph: Graph) -> list[str]:
    return [op.attributes.get("op", op.kind) for op in graph.ops]


class Call(nn.Module):
    """A function of a tensor and a convolution as a model."""

    def __init__(self, run: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def conv(channels_in: int = 3, channels_out: int = 4, size: int = 3, **more: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels_in, channels_out, size, **more)


# Models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "left"),
    [
        ("residual_cnn", {"widths": [4, 8], "blocks": 2}, ["conv2d"] * 10 + ["global_avg_pool", "linear"]),
        ("plain_cnn", {"widths": [4, 8]}, ["conv2d"] * 2 + ["global_avg_pool", "linear"]),
        ("mlp", {"widths": [8, 8]}, ["scalar", "reshape"] + ["linear"] * 3),
    ],
)
def test_zoo(name: str, args: dict[str, Any], left: list[str]) -> None:
    model = build_model(name, args, in_channels=3, size=8, classes=5, seed=0)
    small = check(model, 1, 3, 8, 8)
    assert kinds(small) == left
    names = {op.attributes["layer"] for op in small.ops if op.kind in ("conv2d", "linear")}
    assert names == {n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def test_residual_and_activation_are_fused() -> None:
    model = build_model("residual_cnn", {"widths": [4], "blocks": 1}, in_channels=3, size=8, classes=5, seed=0)
    stem, first, second = check(model, 1, 3, 8, 8).ops[:3]
    assert second.inputs == (first.output, stem.output)
    assert [op.last_activation for op in (stem, first, second)] == ["relu"] * 3


def test_depthwise_network() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = F.relu6(m.n1(m.expand(x)))
        y = F.hardtanh(m.n2(m.depth(y)), 0, 6)
        return cast("Tensor", x + m.n3(m.project(y)))

    model = Call(
        run,
        expand=conv(4, 8, 1, bias=False),
        n1=nn.BatchNorm2d(8),
        depth=conv(8, 8, groups=8, padding=1, bias=False),
        n2=nn.BatchNorm2d(8),
        project=conv(8, 4, 1, bias=False),
        n3=nn.BatchNorm2d(4),
    )
    small = check(model, 1, 4, 6, 6)
    assert [(op.kind, op.last_activation) for op in small.ops] == [("conv2d", "relu6")] * 2 + [("conv2d", None)]


def test_transformers() -> None:
    model = build_model(
        "tiny_transformer", {"width": 8, "heads": 2, "blocks": 1}, in_channels=3, size=8, classes=5, seed=0
    )
    assert kinds(check(model, 1, 3, 8, 8)).count("attention") == 1
    model = build_model(
        "vit_small", {"width": 8, "heads": 2, "blocks": 1, "patch": 4}, in_channels=3, size=8, classes=5, seed=0
    )
    small = check(model, 1, 3, 8, 8)
    assert {"attention", "layer_norm"} < set(kinds(small))
    assert "gelu" in [op.last_activation for op in small.ops]


def test_text_encoder_takes_words() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4)).eval()
    graph = simplify(capture(model, (torch.randint(10, (2, 6)),)))
    assert graph.inputs[0].dtype == "int64"
    words = torch.randint(10, (3, 6))
    assert same(reference(graph, (words,)), model(words))


ONE_LINERS: dict[str, tuple[Any, str]] = {
    "relu": (lambda m, x: F.relu(m.c(x)), "relu"),
    "relu in place": (lambda m, x: F.relu(m.c(x), inplace=True), "relu"),
    "clamp": (lambda m, x: m.c(x).clamp(0, 6), "relu6"),
    "clamp min": (lambda m, x: m.c(x).clamp_min(0), "relu"),
    "silu": (lambda m, x: F.silu(m.c(x), inplace=True), "silu"),
    "gelu": (lambda m, x: F.gelu(m.c(x)), "gelu"),
    "leaky relu": (lambda m, x: F.leaky_relu(m.c(x)), "leaky_relu_0.01"),
    "leaky relu, steeper": (lambda m, x: F.leaky_relu(m.c(x), 0.2, inplace=True), "leaky_relu_0.2"),
    "gelu tanh": (lambda m, x: F.gelu(m.c(x), approximate="tanh"), "gelu_tanh"),
    "sigmoid": (lambda m, x: m.c(x).sigmoid(), "sigmoid"),
    "tanh": (lambda m, x: torch.tanh(m.c(x)), "tanh"),
    "hardswish": (lambda m, x: F.hardswish(m.c(x)), "hardswish"),
    "hardsigmoid": (lambda m, x: F.hardsigmoid(m.c(x)), "hardsigmoid"),
}


@pytest.mark.parametrize("name", ONE_LINERS)
def test_activations_go_into_the_layer(name: str) -> None:
    run, activation = ONE_LINERS[name]
    small = check(Call(run, c=conv()), 1, 3, 5, 5)
    assert [(op.kind, op.last_activation) for op in small.ops] == [("conv2d", activation)]


ODD: dict[str, tuple[Any, list[str] | None]] = {
    "two outputs": (lambda m, x: (m.c(x), m.d(x)), ["conv2d", "conv2d"]),
    "a dictionary": (lambda m, x: {"a": m.c(x), "b": [m.d(x), None, 3, x.shape[0]]}, ["scalar", "conv2d", "conv2d"]),
    "its own input": (lambda m, x: (x, m.c(x)), ["conv2d"]),
    "one weight twice": (lambda m, x: m.c(x) + m.c(x * 2), ["aten.mul.Tensor", "conv2d", "conv2d"]),
    "a layer that is read twice": (
        lambda m, x: F.relu(m.c(x)) + m.c(x).neg(),
        ["conv2d", "conv2d", "aten.neg.default", "add"],
    ),
    "an output that is used on": (lambda m, x: (y := m.c(x), F.relu(y)), ["conv2d", "activation"]),
    "the same sum": (lambda m, x: (y := m.c(x)) + y, ["conv2d", "add"]),
    "max pool": (lambda m, x: F.max_pool2d(m.c(x), 3, 2, 1), ["conv2d", "max_pool2d"]),
    "max pool, ceiling": (lambda m, x: F.max_pool2d(m.c(x), 2, ceil_mode=True), ["conv2d", "max_pool2d"]),
    "average pool": (lambda m, x: F.avg_pool2d(m.c(x), 2), ["conv2d", "avg_pool2d"]),
    "average pool, border": (
        lambda m, x: F.avg_pool2d(m.c(x), 3, 1, 1, count_include_pad=False),
        ["conv2d", "avg_pool2d"],
    ),
    "pool to 1x1": (lambda m, x: F.adaptive_avg_pool2d(m.c(x), 1).flatten(1), ["conv2d", "global_avg_pool"]),
    "mean": (lambda m, x: m.c(x).mean((-1, 2)), ["conv2d", "global_avg_pool"]),
    "pool to parts": (lambda m, x: F.adaptive_avg_pool2d(m.c(x), (2, 4)), ["conv2d", "adaptive_avg_pool2d"]),
    "pool that does nothing": (lambda m, x: F.adaptive_avg_pool2d(m.c(x), 4), ["conv2d", "adaptive_avg_pool2d"]),
    "dropout": (lambda m, x: F.dropout(m.c(x), 0.5, m.training), ["conv2d"]),
    "clones": (lambda m, x: m.c(x.contiguous().clone().float()).detach(), ["conv2d"]),
    "reshape and back": (lambda m, x: F.relu(m.c(x).flatten(1).view(-1, 4, 4, 4)), ["conv2d"]),
    "infinity": (lambda m, x: m.c(x).masked_fill(x[:, :1, 1:-1, 1:-1] < 0, -math.inf).relu(), None),
    "several results": (lambda m, x: m.c(x).chunk(2, 1), ["conv2d", "aten.chunk.default", "aten.chunk.default"]),
    "a view that is written": (lambda m, x: _written(m.c(x)), None),
    "no gradient": (lambda m, x: torch.no_grad()(lambda: F.relu(m.c(x)))(), ["conv2d"]),
    "one of two results": (lambda m, x: m.c(x).max(1).values, ["conv2d", "aten.max.dim"]),
}


def _written(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0].add_(1)
    return y.view(y.shape[0], -1).mul_(3)


@pytest.mark.parametrize("name", ODD)
def test_odd_models(name: str) -> None:
    run, left = ODD[name]
    small = check(Call(run, c=conv(), d=conv(3, 5, 1)), 1, 3, 6, 6)
    assert left is None or kinds(small) == left


def test_same_padding() -> None:
    assert kinds(check(nn.Sequential(conv(padding="same", dilation=2)), 1, 3, 6, 6)) == ["conv2d"]
    for even in (conv(size=2, padding="same"), conv(size=4, padding="same", dilation=3)):
        assert kinds(check(nn.Sequential(even), 1, 3, 6, 6)) == ["aten.pad.default", "conv2d"]
    assert kinds(check(nn.Sequential(conv(padding="valid")), 1, 3, 6, 6)) == ["conv2d"]


def test_products_with_constants_are_layers() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 4))
            self.b = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.addmm(self.b, x, self.w).relu()
            return y @ self.w.t() + F.linear(y, self.w)

    small = check(Products(), 1, 6)
    assert kinds(small) == ["linear"] * 3
    assert {op.attributes["layer"] for op in small.ops} <= {"w", "permute.folded", "t.folded"}


def test_batch_norms() -> None:
    norm = nn.BatchNorm2d(3)
    small = check(nn.Sequential(norm, nn.ReLU(), conv(), nn.BatchNorm2d(4, affine=False)), 1, 3, 5, 5)
    assert [op.kind for op in small.ops] == ["conv2d", "conv2d"]
    assert small.ops[0].attributes["groups"] == 3
    assert kinds(check(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), 2, 4)) == ["linear"]
    # behind a Linear with tokens it normalises the tokens
    left = kinds(check(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), 2, 5, 4))
    assert [kind for kind in left if kind != "scalar"] == ["linear", "reshape", "conv2d", "reshape"]


def test_batch_norms_of_rows() -> None:
    class Rows(nn.Module):
        """As LeViT normalises the tokens of a Linear."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            return F.relu(self.norm(y.flatten(0, 1)).reshape_as(y))

    rows = [op for op in check(Rows(), 2, 3, 4).ops if op.kind not in ("scalar", "reshape")]
    assert [(op.kind, op.last_activation) for op in rows] == [("linear", "relu")]
    before = check(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU()), 2, 4)
    assert kinds(before) == ["linear"]
    alone = check(nn.Sequential(nn.BatchNorm1d(4), nn.Tanh()), 2, 4)
    assert kinds(alone) == ["aten.mul.Tensor", "aten.add.Tensor", "activation"]
    twice = check(Call(lambda m, x: (y := m.n(x), m.l(y)), n=nn.BatchNorm1d(4), l=nn.Linear(4, 5)), 2, 4)
    assert kinds(twice) == ["aten.mul.Tensor", "aten.add.Tensor", "linear"]


BORDERS: dict[str, tuple[Any, list[str]]] = {
    "alike": (lambda m, x: m.c(F.pad(x, (2, 2, 1, 1))), ["conv2d"]),
    "columns": (lambda m, x: m.c(F.pad(x, (1, 1))), ["conv2d"]),
    "twice": (lambda m, x: m.c(F.pad(F.pad(x, (1, 1)), (0, 0, 2, 2))), ["conv2d"]),
    "read by two": (lambda m, x: m.c(y := F.pad(x, (1, 1, 1, 1))) + m.d(y), ["conv2d", "conv2d"]),
    "at one side": (lambda m, x: m.c(F.pad(x, (0, 1, 0, 1))), ["aten.pad.default", "conv2d"]),
    "of ones": (lambda m, x: m.c(F.pad(x, (1, 1, 1, 1), value=1.0)), ["aten.pad.default", "conv2d"]),
    "that is cut": (lambda m, x: m.c(F.pad(x, (-1, -1, 0, 0))), ["aten.pad.default", "conv2d"]),
    "of reflections": (lambda m, x: m.c(F.pad(x, (1, 1, 1, 1), "reflect")), ["aten.pad.default", "conv2d"]),
}


@pytest.mark.parametrize("name", BORDERS)
def test_borders_of_zeros_go_into_the_convolution(name: str) -> None:
    run, left = BORDERS[name]
    small = check(Call(run, c=conv(stride=2), d=conv(stride=2)), 1, 3, 7, 9)
    assert kinds(small) == left


def test_zeros_survive_folding() -> None:
    layer = conv()
    with torch.no_grad():
        layer.weight[1:3, :, 0] = 0
    small = check(nn.Sequential(layer, nn.BatchNorm2d(4)), 1, 3, 5, 5)
    assert torch.equal(small.constants[small.ops[0].tensors["weight"]] == 0, layer.weight == 0)


def test_made_for_one_batch_size() -> None:
    model = Call(lambda m, x: m.c(x).reshape(2, -1), c=conv())
    small = check(model, 2, 3, 4, 4, dynamic=False)
    assert kinds(small)[0] == "conv2d"


def test_several_inputs() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
            return (x + y) * scale

    graph = simplify(capture(Two(), (torch.randn(1, 4), torch.randn(1, 4), torch.randn(4))))
    assert [each.batched for each in graph.inputs] == [True, True, False]
    given = (torch.randn(3, 4), torch.randn(3, 4), torch.randn(4))
    assert same(reference(graph, given), (given[0] + given[1]) * given[2])


def test_model_is_left_as_it_is() -> None:
    model = settled(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True))).train()
    before = copy.deepcopy(model.state_dict())
    simplify(capture(model, (torch.randn(2, 3, 5, 5),)))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


REFUSED: dict[str, Any] = {
    "branches on data": lambda m, x: m.c(x) if x.sum() > 0 else x,
    "writes its input": lambda m, x: x.add_(1),
    "draws random numbers": lambda m, x: F.dropout(m.c(x), 0.5, training=True),
    "random attention": lambda m, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "returns an object": lambda m, x: iter([m.c(x)]),
    "complex numbers": lambda m, x: torch.fft.fft(m.c(x)).abs(),
    "a shape that hangs on data": lambda m, x: m.c(x).flatten().nonzero(),
    "uninitialised memory": lambda m, x: torch.empty_like(x),
    "raises": lambda m, x: x.no_such_method(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured(name: str) -> None:
    with pytest.raises(CaptureError):
        capture(Call(REFUSED[name], c=conv()).eval(), (torch.randn(1, 3, 6, 6),))


def test_updating_statistics_is_refused() -> None:
    class Stubborn(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> Any:
            return super().train(True)

    with pytest.raises(CaptureError, match="buffers"):
        capture(Stubborn(3), (torch.randn(2, 3, 4, 4),))


def test_a_mask_by_where_is_part_of_the_weight() -> None:
    def masked(m: Any, x: Tensor) -> Tensor:
        kept = (torch.arange(m.c.weight.numel()) % 2 == 0).view_as(m.c.weight)
        return nn.functional.conv2d(x, torch.where(kept, m.c.weight, 0.0))

    graph = capture(Call(masked, c=conv()).eval(), (torch.randn(1, 3, 6, 6),))
    (op,) = graph.ops
    assert int((graph.constants[op.tensors["weight"]] == 0).sum()) >= graph.constants[op.tensors["weight"]].numel() // 2


@pytest.mark.parametrize(
    "given", [torch.eye(2).to_sparse(), torch.ones(2, device="meta"), {"x": [torch.eye(2).to_sparse()]}]
)
def test_inputs_that_are_no_dense_tensors(given: Any) -> None:
    with pytest.raises(CaptureError, match="inputs"):
        capture(nn.Identity(), (given,))


# Dead channels ------------------------------------------------------------------------------------------------------


def filters(graph: Graph) -> list[int]:
    return [len(graph.constants[op.tensors["weight"]]) for op in graph.ops if "weight" in op.tensors]


@torch.no_grad()
def test_dead_filters_go() -> None:
    first, second = conv(3, 6, padding=1), conv(6, 4, padding=1)
    first.weight[1:3] = 0
    assert first.bias is not None
    first.bias[1], first.bias[2] = -1.0, 1.0  # a ReLU makes the one zero; the other is seen at the border
    assert filters(check(nn.Sequential(first, nn.ReLU(), second), 1, 3, 5, 5)) == [5, 4]
    second.padding = (0, 0)
    assert filters(check(nn.Sequential(first, nn.ReLU(), second), 1, 3, 5, 5)) == [4, 4]


@torch.no_grad()
def test_unread_channels_go_back_through_the_network() -> None:
    layers = [
        conv(3, 6, padding=1),
        nn.ReLU(),
        conv(6, 6, groups=6, padding=1),
        nn.MaxPool2d(2),
        conv(6, 4),
        nn.Flatten(),
    ]
    head = nn.Linear(16, 3)
    assert isinstance(layers[4], nn.Conv2d)
    layers[4].weight[:, 2] = 0
    head.weight[:, 4:8] = 0
    small = check(nn.Sequential(*layers, head), 1, 3, 8, 8)
    assert filters(small) == [5, 5, 3, 3]
    assert small.ops[1].attributes["groups"] == 5


@torch.no_grad()
def test_constants_go_through_depthwise_layers() -> None:
    stem, depth, head = conv(3, 4, 1), conv(4, 4, padding=1, groups=4), conv(4, 2)
    stem.weight[1] = 0
    net = nn.Sequential(stem, depth, head)
    assert filters(check(net, 1, 3, 6, 6)) == [4, 4, 2]  # the constant differs at the border
    depth.padding = (0, 0)
    assert filters(check(net, 1, 3, 6, 6)) == [3, 3, 2]
    depth.padding = (1, 1)
    depth.weight[1:3] = 0
    assert filters(check(net, 1, 3, 6, 6)) == [2, 2, 2]


@torch.no_grad()
def test_channels_of_a_residual_go_together() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x).relu()
        return cast("Tensor", m.head((y + m.block(y)).relu().mean((2, 3))))

    stem, block, head = conv(3, 6), conv(6, 6, padding=1), nn.Linear(6, 2)
    stem.weight[1] = block.weight[1] = 0
    block.weight[2] = 0
    head.weight[:, 3] = 0
    small = check(Call(run, stem=stem, block=block, head=head), 1, 3, 6, 6)
    assert filters(small)[0] in (5, 6)  # filter 1 shows at the border of `block` unless its bias is negative
    assert stem.bias is not None
    stem.bias[1] = -1.0
    assert filters(check(Call(run, stem=stem, block=block, head=head), 1, 3, 6, 6)) == [5, 5, 2]


@torch.no_grad()
def test_what_is_returned_keeps_its_channels() -> None:
    layer = conv(3, 6)
    layer.weight[:3] = 0
    assert filters(check(nn.Sequential(layer, nn.ReLU()), 1, 3, 5, 5)) == [6]


@torch.no_grad()
def test_groups_that_share_their_zeros_stay_whole() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(32, 16), nn.Linear(16, 4)
    mask = torch.rand(2, 1, 32) < 0.3
    first.weight.mul_(mask.expand(2, 8, 32).reshape(16, 32))
    second.weight[:, :3] = 0  # three of a group of eight
    assert filters(check(nn.Sequential(first, nn.ReLU(), second), 1, 32)) == [16, 4]
    second.weight[:, :8] = 0
    assert filters(check(nn.Sequential(first, nn.ReLU(), second), 1, 32)) == [8, 4]


@torch.no_grad()
def test_one_channel_always_stays() -> None:
    first, second = conv(3, 6), conv(6, 4)
    second.weight.zero_()
    assert filters(check(nn.Sequential(first, second), 1, 3, 6, 6)) == [1, 4]


@pytest.mark.slow
@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), share=st.sampled_from([0.2, 0.5, 0.8]), padding=st.sampled_from([0, 1]))
def test_removing_channels_changes_nothing(seed: int, share: float, padding: int) -> None:
    graph = random_net(padding)
    rng = torch.Generator().manual_seed(seed)
    constants = {}
    for name, value in graph.constants.items():
        value = value.clone()
        if value.ndim > 1:
            value[torch.rand(len(value), generator=rng) < share] = 0
            value[:, torch.rand(value.shape[1], generator=rng) < share / 2] = 0
        constants[name] = value * torch.randn(1, generator=rng).sign()
    zeroed = Graph(graph.inputs, graph.ops, graph.outputs, constants)
    small = simplify(zeroed)
    assert sum(filters(small)) <= sum(filters(zeroed))
    x = torch.randn(2, 3, 12, 12, generator=rng)
    assert torch.allclose(reference(small, (x,)), reference(zeroed, (x,)), rtol=1e-4, atol=1e-5)


class _Random(nn.Module):
    """Every operation that channels pass through."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.a, self.b = conv(3, 6, padding=padding), conv(6, 8, 1), conv(8, 6, 1)
        self.depth, self.c = conv(6, 6, padding=padding, groups=6), conv(6, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.hardswish(self.stem(x)), 2)
        x = F.relu(x + self.b(F.silu(self.a(x))))
        x = F.avg_pool2d(F.relu6(self.depth(x)), 3, 1, 1) if self.depth.padding[0] else F.relu(self.depth(x))
        x = F.adaptive_avg_pool2d(torch.sigmoid(self.c(x)), 1).flatten(1)
        x = torch.tanh(self.fc1(x))
        out: Tensor = self.fc3(F.gelu(self.fc2(x) + x))
        return out


@cache
def random_net(padding: int) -> Graph:
    return capture(_Random(padding), (torch.randn(1, 3, 12, 12),))


# Files --------------------------------------------------------------------------------------------------------------


def _graph() -> Graph:
    model = nn.Sequential(
        conv(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 6), nn.LayerNorm(6), nn.Softmax(1)
    )
    return simplify(capture(model, (torch.randn(1, 3, 6, 6),)))


GRAPH = _graph()


def test_reading_back() -> None:
    read = schema.from_json(json.loads(json.dumps(schema.to_json(GRAPH))), GRAPH.constants)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(reference(read, (x,)), reference(GRAPH, (x,)))


def _set(*path: Any) -> Any:
    """An edit of a graph's JSON: all but the last of `path` lead to what becomes the last."""

    def edit(data: Any) -> None:
        *way, key, value = path
        for step in way:
            data = data[step]
        data[key] = value

    return edit


_AT = {op.kind: index for index, op in enumerate(GRAPH.ops)}


def _attribute(kind: str, name: str, value: Any) -> Any:
    return _set("ops", _AT[kind], "attributes", name, value)


CORRUPT: dict[str, Any] = {
    "unknown kind": _set("ops", 0, "kind", "conv9d"),
    "kind is a list": _set("ops", 0, "kind", []),
    "reads the future": _set("ops", 0, "inputs", [GRAPH.ops[-1].output]),
    "no input": _set("ops", _AT["conv2d"], "inputs", []),
    "too many inputs": _set("ops", _AT["conv2d"], "inputs", [GRAPH.inputs[0].name] * 3),
    "input is a number": _set("ops", _AT["conv2d"], "inputs", [1]),
    "defined twice": _set("ops", 1, "output", GRAPH.ops[0].output),
    "output is null": _set("ops", 1, "output", None),
    "extra field": _set("ops", 0, "more", 1),
    "returns nothing known": _set("outputs", "nowhere"),
    "returns a bad structure": _set("outputs", {"set": []}),
    "returns a bad dictionary": _set("outputs", {"dict": [[1.5, None]]}),
    "returns a key twice": _set("outputs", {"ordered": [["a", None], ["a", 1]]}),
    "returns a record of numbers": _set("outputs", {"record": [[1, None]]}),
    "returns a bad text": _set("outputs", {"text": 1}),
    "returns infinity": _set("outputs", math.inf),
    "stride of zero": _attribute("conv2d", "stride", [0, 1]),
    "stride is true": _attribute("conv2d", "stride", [True, 1]),
    "stride of one number": _attribute("conv2d", "stride", [1]),
    "stride too large": _attribute("conv2d", "stride", [2**40, 1]),
    "negative padding": _attribute("conv2d", "padding", [0, -1]),
    "groups": _attribute("conv2d", "groups", 3),
    "fractional groups": _attribute("conv2d", "groups", 1.0),
    "unknown activation": _attribute("conv2d", "activation", "__import__"),
    "activation is a list": _attribute("conv2d", "activation", ["relu"]),
    "unknown attribute": _attribute("conv2d", "mode", 1),
    "pool kernel": _attribute("max_pool2d", "kernel", [0, 2]),
    "pool padding": _attribute("max_pool2d", "padding", [2, 2]),
    "norm size": _attribute("layer_norm", "size", 7),
    "norm eps": _attribute("layer_norm", "eps", math.nan),
    "reshape by a word": _attribute("reshape", "shape", ["2", 3]),
    "reshape by two guesses": _attribute("reshape", "shape", [-1, -1]),
    "reshape by an unknown": _attribute("reshape", "shape", [{"ref": "nowhere"}, 16]),
    "no weight": _set("ops", _AT["linear"], "tensors", {}),
    "missing weight": _set("ops", _AT["linear"], "tensors", {"weight": "nowhere"}),
    "weight of another rank": _set(
        "ops", _AT["linear"], "tensors", "weight", GRAPH.ops[_AT["conv2d"]].tensors["weight"]
    ),
    "bias of another layer": _set("ops", _AT["linear"], "tensors", "bias", GRAPH.ops[_AT["conv2d"]].tensors["bias"]),
    "operator that reads files": _attribute("torch", "op", "aten.from_file.default"),
    "operator that writes": _attribute("torch", "op", "aten.relu_.default"),
    "operator by attribute": _attribute("torch", "op", "aten.__class__.mro"),
    "operator of Python": _attribute("torch", "op", "os.system.default"),
    "operator is null": _attribute("torch", "op", None),
    "argument is an object": _attribute("torch", "args", [{"eval": "1"}]),
    "argument refers nowhere": _attribute("torch", "args", [{"ref": "nowhere"}]),
    "argument is infinite": _attribute("torch", "args", [math.inf]),
    "argument of no type": _attribute("torch", "args", [{"dtype": "load"}]),
    "item is negative": _attribute("torch", "item", -1),
    "scalar function": _attribute("scalar", "fn", "pow"),
    "scalar of one": _attribute("scalar", "args", [1]),
    "size of a number": _attribute("scalar", "args", [1, 1]),
    "scalar of another": _attribute("scalar", "args", [GRAPH.ops[0].output, 0]),
    "input type": _set("inputs", 0, "dtype", "float31"),
    "input shape": _set("inputs", 0, "shape", [1, -3, 6, 6]),
    "input free": _set("inputs", 0, "free", 1),
    "input axis": _set("inputs", 0, "free", [-1]),
    "input axes": _set("inputs", 0, "free", [0, None, 1, 2, 3]),
    "input twice": _set("inputs", schema.to_json(GRAPH)["inputs"] * 2),
    "no operations": _set("ops", {}),
    "operation is a number": _set("ops", 0, 1),
    "top-level field": _set("extra", 1),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_files_are_refused(name: str) -> None:
    data = json.loads(json.dumps(schema.to_json(GRAPH)))
    CORRUPT[name](data)
    with pytest.raises(FileError):
        schema.from_json(data, GRAPH.constants)


@pytest.mark.parametrize("data", [None, [], {}, "graph", {"inputs": [], "ops": []}])
def test_what_is_no_graph(data: Any) -> None:
    with pytest.raises(FileError):
        schema.from_json(data, {})


def test_deep_nesting_is_refused() -> None:
    outputs: Any = None
    for _ in range(5000):
        outputs = {"list": [outputs]}
    with pytest.raises(FileError, match="deeply"):
        schema.from_json({**schema.to_json(GRAPH), "outputs": outputs}, GRAPH.constants)


@pytest.mark.parametrize(
    "name",
    [
        "aten.from_file.default",
        "aten.empty.memory_format",
        "aten.as_strided.default",
        "aten.rand.default",
        "aten.relu_.default",
        "aten.add.out",
        "aten.nonzero.default",
        "aten.item.default",
        "aten.resize.default",
        "aten._fft_r2c.default",
        "aten.upsample_nearest2d.default",
        "aten.no_such.default",
        "aten.add",
        "aten.add.Tensor.more",
        "prims.add.default",
        "aten..default",
    ],
)
def test_operators_that_no_graph_may_hold(name: str) -> None:
    with pytest.raises(FileError, match="not one that a graph may hold"):
        aten.resolve(name)


def test_readers_and_writers() -> None:
    assert GRAPH.producers()[GRAPH.ops[0].output] == GRAPH.ops[0]
    readers = GRAPH.consumers()
    assert [op.kind for op in readers[GRAPH.ops[_AT["conv2d"]].output]] == ["max_pool2d"]
    assert readers[GRAPH.output_names()[0]] == []
    assert op_from_json("reshape", "y", ("x",), {"shape": [{"ref": "n"}, 4]}).reads == ("x", "n")


def test_a_part_that_is_set_to_zero_in_place_is_zero() -> None:
    """As Swin v2 silences the bias of its keys."""

    class Silenced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            bias = self.linear.bias.clone()
            bias[2:4].zero_()
            return F.linear(x, self.linear.weight, bias)

    torch.manual_seed(0)
    model, x = Silenced().eval(), torch.randn(3, 6)
    fast = repack(model, x, form="program")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
