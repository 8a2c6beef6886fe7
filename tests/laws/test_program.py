"""Laws of programs: whatever the network, the pattern, the tiling and the threads, they compute what the model does."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.patterns import PATTERNS
from autoprune.registry import Choice
from autoprune.repack import Graph, ProgramModel, capture, load, repack, save
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.tuning.tuning import TuningCache

Shape = tuple[int, int, int]  # channels, height, width
ACTIVATIONS = (nn.ReLU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish)


class Does(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    def __init__(self, branch: nn.Module, after: nn.Module, swapped: bool) -> None:
        super().__init__()
        self.branch, self.after, self.swapped = branch, after, swapped

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(x + self.branch(x) if self.swapped else self.branch(x) + x)
        return y


class Parted(nn.Module):
    """Scales and shifts channels by a weight that it takes apart."""

    def __init__(self, channels: int, how: Callable[[Tensor], Iterable[Tensor]]) -> None:
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.randn(2 * channels, 1, 1)), how

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.how(self.weight)
        return x * scale + shift


class OnTokens(nn.Module):
    """A Linear over the channels of every position."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.linear(x.flatten(2).transpose(1, 2))
        return cast("Tensor", tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


def fitting(extent: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (extent + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@st.composite
def convolutions(draw: st.DrawFn, shape: Shape, same: bool = False) -> tuple[nn.Module, Shape]:
    """Any convolution that `shape` allows; one that keeps the shape where `same`."""
    channels, *extent = shape
    groups = draw(st.sampled_from([each for each in (1, 1, 2, channels) if channels % each == 0]))
    filters = channels if same else groups * draw(st.integers(1, max(1, 20 // groups)))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 3), (1, 5), (2, 3)]))
    if same:
        kernel = draw(st.sampled_from([(1, 1), (3, 3)]))
        stride, dilation = (1, 1), draw(st.sampled_from([(1, 1), (2, 1)]))
        padding = (dilation[0] * (kernel[0] // 2), dilation[1] * (kernel[1] // 2))
    else:
        pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
        stride, dilation = draw(st.one_of(st.just((1, 1)), pairs)), draw(st.one_of(st.just((1, 1)), pairs))
        padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    sizes = [fitting(*each) for each in zip(extent, kernel, stride, padding, dilation, strict=True)]
    if min(sizes) < 1:
        return nn.Identity(), shape
    conv = nn.Conv2d(channels, filters, kernel, stride, padding, dilation, groups, draw(st.booleans()))
    return conv, (filters, sizes[0], sizes[1])


@st.composite
def poolings(draw: st.DrawFn, shape: Shape) -> tuple[nn.Module, Shape]:
    channels, *extent = shape
    kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    padding = draw(st.integers(0, kernel // 2))
    sizes = [fitting(each, kernel, stride, padding, 1) for each in extent]
    if min(sizes) < 1:
        return nn.Identity(), shape
    ceil = draw(st.booleans())
    largest = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)
    average = nn.AvgPool2d(kernel, stride, padding, ceil_mode=ceil, count_include_pad=draw(st.booleans()))
    _, high, wide = largest(torch.zeros(shape)).shape
    return draw(st.sampled_from([largest, average])), (channels, high, wide)


@st.composite
def functions(draw: st.DrawFn, shape: Shape) -> tuple[nn.Module, Shape]:
    """What no layer does: views, copies and torch operators between them."""
    channels, high, wide = shape
    choices: list[tuple[Callable[[Tensor], Tensor], Shape]] = [
        (lambda x: x.permute(0, 1, 3, 2), (channels, wide, high)),
        (lambda x: x.permute(0, 3, 1, 2), (wide, channels, high)),
        (lambda x: torch.roll(x, 1, 2), shape),
        (lambda x: torch.cat([x, -x], 1), (2 * channels, high, wide)),
        (lambda x: x * 0.5 + x.mean(1, keepdim=True), shape),
        (lambda x: x.reshape(x.shape[0], wide, high, channels), (wide, high, channels)),
        (lambda x: x[:, :, -1:], (channels, 1, wide)),
        (lambda x: x[:, : (channels + 1) // 2, :, ::2], ((channels + 1) // 2, high, (wide + 1) // 2)),
        (lambda x: x.softmax(1), shape),
        (lambda x: x.softmax(-1) @ x.transpose(2, 3), (channels, high, high)),
        (lambda x: nn.functional.group_norm(x, 1), shape),
        (lambda x: nn.functional.pad(x, (1, 0, 0, 2)), (channels, high + 2, wide + 1)),
        (lambda x: nn.functional.interpolate(x, scale_factor=2), (channels, 2 * high, 2 * wide)),
        (lambda x: x - x.mean((1, 3), keepdim=True), shape),
    ]
    parts: list[Callable[[Tensor], Iterable[Tensor]]] = [
        lambda weight: weight.chunk(2),
        lambda weight: weight.split(channels),
        lambda weight: weight.unflatten(0, (2, channels)).unbind(0),
    ]
    function, after = draw(st.sampled_from([*choices, (None, shape)]))
    return (Parted(channels, draw(st.sampled_from(parts))) if function is None else Does(function)), after


@st.composite
def stages(draw: st.DrawFn, shape: Shape) -> tuple[nn.Module, Shape]:
    """One stage that works on maps, and the shape it gives."""
    channels = shape[0]
    kind = draw(st.sampled_from(["conv", "conv", "conv", "residual", "residual", "norm", "act", "pool", "does", "fc"]))
    if kind == "conv":
        return draw(convolutions(shape))
    if kind == "pool":
        return draw(poolings(shape))
    if kind == "does":
        return draw(functions(shape))
    if kind == "norm":
        return nn.BatchNorm2d(channels), shape
    if kind == "act":
        return draw(st.sampled_from(ACTIVATIONS))(), shape
    if kind == "fc":
        filters = draw(st.integers(1, 12))
        return OnTokens(nn.Linear(channels, filters)), (filters, *shape[1:])
    first, last = (draw(convolutions(shape, same=True))[0] for _ in range(2))
    norms = [nn.BatchNorm2d(channels) if draw(st.booleans()) else nn.Identity() for _ in range(2)]
    inner, after = (draw(st.sampled_from([nn.Identity, *ACTIVATIONS]))() for _ in range(2))
    branch = nn.Sequential(first, norms[0], inner, last, norms[1])
    return Residual(branch, after, draw(st.booleans())), shape


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A pruned network in eval mode, and an input."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    start = shape = (draw(st.integers(1, 6)), draw(st.integers(4, 14)), draw(st.integers(4, 18)))
    made: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 5))):
        module, shape = draw(stages(shape))
        made.append(module)
    width = shape[0]
    if draw(st.booleans()):
        made += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    elif shape[0] * shape[1] * shape[2] <= 600 and draw(st.booleans()):
        made += [nn.Flatten()]
        width *= shape[1] * shape[2]
    if isinstance(made[-1], nn.Flatten):
        made += [nn.Linear(width, draw(st.integers(1, 20))), draw(st.sampled_from([nn.Identity, *ACTIVATIONS]))()]
    model = nn.Sequential(*made).eval()
    pattern = draw(st.sampled_from(list(PATTERNS)))
    prune(model, pattern, draw(st.one_of(st.sampled_from([0.0, 0.5, 0.9]), st.floats(0.0, 0.99))))
    return model, torch.randn(draw(st.integers(1, 3)), *start)


@torch.no_grad()
def prune(model: nn.Module, pattern: str, sparsity: float) -> None:
    """Prunes in place, and gives the norms something to do."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            groups = module.groups if isinstance(module, nn.Conv2d) else 1
            member = PATTERNS.create(Choice(pattern))
            module.weight.mul_(member.mask(module.weight.abs(), sparsity, groups))
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5)


class Told(dict[str, Tiling]):
    """Answers for every layer: nothing needs to be timed, and any tiling comes up."""

    def __init__(self, answer: Callable[[], Tiling]) -> None:
        super().__init__()
        self.answer = answer

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> Tiling:
        self[key] = self.answer()
        return self[key]


def told(folder: Path, answer: Callable[[], Tiling]) -> TuningCache:
    cache = TuningCache(folder / "tuning.json")
    cache.found = Told(answer)
    return cache


def any_tiling(rng: random.Random) -> Tiling:
    size, block = rng.choice([1, 4, 16]), rng.choice([1, 30, 192, 1000])
    panel, flags = rng.choice([0, 0, 1, 9, 256]), [rng.random() < 0.5 for _ in range(2)]
    return Tiling(size, block, rng.choice([0, 1, 2]), flags[0], panel, flags[1])


def assert_close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    if wanted.numel():
        assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-6


@pytest.mark.slow
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(network=networks(), threads=st.sampled_from([1, 2, 3]), other=st.integers(0, 5), seed=st.integers(0, 2**20))
def test_a_program_computes_what_the_masked_model_does(
    network: tuple[nn.Module, Tensor], threads: int, other: int, seed: int, tmp_path: Path
) -> None:
    model, x = network
    before, rng = copy.deepcopy(model.state_dict()), random.Random(seed)
    again = torch.randn(other, *x.shape[1:])
    given_input = x.clone()
    fast = repack(model, x, form="program", threads=threads, cache=told(tmp_path, lambda: any_tiling(rng)))
    assert isinstance(fast, ProgramModel)
    with torch.inference_mode():
        first = fast(x)
        assert_close(first, model(x))
        assert_close(fast(again), model(again))
        assert torch.equal(fast(x), first)
        save(fast, tmp_path / "model.safetensors")
        loaded = load(tmp_path / "model.safetensors", threads=threads)
        assert torch.equal(loaded(x), first)
        assert torch.equal(loaded(again), fast(again))
        others = load(tmp_path / "model.safetensors", threads=threads % 3 + 1)  # sums in other orders
        assert_close(others(x), first)
        assert_close(others(again), fast(again))
    assert torch.equal(x, given_input)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(512, 32)
    ).eval()


@functools.cache
def graph() -> Graph:
    return capture(net(), (torch.randn(2, 8, 8, 8),))


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_a_file_shrinks_as_sparsity_grows(pattern: str, tmp_path: Path) -> None:
    x = torch.randn(2, 8, 8, 8)
    sizes = []
    for sparsity in (0.0, 0.5, 0.75, 0.9):
        model = net()
        prune(model, pattern, sparsity)
        fast = repack(model, x, form="program", graph=graph(), cache=told(tmp_path, Tiling))
        save(fast, tmp_path / "model.safetensors")
        sizes.append((tmp_path / "model.safetensors").stat().st_size)
    dense = sum(value.numel() * value.element_size() for value in net().state_dict().values())
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < 1.2 * dense
    if pattern != "n:m":  # whose sparsity is its own
        assert len(set(sizes)) == 4
        assert sizes[-1] < 0.35 * dense
