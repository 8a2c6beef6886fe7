"""Models repacked to int8: the program computes what the quantised graph says, in every form of layer and mask."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autoprune
from autoprune.errors import AutopruneError
from autoprune.masks import Masks
from autoprune.patterns import PATTERNS
from autoprune.registry import Choice
from autoprune.repack.graph.capture import capture
from autoprune.repack.graph.ir import Graph
from autoprune.repack.int8 import tensors_in
from autoprune.repack.kernels.compiler import narrowed
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.outputs import noise_of
from autoprune.repack.report import ProgramModel
from autoprune.repack.runtime.by_torch import TorchPlan
from autoprune.repack.runtime.program import Program
from autoprune.repack.tuning.layer import Layer


class Residual(nn.Module):
    """Strides, a padded and a pointwise shortcut, sums of bytes and of floats, channels that fill no lane."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 5, stride=2, padding=2)
        self.a, self.b = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.down, self.short = nn.Conv2d(12, 22, 3, stride=2, padding=1), nn.Conv2d(12, 22, 1, stride=2)
        self.c = nn.Conv2d(22, 22, (1, 3), padding=(0, 2), dilation=(1, 2))
        self.head = nn.Linear(22, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.b(F.relu(self.a(x))) + x)
        x = self.down(x) + self.short(x)  # below zero too
        x = F.silu(self.c(x) + x)
        y: Tensor = self.head(x.mean((2, 3)))
        return y


class Grouped(nn.Module):
    """A grouped and a depthwise convolution, other activations, a sum that no layer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.grouped = nn.Conv2d(4, 24, 1), nn.Conv2d(24, 16, 3, padding=1, groups=2)
        self.deep, self.strided = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 3, 2, 1, groups=16)
        self.out = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.grouped(F.relu6(self.up(x))))
        y: Tensor = self.out(F.relu6(self.strided(F.relu(self.deep(x)))))
        return y


class Around(nn.Module):
    """Depthwise convolutions that have no kernel of their own: beside a sum, and in wide steps."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.deep = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.leap, self.out = nn.Conv2d(16, 16, 5, stride=5, groups=16), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(x))
        y: Tensor = self.out(self.leap(F.relu(self.deep(x) + x)))
        return y


class Tokens(nn.Module):
    """A transformer's block: norms in float, Linears in int8, GELU between two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        y: Tensor = x + self.down(F.gelu(self.up(self.second(x))))
        return y


class Pooled(nn.Module):
    """Poolings between layers, and a head over what they leave."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3)
        self.head = nn.Linear(16 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.a(x)), 3, 2, 1)
        x = F.avg_pool2d(F.relu(self.b(x)), 2)
        y: Tensor = self.head(F.adaptive_max_pool2d(F.relu(self.c(x)), 2).flatten(1))
        return y


class Joined(nn.Module):
    """Maps beside each other, sums that no layer takes, averages of windows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 10, 1)
        self.c, self.d = nn.Conv2d(18, 12, 3, padding=1), nn.Conv2d(12, 12, 1)
        self.last = nn.Conv2d(12, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(torch.cat([F.relu(self.a(x)), self.b(x)], 1))
        y = F.relu(x)
        y = F.relu(F.avg_pool2d(y, 3, 1, 1) + self.d(y))
        z: Tensor = self.last(F.avg_pool2d(y, 2))
        return z


class Wide(nn.Module):
    """Filters for groups of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(32, 48, 3, 2, 1)
        self.c = nn.Conv2d(48, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(F.relu(self.b(F.relu(self.a(x)))))
        return y


class Windows(nn.Module):
    """Tokens of four axes, as windows of an image are; rows that two Linears read, and an operation in floats."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)
        self.three = nn.Linear(12, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.permute(0, 2, 3, 1))
        y = self.two(F.relu(self.one(x))) + x
        z: Tensor = self.three(y) * y.sum(-1, keepdim=True)
        return z


class Few(nn.Module):
    """Linears over a few tokens: bytes between two of them, a residual, features and filters that fill no lane."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(50, 70), nn.Linear(70, 35), nn.Linear(35, 35)
        self.head = nn.Linear(35, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.b(F.relu(self.a(x))))
        y: Tensor = self.head(F.relu(self.c(x) + x))
        return y


class Sequence(nn.Module):
    """Recurrent layers that read each other, in both directions and from a state to begin with; and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.last = nn.GRU(20, 21, bidirectional=True), nn.LSTM(42, 24)
        self.head = nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        x, ends = self.both(x)
        start = torch.tanh(ends[:1].repeat(1, 1, 2)[..., :24])
        x, (state, _) = self.last(x, (start, start))
        y: Tensor = self.head(state[0]) + x.mean()
        return y


def images(batch: int = 2, channels: int = 3, size: int = 20) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(batch + size))


MODELS: dict[str, tuple[type[nn.Module], Tensor]] = {
    "residual": (Residual, images()),
    "grouped": (Grouped, images(channels=4, size=11)),
    "around": (Around, images(channels=4, size=15)),
    "tokens": (Tokens, torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))),
    "pooled": (Pooled, images(size=16)),
    "joined": (Joined, images(size=13)),
    "wide": (Wide, images(channels=8, size=15)),
    "windows": (Windows, images(channels=12, size=6)),
    "few": (Few, torch.randn(3, 50, generator=torch.Generator().manual_seed(0))),
    "sequence": (Sequence, torch.randn(7, 3, 20, generator=torch.Generator().manual_seed(0))),
}
MASKS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "quads": {"size": 8, "block": 4},
    "any": {"size": 8},
    "single": {"size": 1},
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(len(name))
    kind, x = MODELS[name]
    return kind().eval(), x


def like(x: Tensor, count: int = 3) -> list[Tensor]:
    """Batches of values such as x's."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(x.shape, generator=generator) for _ in range(count)]


def masks_of(model: nn.Module, about: dict[str, Any] | None) -> Masks | None:
    if about is None:
        return None
    pattern = PATTERNS.create(Choice("group", about))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    weights = {name: (module.weight, getattr(module, "groups", 1)) for name, module in layers.items()}
    weights |= {name: (w, 1) for name, w in model.named_parameters() if "weight_ih" in name or "weight_hh" in name}
    return {name: pattern.mask(w.detach().abs(), 0.7, groups) for name, (w, groups) in weights.items()}


@cache
def captured(name: str) -> Graph:
    """The same whatever the masks."""
    return capture(*built(name))


@cache
def quantised(name: str, pattern: str = "dense") -> tuple[ProgramModel, nn.Module, Tensor]:
    """Made once for all tests, which leave it as it is."""
    model, x = built(name)
    graph = None if pattern == "dense" else captured(name)
    masks = masks_of(model, MASKS[pattern])
    fast = autoprune.repack(model, x, masks, precision="int8", calibration=like(x), graph=graph)
    assert isinstance(fast, ProgramModel)
    return fast, model, x


def said(fast: ProgramModel, x: Tensor) -> Any:
    """What its graph says, by torch."""
    return TorchPlan(fast.program.graph, fast.program.weights).run((x,))


@pytest.mark.parametrize(
    "pattern", [*(pytest.param(each, marks=pytest.mark.slow) for each in ("dense", "quads")), "any", "single"]
)
@pytest.mark.parametrize("name", MODELS)
def test_the_program_computes_what_the_quantised_graph_says(name: str, pattern: str) -> None:
    fast, _, x = quantised(name, pattern)
    assert any(row.precision == "int8" for row in fast.report)
    for given in (x, *like(x, 2)):
        wanted = said(fast, given)
        assert noise_of(tensors_in(fast(given)), tensors_in(wanted)) < 0.01


def test_a_depthwise_layer_without_a_kernel_stays_float_and_says_why() -> None:
    fast, _, _ = quantised("around")
    rows = {row.name: row for row in fast.report}
    assert {name: row.precision for name, row in rows.items()} == {
        "up": "int8", "deep": "float32", "leap": "float32", "out": "int8",
    }  # fmt: skip
    for name in ("deep", "leap"):
        assert "depthwise" in rows[name].why


@pytest.mark.parametrize("name", MODELS)
def test_it_is_near_the_model(name: str) -> None:
    fast, model, x = quantised(name)
    with torch.inference_mode():
        assert noise_of((fast(x),), (model(x),)) < 0.05


@pytest.mark.parametrize("lanes", [4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_narrower_targets_give_the_same(name: str, lanes: int) -> None:
    fast, _, x = quantised(name, "any")
    program = fast.program
    narrow = Program(program.graph, program.weights, target=narrowed(lanes))
    assert noise_of((narrow(x),), (fast(x),)) < 0.01


@pytest.mark.parametrize("whole", [1, 3])
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_every_way_to_cut_the_work_gives_the_same_bits(size: int, tiles: bool, whole: int) -> None:
    fast, _, x = quantised("wide", "any")
    program = fast.program
    layers = {op.output: op for op in program.graph.ops if op.output in program.weights}
    constants = {name: program.weights[name].packed.unpack() for name in layers}
    weights, tilings = {}, {}
    for name, op in layers.items():
        scale = program.graph.constants[op.tensors["scale"]]
        bias = torch.from_numpy(program.weights[name].bias)
        weights[name] = Layer(constants[name], bias, 1, 0, scale).pack(size)
        tilings[name] = Tiling(size, 48, 0, True, whole=whole, tiles=tiles)
    other = Program(program.graph, weights, tilings, 1)
    assert torch.equal(other(x), fast(x))


@pytest.mark.parametrize("name", MODELS)
def test_files_give_the_same_bits(name: str, tmp_path: Path) -> None:
    fast, _, x = quantised(name, "quads")
    autoprune.save(fast, tmp_path / "fast.safetensors")
    loaded = autoprune.load(tmp_path / "fast.safetensors")
    assert torch.equal(loaded(x), fast(x))
    assert loaded.report == fast.report


@pytest.mark.parametrize("name", ["residual", "grouped", "pooled", "joined"])
def test_other_batches_and_sizes(name: str) -> None:
    fast, _, x = quantised(name)
    for shape in ((5, *x.shape[1:]), (1, *x.shape[1:])):
        given = torch.randn(shape)
        wanted = said(fast, given)
        assert noise_of((fast(given),), (wanted,)) < 0.01


def test_threads_share_the_work() -> None:
    model, x = built("residual")
    one, two = (
        autoprune.repack(model, x, precision="int8", calibration=like(x), threads=threads)(x) for threads in (1, 2)
    )
    assert noise_of((one,), (two,)) < 1e-6


def test_a_dead_filter_is_its_bias() -> None:
    model, x = built("residual")
    assert isinstance(model, Residual)
    with torch.no_grad():
        model.a.weight[3] = 0.0
        model.head.weight[2] = 0.0
    fast = autoprune.repack(model, x, precision="int8", calibration=like(x))
    assert torch.allclose(fast(x)[:, 2], model.head.bias[2].expand(2), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"precision": "int8"}, "needs calibration"),
        ({"precision": "int4", "calibration": []}, "precision is one of"),
        ({"calibration": [torch.zeros(1)]}, "float32 needs none"),
        ({"precision": "int8", "calibration": torch.zeros(2, 3, 20, 20)}, "a list of batches"),
        ({"precision": "int8", "calibration": [], "form": "modules"}, "form 'program'"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], text: str) -> None:
    model, x = built("residual")
    with pytest.raises(AutopruneError, match=text):
        autoprune.repack(model, x, **given)


def net(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*layers).eval()


LATER: dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = {
    "a point in phase planes": (net(nn.Conv2d(8, 8, 3, 2, 1)), (4, 8, 4, 4), (4, 8, 1, 1)),
    "an adaptive pooling that is nothing": (
        net(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
            nn.Linear(128, 5)), (2, 3, 16, 16), (2, 3, 8, 8),
    ),
    "a wide pooling that torch runs": (
        net(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(5), nn.Conv2d(8, 8, 3, padding=1)), (2, 3, 20, 20),
        (1, 3, 25, 25),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LATER)
def test_inputs_of_another_size_take_other_ways(name: str) -> None:
    model, example, later = LATER[name]
    x = torch.randn(example, generator=torch.Generator().manual_seed(3))
    fast = autoprune.repack(model, x, precision="int8", calibration=like(x))
    assert isinstance(fast, ProgramModel)
    for given in (x, torch.randn(later, generator=torch.Generator().manual_seed(4))):
        assert noise_of((fast(given),), (said(fast, given),)) < 0.01


def test_only_floats_are_moved_onto_a_grid() -> None:
    fast, _, _ = quantised("residual")
    program = fast.program
    given = tuple(replace(each, dtype="uint8") for each in program.graph.inputs)
    broken = Program(replace(program.graph, inputs=given), program.weights, threads=1)
    with pytest.raises(AutopruneError, match="takes float32 values"):
        broken(torch.zeros(2, 3, 20, 20, dtype=torch.uint8))


def test_filters_out_of_order_write_no_bytes() -> None:
    fast, _, x = quantised("wide")
    program, name = fast.program, next(op.output for op in fast.program.graph.ops if op.output in fast.program.weights)
    packed = program.weights[name].packed
    turned = replace(packed, out_index=packed.out_index[:, ::-1].copy())
    weights = {**program.weights, name: replace(program.weights[name], packed=turned)}
    with pytest.raises(AutopruneError, match="fills no lanes"):
        Program(program.graph, weights, threads=1)(x)


def test_a_border_far_wider_than_the_map_is_refused() -> None:
    model = net(nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=(0, 400)))
    x = torch.randn(1, 3, 8, 8)
    calibrated: dict[str, Any] = {"precision": "int8", "calibration": like(x)}
    for more in ({}, calibrated):
        with pytest.raises(AutopruneError, match="no room for so much"):
            autoprune.repack(model, x, form="program", **more)


class Scaled(nn.Module):
    """Two inputs of one shape, one of which may be given by keyword alone, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor, *, state: Tensor, factor: float = 1.0) -> Tensor:
        y: Tensor = self.a(x) * factor - self.b(state)
        return y


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ({"x": 1, "labels": 100}, "takes x, state, factor, not x, labels"),
        ((1, 100), "not <0>, <1>"),
        ({"x": 1, "state": 100, "labels": 1}, "not x, state, labels"),
        ({"x": 1, "state": 100, "factor": 2.0}, "the argument factor is fixed in this program: 1.0"),
    ],
)
@pytest.mark.parametrize("make", [autoprune.repack, autoprune.quantize_])
def test_a_calibration_batch_of_other_arguments_is_refused(make: Any, batch: Any, told: str) -> None:
    x = torch.randn(2, 6)
    mapping = isinstance(batch, dict)
    values = [x * each if isinstance(each, int) else each for each in (batch.values() if mapping else batch)]
    given = dict(zip(batch, values, strict=True)) if mapping else tuple(values)
    more = {"precision": "int8"} | ({"calibration": [given]} if make is autoprune.repack else {})
    with pytest.raises(AutopruneError, match=rf"calibration batch 1 does not fit: .*{told}.*without labels"):
        make(Scaled(), {"x": x, "state": x}, *([] if "calibration" in more else [[given]]), **more)


def test_calibration_batches_name_their_arguments_in_any_order() -> None:
    x = torch.randn(2, 6)
    batches = [{"state": 100 * x, "x": x}, autoprune.Arguments(x, state=100 * x)]
    fast = autoprune.repack(Scaled(), {"x": x, "state": x}, precision="int8", calibration=batches)
    scales = {row.name: row.scale for row in fast.report}
    assert scales["b"] == pytest.approx(100 * (scales["a"] or 0.0), rel=0.05)


def test_a_weight_that_is_not_finite_is_told_by_its_layer() -> None:
    model, x = built("residual")
    assert isinstance(model, Residual)
    with torch.no_grad():
        model.down.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(AutopruneError, match="the weight of 'down' is NaN or infinite somewhere"):
        autoprune.repack(model, x, precision="int8", calibration=like(x))
