"""The native kernels: every vector width, no read or write outside a buffer, and calls that must fail."""

from __future__ import annotations

import copy
import ctypes
import itertools
import math
import mmap
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError, FileError
from autoprune.patterns import PATTERNS
from autoprune.registry import Choice
from autoprune.repack import pack
from autoprune.repack.graph.ir import Graph, Input
from autoprune.repack.graph.ops import LayerOp, Op, op_from_json
from autoprune.repack.graph.reference import reference
from autoprune.repack.graph.schema import validate
from autoprune.repack.kernels.compiler import Target, host, narrowed
from autoprune.repack.kernels.rows_gemm import Twin
from autoprune.repack.lowering import buffers
from autoprune.repack.lowering.conv_rules import is_depthwise
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.lowering.layout import ALIGN
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.modules.layers import PackedConv2d, PackedLayer, PackedLinear
from autoprune.repack.runtime.program import Program

GROUP_SIZES = (1, 2, 4, 8, 16)
LANES = (4, 8, 16)
NAN = float("nan")


def target_of(lanes: int) -> Target:
    """Any width on any machine: LLVM splits vectors that are wider than its registers."""
    return replace(host(), lanes=16) if lanes == 16 else narrowed(lanes)


def pruned(module: nn.Module, size: int, sparsity: float, groups: int = 1) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.mul_(PATTERNS.create(Choice("group", {"size": size})).mask(weight.abs(), sparsity, groups))


def packed_conv(conv: nn.Conv2d, relu: bool = False, target: Target | None = None) -> PackedConv2d:
    assert not isinstance(conv.padding, str)
    (sh, sw), (ph, pw), (dh, dw) = conv.stride, conv.padding, conv.dilation
    bias = None if conv.bias is None else conv.bias.detach()
    return PackedConv2d(pack(conv.weight, conv.groups), bias, (sh, sw), (ph, pw), (dh, dw), relu, target)


def packed_linear(linear: nn.Linear, relu: bool = False, target: Target | None = None) -> PackedLinear:
    return PackedLinear(pack(linear.weight), None if linear.bias is None else linear.bias.detach(), relu, target)


def make_conv(size: int = 4, sparsity: float = 0.5, **window: int) -> nn.Conv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, window.pop("kernel", 3), **window)  # type: ignore[arg-type]
    pruned(conv, size, sparsity, conv.groups)
    return conv.eval()


def make_linear(size: int = 4, sparsity: float = 0.5, features: int = 33, out: int = 32) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(features, out)
    pruned(linear, size, sparsity)
    return linear.eval()


@torch.inference_mode()
def assert_same(got: nn.Module, wanted: nn.Module, x: Tensor, relu: bool = False) -> None:
    right = wanted(x).relu() if relu else wanted(x)
    answer = got(x)
    assert answer.shape == right.shape
    if right.numel():
        assert (answer - right).abs().max() <= 1e-4 * right.abs().max() + 1e-7


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_every_vector_width_computes_the_same(lanes: int, size: int) -> None:
    target = target_of(lanes)
    rng = random.Random(lanes * 100 + size)
    torch.manual_seed(size)
    for _ in range(8):
        groups, relu = rng.choice([1, 1, 2]), rng.random() < 0.5
        kernel = rng.choice([(1, 1), (3, 3), (1, 5), (2, 3)])
        stride, padding, dilation = ((rng.randint(a, b), rng.randint(a, b)) for a, b in ((1, 2), (0, 2), (1, 2)))
        if kernel == (1, 1) and rng.random() < 0.7:
            stride, padding = (1, 1), (0, 0)
        conv = nn.Conv2d(
            rng.randint(1, 5) * groups, rng.randint(1, 20) * groups, kernel, stride, padding, dilation, groups
        )
        pruned(conv, size, rng.choice([0.0, 0.5, 0.9]), groups)
        x = torch.randn(rng.randint(1, 2), conv.in_channels, rng.randint(5, 30), rng.randint(9, 70))
        assert_same(packed_conv(conv, relu, target), conv, x, relu)
        linear = nn.Linear(rng.randint(1, 60), rng.randint(1, 60))
        pruned(linear, size, rng.choice([0.0, 0.5, 0.9]))
        x = torch.randn(*rng.choice([(), (1,), (7,), (2, 3), (19,), (40,)]), linear.in_features)
        assert_same(packed_linear(linear, relu, target), linear, x, relu)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_small_maps_are_right_without_border_columns(lanes: int, size: int) -> None:
    """Sides that leave no, one or several positions beside whole vectors, and kernels that look beyond both ends."""
    target = target_of(lanes)
    torch.manual_seed(size)
    for side, kernel, stride, dilation in itertools.product((3, 4, 7, 8, 14), (3, 5), (1, 2), (1, 2)):
        conv = nn.Conv2d(3, 20, kernel, stride, padding=dilation * (kernel // 2), dilation=dilation)
        pruned(conv, size, 0.5)
        assert_same(packed_conv(conv, True, target), conv, torch.randn(2, 3, side, side), True)


@pytest.mark.parametrize("lanes", LANES)
def test_a_linear_is_right_for_any_number_of_tokens(lanes: int) -> None:
    """Fewer than a vector holds, and more, and features that fill no vector."""
    target = target_of(lanes)
    torch.manual_seed(lanes)
    for tokens, features, out in itertools.product((1, lanes - 1, lanes, 2 * lanes + 1, 49), (5, 33), (3, 17, 32)):
        linear = nn.Linear(features, out)
        pruned(linear, 4, 0.5)
        assert_same(packed_linear(linear, True, target), linear, torch.randn(tokens, features), True)


def test_the_narrow_targets_are_narrow() -> None:
    assert narrowed(4).lanes == 4
    assert narrowed(8).lanes == min(8, host().lanes)


class NanWalls:
    """Buffers between walls of NaN: what is written outside is seen, and what is read there and counts."""

    wall = 4096

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int, int]] = []

    def allocate(self, count: int) -> Tensor:
        whole = torch.full((count + 2 * self.wall + ALIGN,), NAN)
        first = self.wall - whole.data_ptr() // 4 % ALIGN
        self.buffers.append((whole, first, count))
        return whole[first : first + count]

    def assert_intact(self) -> None:
        assert self.buffers
        for whole, first, count in self.buffers:
            assert whole[:first].isnan().all()
            assert whole[first + count :].isnan().all()


class GuardPages:
    """Buffers that begin or end where memory does: to touch what lies outside kills the process."""

    def __init__(self, side: Literal["before", "behind"]) -> None:
        self.side = side
        self.regions: list[mmap.mmap] = []

    def allocate(self, count: int) -> Tensor:
        page, used = mmap.PAGESIZE, max(count, 1) * 4
        size = -(-used // page) * page
        region = mmap.mmap(-1, size + 2 * page)
        self.regions.append(region)
        start = ctypes.addressof(ctypes.c_char.from_buffer(region))
        for guard in (start, start + page + size):
            assert LIBC.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
        offset = page if self.side == "before" else page + size - used
        return torch.frombuffer(region, dtype=torch.float32, count=max(count, 1), offset=offset)[:count]

    def assert_intact(self) -> None:
        assert self.regions


LIBC: Any = ctypes.CDLL(None) if sys.platform != "win32" else None


def enclosures() -> list[NanWalls | GuardPages]:
    """One of each kind that this system has."""
    return [NanWalls(), *([GuardPages("before"), GuardPages("behind")] if LIBC is not None else [])]


def program_of(
    ops: list[Op],
    constants: dict[str, Tensor],
    inputs: list[Tensor],
    size: int,
    lanes: int,
    tiling: Tiling = Tiling(),  # noqa: B008 -- it is frozen
) -> Program:
    """A program whose layers are packed in groups of `size`, returning the last op's value."""
    described = tuple(Input(f"x{i}", tuple(x.shape), str(x.dtype).removeprefix("torch.")) for i, x in enumerate(inputs))
    graph = validate(Graph(described, tuple(ops), ops[-1].output, constants))
    weights = {}
    for op in ops:
        weight = constants[op.tensors["weight"]] if "weight" in op.tensors else None
        if weight is not None and isinstance(op, LayerOp) and not is_depthwise(op, weight):
            packed = pack(weight, op.conv_groups, size)
            packed = packed.to_bf16() if op.in_bf16 else packed
            weights[op.output] = Weights.of(packed, constants.get(op.tensors.get("bias", "")))
    return Program(graph, weights, dict.fromkeys(weights, tiling), threads=1, target=target_of(lanes))


@torch.inference_mode()
def assert_stays_inside(program: Program, inputs: list[Tensor]) -> None:
    """Runs with arena, inputs and outputs enclosed; first on NaN, of which nothing may be left."""
    wanted = reference(program.graph, tuple(inputs))
    plan = program.plan(tuple(tuple(x.shape) for x in inputs))
    poison = tuple(torch.full_like(x, NAN) if x.is_floating_point() else x for x in inputs)
    allocate = buffers.Arena.allocate
    for made in enclosures():
        given = tuple(
            made.allocate(-(-x.numel() * x.element_size() // 4)).view(x.dtype)[: x.numel()].view(x.shape).copy_(x)
            for x in inputs
        )

        def arena(self: buffers.Arena, made: NanWalls | GuardPages = made) -> Tensor:
            return made.allocate(self.size).copy_(allocate(self))

        def empty(
            shape: int | tuple[int, ...],
            dtype: torch.dtype = torch.float32,
            device: str = "cpu",
            made: NanWalls | GuardPages = made,
        ) -> Tensor:
            shape = (shape,) if isinstance(shape, int) else shape
            return made.allocate(math.prod(shape)).view(shape)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "_free", [])
            patch.setattr(buffers.Arena, "allocate", arena)
            patch.setattr(torch, "empty", empty)
            plan.run(poison)
            got = plan.run(given)
        made.assert_intact()
        assert all(torch.equal(x, y) for x, y in zip(given, inputs, strict=True))
        assert got.shape == wanted.shape
        exact, right = got.double(), wanted.double()  # which may be integers or booleans
        assert (exact - right).abs().max() <= 1e-4 * right.abs().max() + 1e-7


def window_op(kind: str, output: str, inputs: tuple[str, ...], window: dict[str, Any], **more: Any) -> Op:
    dilated = {} if kind == "avg_pool2d" else {"dilation": 1}
    pairs = {"stride": 1, "padding": 0, **dilated, **window}
    attributes = {key: list(value) if isinstance(value, tuple) else [value, value] for key, value in pairs.items()}
    tensors = more.pop("tensors", {})
    return op_from_json(kind, output, inputs, attributes | more, tensors)


BLOCKS = [
    Tiling(block=1, chunk=1),
    Tiling(block=20, chunk=1, inputs_first=False),
    Tiling(block=1000, chunk=2, serpentine=True),
]
PANELS = [  # each needs a kernel of its own: not for every size
    Tiling(block=1, chunk=1, panel=5),
    Tiling(block=48, chunk=0, panel=1),
    Tiling(block=1000, chunk=2, inputs_first=False, panel=256, serpentine=True),
    Tiling(block=30, chunk=1, panel=7, serpentine=True),
]
CONVOLUTIONS: list[tuple[tuple[int, int], dict[str, Any], int, tuple[int, int]]] = [
    ((1, 1), {}, 1, (17, 23)),
    ((1, 1), {}, 1, (4, 3)),
    ((1, 1), {}, 1, (1, 192)),
    ((1, 1), {}, 1, (1, 1)),
    ((1, 1), {"stride": 2}, 1, (9, 8)),
    ((3, 3), {"padding": 1}, 1, (7, 7)),
    ((3, 3), {"padding": 1, "stride": 2}, 1, (16, 15)),
    ((3, 3), {"padding": 3, "dilation": 2, "stride": 3}, 1, (11, 13)),
    ((5, 5), {"padding": 2}, 2, (40, 60)),
    ((3, 3), {"padding": (2, 0), "stride": (1, 2)}, 4, (5, 32)),
    ((2, 5), {"padding": (0, 4), "dilation": (3, 1), "stride": (3, 1)}, 1, (8, 3)),
    ((1, 7), {"padding": (0, 3)}, 8, (3, 31)),
    ((3, 3), {"padding": 5, "stride": 3}, 1, (1, 1)),
]


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_a_convolution_stays_inside_its_buffers(lanes: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    for turn, (kernel, window, groups, extent) in enumerate(CONVOLUTIONS):
        channels, filters = (8, 24) if groups < 8 else (8, 16)
        conv = nn.Conv2d(channels, filters, kernel, groups=groups)
        pruned(conv, min(size, 4), (0.0, 0.5, 0.9)[turn % 3], groups)
        x = torch.randn(2, channels, *extent, generator=generator)
        more = {"groups": groups, "activation": (None, "relu", "relu6")[turn % 3]}
        op = window_op("conv2d", "y", ("x0",), window, **more, tensors={"weight": "w", "bias": "b"})
        constants = {"w": conv.weight.detach(), "b": torch.randn(filters, generator=generator)}
        inputs = [x]
        if turn % 2:
            shape = reference(Graph((Input("x0", (), "float32"),), (op,), "y", constants), (x,)).shape
            inputs.append(torch.randn(shape, generator=generator))
            op = replace(op, inputs=("x0", "x1"))
        for tiling in (Tiling(), PANELS[turn % len(PANELS)] if size in (4, 16) else BLOCKS[turn % 3]):
            assert_stays_inside(program_of([op], constants, inputs, size, lanes, tiling), inputs)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_a_gated_convolution_stays_inside_its_buffers(lanes: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    for turn, (kernel, window, _, extent) in enumerate(CONVOLUTIONS):
        conv = nn.Conv2d(12, 24, kernel)
        pruned(conv, min(size, 4), (0.0, 0.5, 0.9)[turn % 3])
        x = torch.randn(2, 12, *extent, generator=generator)
        flags = {"gate": turn % 3 != 1, "live": turn % 3 != 2}
        more = {"groups": 1, "activation": (None, "relu", "silu")[turn % 3], **flags}
        names = [name for name, given in flags.items() if given]
        factors: list[Tensor] = []
        for groups in [3, 4][: len(names)]:
            share = (0.0, 0.5, 1.0)[(turn + len(factors)) % 3]  # all dead, some, all live
            factors.append((torch.rand(2, groups, generator=generator) + 0.5) * (torch.rand(2, groups) < share))
        inputs = [x, *factors]
        read = tuple(f"x{number}" for number in range(len(inputs)))
        op = window_op("gated_conv2d", "y", read, window, **more, tensors={"weight": "w", "bias": "b"})
        constants = {"w": conv.weight.detach(), "b": torch.randn(24, generator=generator)}
        if turn % 2:
            described = tuple(Input(name, (), "float32") for name in read)
            shape = reference(Graph(described, (op,), "y", constants), tuple(inputs)).shape
            inputs.append(torch.randn(shape, generator=generator))
            op = replace(op, inputs=(*read, f"x{len(read)}"))
        for tiling in (Tiling(), BLOCKS[turn % 3]):
            assert_stays_inside(program_of([op], constants, inputs, size, lanes, tiling), inputs)


@pytest.mark.parametrize("lanes", LANES)
def test_a_gate_stays_inside_its_buffers(lanes: int) -> None:
    generator = torch.Generator().manual_seed(lanes)
    for channels, groups, keep, threshold, extent in (
        (1, 1, 0, 0.0, (1, 1)), (3, 5, 2, 0.0, (4, 3)), (4, 2, 1, 1e9, (7, 7)), (17, 16, 16, 0.9, (5, 33)),
        (32, 31, 0, 1.0, (12, 2)),
    ):  # fmt: skip
        constants = {
            "w": torch.randn(groups, channels, generator=generator), "b": torch.ones(groups),
            "t": torch.tensor([threshold]),
        }  # fmt: skip
        op = op_from_json("gate", "y", ("x0",), {"keep": keep}, {"weight": "w", "bias": "b", "threshold": "t"})
        x = torch.randn(2, channels, *extent, generator=generator)
        assert_stays_inside(program_of([op], constants, [x], 1, lanes), [x])


Sliding = tuple[str, int | tuple[int, int], dict[str, Any], tuple[int, int]]  # kind, kernel, window, extent
EVERY_STRIDE: list[Sliding] = [
    ("depthwise", 3, {"padding": 1}, (7, 7)),
    ("depthwise", 3, {"padding": (4, 0), "dilation": (1, 2)}, (13, 70)),
    ("depthwise", 5, {"padding": 2}, (16, 5)),
    ("depthwise", (1, 2), {}, (1, 33)),
    ("max_pool2d", 3, {"padding": 1}, (9, 40)),
    ("max_pool2d", 2, {"dilation": 2}, (5, 130)),
    ("avg_pool2d", 3, {"padding": 1}, (9, 8)),
    ("avg_pool2d", (2, 4), {"padding": (1, 2)}, (4, 37)),
]
SLIDING: list[Sliding] = [
    *(
        (kind, kernel, {"stride": stride, **window}, extent)
        for stride in (1, 2, 3, 4)
        for kind, kernel, window, extent in EVERY_STRIDE
    ),
    ("depthwise", 3, {"stride": (3, 1), "padding": 1}, (8, 9)),
    ("max_pool2d", 2, {"stride": (5, 2)}, (11, 20)),
]


@pytest.mark.slow
@pytest.mark.parametrize("lanes", LANES)
def test_a_sliding_window_stays_inside_its_buffers(lanes: int) -> None:
    generator = torch.Generator().manual_seed(lanes)
    for turn, (kind, kernel, window, extent) in enumerate(SLIDING):
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        x = torch.randn(2, 5, *extent, generator=generator)
        constants = {}
        if kind == "depthwise":
            constants = {"w": torch.randn(5, 1, *kernel, generator=generator), "b": torch.randn(5)}
            more = {"groups": 5, "activation": "relu" if turn % 2 else None}
            op = window_op("conv2d", "y", ("x0",), window, **more, tensors={"weight": "w", "bias": "b"})
        elif kind == "max_pool2d":
            op = window_op(kind, "y", ("x0",), {**window, "kernel": kernel})
        else:
            op = window_op(kind, "y", ("x0",), {**window, "kernel": kernel}, count_include_pad=bool(turn % 2))
        assert_stays_inside(program_of([op], constants, [x], 1, lanes), [x])


@pytest.mark.parametrize("lanes", LANES)
def test_what_combines_maps_stays_inside_its_buffers(lanes: int) -> None:
    for extent in ((1, 1), (3, 5), (7, 7), (12, 33)):
        weight = torch.randn(6, 1, 3, 3)
        layer = {"groups": 6, "activation": None, "tensors": {"weight": "w"}}
        ops = [
            window_op("conv2d", "a", ("x0",), {"padding": 1}, **layer),
            window_op("conv2d", "b", ("x0",), {"padding": 1}, **layer),
            op_from_json("activation", "c", ("b",), {"name": "relu6"}),
            op_from_json("add", "d", ("a", "c"), {"activation": None}),
            window_op("max_pool2d", "e", ("d",), {"padding": 1, "kernel": 3}),  # its border is -inf
            op_from_json("add", "f", ("e", "d"), {"activation": "relu"}),
            op_from_json("global_avg_pool", "g", ("f",), {"keepdim": False}),
        ]
        x = torch.randn(2, 6, *extent)
        for last in range(4, len(ops) + 1):
            assert_stays_inside(program_of(ops[:last], {"w": weight}, [x], 1, lanes), [x])


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_a_linear_stays_inside_its_buffers(lanes: int, size: int) -> None:
    for turn, tokens in enumerate((1, 3, 8, 13, 16, 75)):
        linear = make_linear(min(size, 4), out=37 if turn % 2 else 32)
        tensors = {"weight": "w", "bias": "b"} if turn % 3 else {"weight": "w"}
        constants = {"w": linear.weight.detach(), "b": linear.bias.detach()}
        inputs = [torch.randn(tokens, 33)]
        if turn >= 3:
            inputs.append(torch.randn(tokens, linear.out_features))
        op = op_from_json(
            "linear", "y", ("x0", "x1")[: len(inputs)], {"activation": "relu" if turn % 2 else None}, tensors
        )
        for tiling in (Tiling(), BLOCKS[turn % 3]):
            assert_stays_inside(program_of([op], constants, inputs, size, lanes, tiling), inputs)


@pytest.mark.parametrize("lanes", LANES)
def test_taking_rows_stays_inside_its_buffers(lanes: int) -> None:
    for batch, rows, taken, features in ((1, 1, 1, 1), (2, 5, 3, 20), (3, 1, 40, 7), (1, 9, 1, 33)):
        x, numbers = torch.randn(batch, rows, features), torch.randint(0, rows, (batch, taken, 1))
        numbers[0, 0], numbers[-1, -1] = 0, rows - 1
        whole = {"op": "aten.expand.default", "args": [{"ref": "x1"}, [batch, taken, features]], "kwargs": {}}
        attributes = {"op": "aten.gather.default", "args": [{"ref": "x0"}, 1, {"ref": "n"}], "kwargs": {}}
        ops = [op_from_json("torch", "n", ("x1",), whole), op_from_json("torch", "y", ("x0", "n"), attributes)]
        program = program_of(ops, {}, [x, numbers], 1, lanes)
        assert_stays_inside(program, [x, numbers])
        numbers[-1, -1] = rows
        with pytest.raises(AutopruneError, match=r"no entry's|rows 0 to"):
            program(x, numbers)
        with pytest.raises(AutopruneError):  # there is no row at all
            program(x[:, :0], torch.zeros_like(numbers))


@pytest.mark.parametrize("lanes", LANES)
def test_groups_that_keep_the_same_are_computed_together(lanes: int) -> None:
    """Twins beside groups that have none, in items that part them, and a last group with fewer filters."""
    torch.manual_seed(lanes)
    first, second = (torch.rand(1, 33) < 0.5 for _ in range(2))
    kept = [first, first, second, first, second, second, second, first, first]
    out = len(kept) * lanes - 1
    weight = torch.randn(out, 33) * torch.cat([each.expand(lanes, 33) for each in kept])[:out]
    none, one, two = Twin
    found = Weights.of(pack(weight, size=lanes), None).twin
    assert found.tolist() == [one, two, none, none, one, two, none, none, none]
    op = op_from_json("linear", "y", ("x0", "x1"), {"activation": None}, {"weight": "w", "bias": "b"})
    constants = {"w": weight, "b": torch.randn(out)}
    for tokens, tiling in itertools.product((1, 2, 3, 7, 8, 15), (Tiling(), *BLOCKS)):
        inputs = [torch.randn(tokens, 33), torch.randn(tokens, out)]
        assert_stays_inside(program_of([op], constants, inputs, lanes, lanes, tiling), inputs)


@pytest.mark.parametrize("lanes", LANES)
def test_what_works_on_tokens_stays_inside_its_buffers(lanes: int) -> None:
    for features in (1, 7, 16, 50):
        attributes = {"size": features, "eps": 1e-5}
        norm = op_from_json("layer_norm", "y", ("x0",), attributes, {"weight": "w", "bias": "b"})
        constants = {"w": torch.randn(features), "b": torch.randn(features)}
        x = torch.randn(3, 5, features)
        assert_stays_inside(program_of([norm], constants, [x], 1, lanes), [x])
    for queries, keys, width in ((1, 1, 1), (5, 5, 8), (13, 7, 17), (6, 40, 33), (25, 3, 4)):
        heads = [torch.randn(2, 3, tokens, width) for tokens in (queries, keys, keys)]
        op = op_from_json("attention", "y", ("x0", "x1", "x2"), {"scale": width**-0.5})
        assert_stays_inside(program_of([op], {}, heads, 1, lanes), heads)


@pytest.mark.parametrize("relu", [False, True])
def test_nan_reaches_every_output_that_keeps_its_weight(relu: bool) -> None:
    conv = make_conv(4, 0.5, padding=1)
    x = torch.randn(1, 8, 9, 9)
    x[0, 3, 4, 4] = NAN
    touched = torch.nn.functional.conv2d(x.isnan().float(), (conv.weight != 0).float(), padding=1) > 0
    with torch.inference_mode():
        got = packed_conv(conv, relu)(x)
    assert torch.equal(got.isnan(), touched)
    assert touched.any()
    assert not touched.all()
    whole = nn.Conv2d(8, 16, 3, padding=1)
    with torch.inference_mode():
        assert torch.equal(packed_conv(whole, relu)(x).isnan(), whole(x).relu().isnan())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("tokens", [1, 9, 20])
def test_nan_passes_a_linear(relu: bool, tokens: int) -> None:
    linear = make_linear()
    x = torch.randn(tokens, 33)
    x[-1, 5] = NAN
    with torch.inference_mode():
        got = packed_linear(linear, relu)(x)
    assert torch.equal(got[-1].isnan(), linear.weight[:, 5] != 0)
    assert not got[:-1].isnan().any()


def test_threads_share_a_layer() -> None:
    conv, linear = make_conv(padding=1), make_linear()
    layer, flat = packed_conv(conv), packed_linear(linear)
    maps = [torch.randn(1 + i % 2, 8, 5 + i, 9 + 2 * i) for i in range(8)]
    tokens = [torch.randn(1 + 5 * i, 33) for i in range(8)]

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            i = rng.randrange(8)
            assert_same(layer, conv, maps[i])
            assert_same(flat, linear, tokens[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


CASES: list[tuple[Callable[[], nn.Module], Callable[[], PackedLayer], Tensor]] = [
    (lambda: make_conv(padding=1), lambda: packed_conv(make_conv(padding=1)), torch.randn(2, 8, 9, 9)),
    (make_linear, lambda: packed_linear(make_linear()), torch.randn(3, 33)),
]
BOTH = pytest.mark.parametrize(("dense", "packed", "x"), CASES, ids=["conv2d", "linear"])


@BOTH
def test_a_deep_copy_lives_on_its_own(
    dense: Callable[[], nn.Module], packed: Callable[[], PackedLayer], x: Tensor
) -> None:
    layer = packed()
    layer(x)
    twin = copy.deepcopy(layer)
    layer.values.fill_(NAN)
    assert_same(twin, dense(), x)


@BOTH
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_replaces_everything(
    dense: Callable[[], nn.Module], packed: Callable[[], PackedLayer], x: Tensor, assign: bool
) -> None:
    module = dense()
    weight = module.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.copy_(weight.roll(1, 1))  # as many weights at other places: all shapes stay
    other = packed_conv(module) if isinstance(module, nn.Conv2d) else packed_linear(module)  # type: ignore[arg-type]
    layer = packed()
    layer(x)  # what is remembered of this call must not survive
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert_same(layer, module, x)


@BOTH
def test_a_state_dict_with_a_wild_index_is_refused(
    dense: Callable[[], nn.Module], packed: Callable[[], PackedLayer], x: Tensor
) -> None:
    layer = packed()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    state["index"][0] = 2**30
    with pytest.raises((FileError, RuntimeError), match="out of range"):
        layer.load_state_dict(state)
    assert_same(layer, dense(), x)  # what it had is still there


@BOTH
def test_weight_and_bias_are_rebuilt(
    dense: Callable[[], nn.Module], packed: Callable[[], PackedLayer], x: Tensor
) -> None:
    module, layer = dense(), packed()
    assert isinstance(module.weight, Tensor)
    assert isinstance(module.bias, Tensor)
    assert torch.equal(layer.weight, module.weight)
    assert layer.bias is not None
    assert torch.equal(layer.bias, module.bias)


@BOTH
def test_training_through_a_packed_layer_is_an_error(
    dense: Callable[[], nn.Module], packed: Callable[[], PackedLayer], x: Tensor
) -> None:
    with pytest.raises(AutopruneError, match="inference"):
        packed()(x.clone().requires_grad_())


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
@pytest.mark.parametrize("seen", [False, True])
def test_another_dtype_is_an_error(
    dense: Callable[[], nn.Module], packed: Callable[[], PackedLayer], x: Tensor, dtype: torch.dtype, seen: bool
) -> None:
    layer = packed()
    if seen:
        layer(x)  # the shape alone is no reason to accept the input
    with pytest.raises(AutopruneError, match="float32"):
        layer(x.to(dtype))


@BOTH
@pytest.mark.parametrize("seen", [False, True])
def test_another_device_is_an_error(
    dense: Callable[[], nn.Module], packed: Callable[[], PackedLayer], x: Tensor, seen: bool
) -> None:
    layer = packed()
    if seen:
        layer(x)
    with pytest.raises(AutopruneError, match="meta"):
        layer(x.to("meta"))


@BOTH
def test_the_default_dtype_does_not_matter(
    dense: Callable[[], nn.Module], packed: Callable[[], PackedLayer], x: Tensor
) -> None:
    before, module = packed(), dense()
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, nn.Parameter)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(before, module, x)
        for each in (bias, None):
            module.register_parameter("bias", each)
            after = packed_conv(module) if isinstance(module, nn.Conv2d) else packed_linear(module)  # type: ignore[arg-type]
            assert after(x).dtype == torch.float32
            assert_same(after, module, x)
        assert before.bias is not None
        assert torch.equal(before.bias, bias)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shape", [(2, 7, 9, 9), (8, 9), (1, 1, 8, 9, 9), (1, 8, 2, 9), ()], ids=str)
def test_a_wrong_shape_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(AutopruneError, match=r"takes|smaller"):
        packed_conv(make_conv())(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 32), (34,), ()], ids=str)
def test_a_wrong_number_of_features_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(AutopruneError, match="33"):
        packed_linear(make_linear())(torch.zeros(shape))


def test_an_empty_batch_gives_an_empty_output() -> None:
    assert_same(packed_conv(make_conv()), make_conv(), torch.zeros(0, 8, 9, 9))
    assert_same(packed_linear(make_linear()), make_linear(), torch.zeros(0, 33))
    assert_same(packed_linear(make_linear()), make_linear(), torch.zeros(2, 0, 33))


def test_any_memory_layout_is_read_right() -> None:
    conv, linear = make_conv(padding=1), make_linear()
    x = torch.randn(2, 8, 9, 11)
    assert_same(packed_conv(conv), conv, x.contiguous(memory_format=torch.channels_last))
    assert_same(packed_conv(conv), conv, x.transpose(2, 3))
    assert_same(packed_conv(conv), conv, torch.randn(2, 8, 18, 22)[:, :, ::2, ::2])
    assert_same(packed_linear(linear), linear, torch.randn(33, 5).t())


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_a_weight_of_zeros_gives_the_bias(sparsity: float) -> None:
    conv, linear = make_conv(padding=1), make_linear()
    for module in (conv, linear):
        nn.init.zeros_(module.weight)
    assert_same(packed_conv(conv), conv, torch.randn(2, 8, 9, 11))
    assert_same(packed_linear(linear, relu=True), linear, torch.randn(2, 33), relu=True)


def test_an_exported_program_computes_the_same() -> None:
    dense = nn.Sequential(
        make_conv(padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), make_linear(features=64)
    ).eval()
    conv, linear = dense[0], dense[4]
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(linear, nn.Linear)
    fast = nn.Sequential(packed_conv(conv, relu=True), dense[2], dense[3], packed_linear(linear)).eval()
    x = torch.randn(2, 8, 12, 10)
    program = torch.export.export(fast, (x,))
    names = {str(node.target) for node in program.graph.nodes}
    assert {"autoprune.packed_conv2d.default", "autoprune.packed_linear.default"} <= names
    assert_same(program.module(), dense, x)
    assert torch.equal(program.module()(x), fast(x))


def test_an_exported_convolution_takes_an_image_without_a_batch() -> None:
    conv = make_conv(padding=1)
    x = torch.randn(8, 12, 10)
    program = torch.export.export(packed_conv(conv), (x,))
    assert_same(program.module(), conv, x)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("index", lambda a: a + 8 * 9),
        ("index", lambda a: -1 - a),
        ("group_pointer", lambda a: a[::-1]),
        (
            "group_pointer",
            lambda a: np.array([0, 2**31 - 1, -(2**31), -1, a[-1]]),
        ),  # its int32 differences wrap to >= 0
        ("group_pointer", lambda a: a + 1),
        ("out_index", lambda a: np.zeros_like(a)),
        ("out_index", lambda a: a - 2),
        ("out_index", lambda a: a[:-1]),
    ],
)
def test_a_corrupt_packed_weight_is_refused(field: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    packed = pack(make_conv().weight)
    assert packed.groups == 4
    changed: dict[str, Any] = {field: np.ascontiguousarray(change(getattr(packed, field)).astype(np.int32))}
    with pytest.raises(FileError, match="corrupt"):
        replace(packed, **changed).validate()
