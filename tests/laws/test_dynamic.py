"""Laws of gates: whatever the network and its input, what is repacked computes what the masked, gated model does."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.model.channel_gates import Gating, gate_channels_, gates, live_shares
from autoprune.patterns import PATTERNS
from autoprune.registry import Choice
from autoprune.repack import load, repack, save
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.tuning.tuning import TuningCache

ACTIVATIONS = (nn.Identity, nn.ReLU, nn.ReLU, nn.SiLU, nn.Sigmoid)  # the last does not keep a zero


class Block(nn.Module):
    """Two convolutions around a shortcut, and a third that reads what a pooling leaves of the first."""

    def __init__(self, shape: tuple[int, int], kernel: int, stride: int, between: nn.Module, norms: bool) -> None:
        super().__init__()
        wide, out = shape
        norm = nn.BatchNorm2d if norms else nn.Identity
        self.stem, self.between = nn.Conv2d(3, wide, 3, padding=1), between
        self.conv1 = nn.Conv2d(wide, out, kernel, stride, kernel // 2, bias=not norms)
        self.norm1 = norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=2, dilation=2)
        self.norm2 = norm(out)
        self.side = nn.Conv2d(out, 5, (1, 2), padding=(0, 1))
        self.shortcut = nn.Conv2d(wide, out, 1, stride)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        y = self.between(self.norm1(self.conv1(x)))
        side = self.side(nn.functional.max_pool2d(y, 3, 1, 1))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x)), side


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A gated, pruned network in eval mode, and an input."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    size = draw(st.sampled_from([1, 2, 3, 4, 8, 12]))
    wide, out = (size * draw(st.integers(1, 24 // size)) for _ in range(2))
    kernel, stride, norms = draw(st.sampled_from([1, 3])), draw(st.integers(1, 3)), draw(st.booleans())
    model = Block((wide, out), kernel, stride, draw(st.sampled_from(ACTIVATIONS))(), norms)
    x = torch.randn(draw(st.integers(1, 3)), 3, draw(st.integers(4, 12)), draw(st.integers(4, 17)))
    able = ["stem", "conv1", "conv2", "shortcut"]
    chosen = draw(st.lists(st.sampled_from(able), min_size=1, max_size=4, unique=True))
    sparsity, pattern = draw(st.sampled_from([0.0, 0.5, 0.9])), draw(st.sampled_from(list(PATTERNS)))
    gating = Gating(size, draw(st.floats(0.05, 1.0)), draw(st.booleans()))
    gate_channels_(model, x, chosen, gating)
    prepare(model.eval(), pattern, sparsity, draw(st.sampled_from([-1e9, 0.0, 0.9, 1.1, 1e9])))
    return model, x


@torch.no_grad()
def prepare(model: nn.Module, pattern: str, sparsity: float, threshold: float) -> None:
    """Prunes in place, gives the norms something to do, and the gates a threshold."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.mul_(PATTERNS.create(Choice(pattern)).mask(module.weight.abs(), sparsity))
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5)
    for gate in gates(model).values():
        gate.weight.mul_(2.0)
        gate.threshold.fill_(threshold)


def told(folder: Path, seed: int) -> TuningCache:
    """Knows a tiling for every layer: nothing is timed, and any tiling comes up."""

    class Told(dict[str, Tiling]):
        def __contains__(self, key: object) -> bool:
            return True

        def __missing__(self, key: str) -> Tiling:
            numbers = rng.choice([1, 30, 192, 1000]), rng.choice([0, 1, 2]), rng.choice([0, 0, 9])
            flags = [rng.random() < 0.5 for _ in range(2)]
            self[key] = Tiling(rng.choice([0, 1]), numbers[0], numbers[1], flags[0], numbers[2], flags[1])
            return self[key]

    rng, cache = random.Random(seed), TuningCache(folder / "tuning.json")
    cache.found = Told()
    return cache


def assert_close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-6


@pytest.mark.slow
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(network=networks(), threads=st.sampled_from([1, 2, 3]), other=st.integers(1, 5), seed=st.integers(0, 2**20))
def test_a_gated_program_computes_what_the_masked_model_does(
    network: tuple[nn.Module, Tensor], threads: int, other: int, seed: int, tmp_path: Path
) -> None:
    model, x = network
    fast = repack(model, x, form="program", threads=threads, cache=told(tmp_path, seed))
    save(fast, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", threads=2)
    again = torch.randn(other, *x.shape[1:]) * torch.linspace(0.1, 3.0, other)[:, None, None, None]
    with torch.inference_mode():
        for given_input in (x, again):
            for got, same, wanted in zip(fast(given_input), loaded(given_input), model(given_input), strict=True):
                assert_close(got, wanted)
                assert torch.equal(got, same)


@settings(max_examples=20)
@given(
    keep=st.floats(0.01, 1.0), groups=st.integers(1, 9), size=st.integers(1, 4), batch=st.integers(1, 4),
    seed=st.integers(0, 2**20),
)  # fmt: skip
def test_every_input_keeps_its_share(keep: float, groups: int, size: int, batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, groups * size, 3))
    x = torch.randn(batch, 3, 5, 5)
    made = gate_channels_(model, x, ["0"], Gating(size, keep))["0"]
    with torch.no_grad():
        made.gate.bias.fill_(10.0)  # none is zero by itself
    (share,) = live_shares(model, x).values()
    assert torch.equal((share * groups).round().long(), torch.full((batch,), max(1, round(keep * groups))))
    y = model.eval()(x).unflatten(1, (groups, size)).abs().amax(dim=(2, 3, 4))
    assert torch.equal((y > 0).float().mean(dim=1), share)
