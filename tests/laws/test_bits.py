"""Laws of bits: a program computes the same ones however wide a processor's vectors are.

A processor that multiplies and adds with one rounding has others than one that does not, but for results of bytes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from autoprune.repack import ProgramModel, repack
from autoprune.repack.kernels.compiler import Target, host, narrowed
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.runtime.program import Program
from tests.laws.test_program import Does, any_tiling, networks, prune, told

LANES = (4, 8, 16)
FUSED = [replace(host(), lanes=lanes) for lanes in LANES]
UNFUSED = [replace(narrowed(4), lanes=lanes) for lanes in LANES]


def outputs(made: ProgramModel, inputs: tuple[Tensor, ...], targets: list[Target]) -> list[list[Tensor]]:
    """What a program gives on each target."""
    own, found = made.program, []
    for target in targets:
        program = Program(own.graph, own.weights, own.tilings, 1, target)
        with torch.inference_mode():
            result: Any = program.plan(tuple(tuple(x.shape) for x in inputs)).run(inputs)
        found.append([*result] if isinstance(result, tuple) else [result])
    return found


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32) if x.dtype == torch.float32 else x


def assert_same(results: list[list[Tensor]]) -> None:
    first = results[0]
    for lanes, other in zip(LANES[1:], results[1:], strict=True):
        for one, two in zip(first, other, strict=True):
            wrong = int((bits(one) != bits(two)).sum())
            assert not wrong, f"{wrong} of {one.numel()} numbers differ between 4 and {lanes} lanes"


class Attention(nn.Module):
    """Of heads of a width, with a mask where wanted."""

    def __init__(self, width: int, masked: bool) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(24, 3 * 2 * width), nn.Linear(2 * width, 24)
        self.width, self.masked = width, masked

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).unflatten(2, (3, 2, self.width)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = torch.ones(x.shape[1], x.shape[1]).tril().log() if self.masked else None
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        z: Tensor = x + self.out(y.transpose(1, 2).flatten(2))
        return z


class Last(nn.Module):
    """All that a recurrent layer returns."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.layer(x)[0]
        return states


def tokens(count: int, features: int = 24) -> Tensor:
    return torch.randn(2, count, features)


def does(function: Callable[[Tensor], Any], x: Tensor) -> tuple[nn.Module, Tensor]:
    return Does(function), x


def linears(batch: int) -> tuple[nn.Module, Tensor]:
    layers = nn.Linear(45, 32), nn.GELU(), nn.Linear(32, 50), nn.SiLU(), nn.Linear(50, 7)
    return nn.Sequential(*layers), torch.randn(batch, 45)


def sequences(kind: type[nn.LSTM | nn.GRU], batch: int) -> tuple[nn.Module, Tensor]:
    return Last(kind(9, 20, batch_first=True)), torch.randn(batch, 4, 9)


MODELS: Mapping[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "attention of few": lambda: (nn.Sequential(Attention(5, False), Attention(20, True)), tokens(7)),
    "attention": lambda: (nn.Sequential(Attention(5, False), Attention(16, True)), tokens(37)),
    "attention of a token": lambda: (Attention(16, True), tokens(1)),
    "norms": lambda: (nn.Sequential(nn.LayerNorm(81), nn.RMSNorm(81)), tokens(7, 81)),
    "norms of few": lambda: (nn.Sequential(nn.LayerNorm(9), nn.RMSNorm(9)), tokens(7, 9)),
    "norms of many": lambda: (nn.Sequential(nn.LayerNorm(206), nn.RMSNorm(206)), tokens(7, 206)),
    "softmax": lambda: does(lambda x: x.softmax(-1).softmax(1), tokens(11, 95)),
    "softmax of few": lambda: does(lambda x: x.softmax(-1).softmax(1), tokens(16, 10)),
    "means": lambda: does(lambda x: x - x.mean(2, keepdim=True) - x.mean((0, 1)), tokens(5, 97)),
    "mean of all": lambda: does(lambda x: x.mean((1, 2)), tokens(5, 37)),
    "product": lambda: does(lambda x: x @ (x * 2).transpose(1, 2) @ (x + 1), tokens(17, 45)),
    "product of few": lambda: does(lambda x: x @ (x * 2).transpose(1, 2) @ (x + 1), tokens(11, 45)),
    "product of few and many": lambda: does(lambda x: x[:, :9] @ x.transpose(1, 2) @ (x + 1), tokens(45, 11)),
    "group norm": lambda: (nn.Sequential(nn.GroupNorm(3, 12), nn.Conv2d(12, 5, 1)), torch.randn(2, 12, 13, 13)),
    "mean of maps": lambda: (
        nn.Sequential(nn.Conv2d(3, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.randn(2, 3, 7, 7)
    ),
    "mean of windows": lambda: (
        nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.Upsample(scale_factor=3), nn.AdaptiveAvgPool2d(4)),
        torch.randn(2, 5, 13, 13),
    ),
    "small maps": lambda: (
        nn.Sequential(nn.Conv2d(12, 20, 3, padding=1), nn.ReLU(), nn.Conv2d(20, 12, 5, padding=2)),
        torch.randn(2, 12, 7, 7),
    ),
    "depthwise": lambda: (nn.Conv2d(12, 12, 3, padding=1, groups=12), torch.randn(2, 12, 9, 9)),
    **{f"linear, {batch} rows": partial(linears, batch) for batch in (1, 2, 3, 5, 7, 9, 15, 16, 35)},
    **{f"lstm, {batch} rows": partial(sequences, nn.LSTM, batch) for batch in (1, 3)},
    **{f"gru, {batch} rows": partial(sequences, nn.GRU, batch) for batch in (1, 7)},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_vectors_of_any_width_give_the_same_bits(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    prune(model.eval(), "unstructured", 0.5)
    made = repack(model, x, form="program", threads=1, cache=told(tmp_path, Tiling))
    assert isinstance(made, ProgramModel)
    assert_same(outputs(made, (x,), FUSED))


LINEARS = [name for name in MODELS if name.startswith("linear")]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4, 8, 16])
@pytest.mark.parametrize("name", LINEARS)
def test_groups_of_any_size_give_the_same_bits(name: str, size: int, tmp_path: Path) -> None:
    """Rows side by side in registers, twins among them, and panels that a Linear of few tokens leaves alone."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    prune(model.eval(), "block" if size > 1 else "unstructured", 0.5)
    tiling = Tiling(size, 30, 2, True, 9, True)
    made = repack(model, x, form="program", threads=1, cache=told(tmp_path, lambda: tiling))
    assert isinstance(made, ProgramModel)
    for targets in (FUSED, UNFUSED):
        assert_same(outputs(made, (x,), targets))


@pytest.mark.slow
def test_bytes_are_the_same_whether_a_processor_fuses_or_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Hardswish(),
        nn.Conv2d(16, 24, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    ).eval()  # fmt: skip
    prune(model, "unstructured", 0.5)
    x = torch.randn(2, 3, 14, 14)
    made = repack(
        model, x, form="program", threads=1, precision="int8", calibration=[torch.randn_like(x) for _ in range(4)],
        cache=told(tmp_path, Tiling),
    )  # fmt: skip
    assert isinstance(made, ProgramModel)
    first, *others = outputs(made, (x,), [*FUSED, *UNFUSED])
    for other in others:
        assert torch.equal(bits(other[0]), bits(first[0]))


@pytest.mark.slow
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(network=networks(), seed=st.integers(0, 2**20))
def test_any_network_gives_the_same_bits(network: tuple[nn.Module, Tensor], seed: int, tmp_path: Path) -> None:
    model, x = network
    rng = random.Random(seed)
    made = repack(model, x, form="program", threads=1, cache=told(tmp_path, lambda: any_tiling(rng)))
    assert isinstance(made, ProgramModel)
    assert_same(outputs(made, (x,), FUSED))
