"""Activations, layer norm, attention and Linears over tokens: every vector width against torch."""

from __future__ import annotations

from dataclasses import replace

import llvmlite.ir as ir
import pytest
import torch
from torch import Tensor

from autoprune.repack import pack
from autoprune.repack.graph.activations import ACTIVATIONS
from autoprune.repack.graph.ir import Graph, Input
from autoprune.repack.graph.ops import Op, op_from_json
from autoprune.repack.graph.reference import reference as evaluated
from autoprune.repack.graph.schema import validate
from autoprune.repack.kernels import math
from autoprune.repack.kernels.compiler import Target, compile_function, host, narrowed
from autoprune.repack.kernels.ir import FLOATS, I64, at, const, load_vector, loop, store_vector
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.runtime.program import Program

LANES = (4, 8, 16)
INF, NAN = float("inf"), float("nan")


def target_of(lanes: int) -> Target:
    """Any width on any machine: LLVM splits vectors that are wider than its registers."""
    return replace(host(), lanes=16) if lanes == 16 else narrowed(lanes)


def activated(name: str, x: Tensor, target: Target) -> Tensor:
    """Runs one emitter over a multiple of 16 floats."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [FLOATS, FLOATS, I64]), "f")
    source, into, count = function.args
    b = ir.IRBuilder(function.append_basic_block())
    with loop(b, const(0), count, target.lanes) as i:
        value = math.ACTIVATIONS[name](b, module, load_vector(b, at(b, source, i), target.lanes), target.lanes)
        store_vector(b, value, at(b, into, i), target.lanes)
    b.ret_void()
    y = torch.empty_like(x)
    compile_function(module, "f", target, 3)(x.data_ptr(), y.data_ptr(), x.numel())
    return y


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("name", list(math.ACTIVATIONS))
def test_an_activation_is_torchs(name: str, lanes: int) -> None:
    x = torch.cat([torch.linspace(-30, 30, 4000), torch.randn(96) * 1e-3])
    wanted = ACTIVATIONS[name](x.double())
    assert (activated(name, x, target_of(lanes)) - wanted).abs().max() <= 5e-7 * wanted.abs().max()


@pytest.mark.parametrize("name", list(math.ACTIVATIONS))
def test_an_activation_passes_what_is_not_finite(name: str) -> None:
    x = torch.tensor([NAN, INF, 1e30, 1e4] * 4)
    assert torch.equal(activated(name, x, host()).isnan(), x.isnan())
    wanted = ACTIVATIONS[name](x.double()).float()  # with AVX-512, torch's own float32 GELU of infinity is not a number
    assert torch.allclose(activated(name, x, host()), wanted, equal_nan=True)


def test_every_activation_of_a_graph_has_a_kernel() -> None:
    assert set(ACTIVATIONS) == set(math.ACTIVATIONS) | {"relu", "relu6"}
    assert all((math.clamp_bounds(name) is None) == (name in math.ACTIVATIONS) for name in ACTIVATIONS)


def run(op: Op, constants: dict[str, Tensor], inputs: tuple[Tensor, ...], target: Target) -> tuple[Tensor, Tensor]:
    """One operation as a program, and by torch."""
    names = [Input(name, tuple(x.shape), "float32") for name, x in zip(op.inputs, inputs, strict=True)]
    graph = Graph(tuple(names), (op,), op.output, constants)
    return Program(graph, {}, target=target, threads=1)(*inputs), evaluated(graph, inputs)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("features", [1, 3, 8, 17, 64, 70])
@pytest.mark.parametrize("affine", [False, True])
def test_layer_norm_is_torchs(lanes: int, features: int, affine: bool) -> None:
    torch.manual_seed(features)
    x = torch.randn(2, 5, features) * 3 + 1
    constants = {"w": torch.randn(features), "b": torch.randn(features)} if affine else {}
    tensors = {"weight": "w", "bias": "b"} if affine else {}
    op = op_from_json("layer_norm", "y", ("x",), {"size": features, "eps": 1e-5}, tensors)
    got, wanted = run(op, constants, (x,), target_of(lanes))
    assert torch.allclose(got, wanted, atol=2e-6)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize(("queries", "keys", "width"), [(1, 1, 1), (5, 5, 7), (6, 13, 16), (7, 33, 20), (40, 9, 64)])
def test_attention_is_torchs(lanes: int, queries: int, keys: int, width: int) -> None:
    torch.manual_seed(keys)
    q = torch.randn(2, 3, queries, width)
    k, v = torch.randn(2, 2, 3, keys, width).unbind(0)
    op = op_from_json("attention", "y", ("q", "k", "v"), {"scale": width**-0.5})
    got, wanted = run(op, {}, (q, k, v), target_of(lanes))
    assert torch.allclose(got, wanted, atol=2e-6)


def test_attention_reads_and_writes_through_views() -> None:
    """One Linear's output taken apart by views, as transformers do it: nothing is copied."""
    torch.manual_seed(0)
    x = torch.randn(2, 11, 3 * 4 * 5)
    ops = (
        op_from_json("reshape", "r", ("x",), {"shape": [2, 11, 3, 4, 5]}),
        op_from_json(
            "torch", "p", ("r",), {"op": "aten.permute.default", "args": [{"ref": "r"}, [2, 0, 3, 1, 4]], "kwargs": {}}
        ),
        *(
            op_from_json("torch", name, ("p",), {"op": "aten.select.int", "args": [{"ref": "p"}, 0, i], "kwargs": {}})
            for i, name in enumerate("qkv")
        ),
        op_from_json("attention", "a", ("q", "k", "v"), {"scale": 0.5}),
        op_from_json("torch", "t", ("a",), {"op": "aten.transpose.int", "args": [{"ref": "a"}, 1, 2], "kwargs": {}}),
        op_from_json("reshape", "y", ("t",), {"shape": [2, 11, 20]}),
    )
    graph = validate(Graph((Input("x", (2, 11, 60), "float32"),), ops, "y", {}))
    program = Program(graph, {}, threads=1)
    assert torch.allclose(program(x), evaluated(graph, (x,)), atol=2e-6)
    assert len(program.plan(((2, 11, 60),)).parts) == 1


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_a_linear_with_a_residual(lanes: int, size: int, activation: str | None) -> None:
    torch.manual_seed(size)
    for tokens, features, out in ((1, 9, 20), (7, 33, 16), (26, 40, 37)):
        weight, bias = torch.randn(out, features) * (torch.rand(out, features) < 0.5), torch.randn(out)
        x, other = torch.randn(tokens, features), torch.randn(tokens, out)
        for rows in ([*range(out)], torch.randperm(out).tolist()):  # in order, and scattered
            w, b = weight[rows], bias[rows]
            op = op_from_json("linear", "y", ("x", "r"), {"activation": activation}, {"weight": "w", "bias": "b"})
            inputs = (Input("x", tuple(x.shape), "float32"), Input("r", tuple(other.shape), "float32"))
            graph = Graph(inputs, (op,), "y", {"w": w, "b": b})
            program = Program(graph, {"y": Weights.of(pack(w, 1, size), b)}, threads=1, target=target_of(lanes))
            assert torch.allclose(program(x, other), evaluated(graph, (x, other)), atol=1e-5)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("size", [1, 4, 8, 16])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("panel", [3, 64, 10**6])
def test_panels_change_nothing(lanes: int, size: int, stride: int, panel: int) -> None:
    torch.manual_seed(size)
    weight = torch.randn(21, 7, 3, 3) * (torch.rand(21, 7, 3, 3) < 0.5)
    x = torch.randn(2, 7, 13, 11)
    attributes = {"stride": [stride] * 2, "padding": [1, 1], "dilation": [1, 1], "groups": 1, "activation": "silu"}
    op = op_from_json("conv2d", "y", ("x",), attributes, {"weight": "w"})
    graph = Graph((Input("x", tuple(x.shape), "float32"),), (op,), "y", {"w": weight})
    weights = {"y": Weights.of(pack(weight, 1, size), None)}
    tiling = {"y": Tiling(size, 40, 2, True, panel, serpentine=stride == 1)}
    for threads in (1, 3):
        program = Program(graph, weights, tiling, threads=threads, target=target_of(lanes))
        assert torch.allclose(program(x), evaluated(graph, (x,)), atol=1e-5)
