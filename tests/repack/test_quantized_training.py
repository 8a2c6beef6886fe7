"""Fake quantisation: a model computes in training what its int8 program will."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import autoprune
from autoprune.errors import AutopruneError
from autoprune.quantization import Grid, attach_, dequantize_, grids_of, unrounded
from autoprune.quantization.fake import fake_quantized, fake_quantized_weight
from autoprune.repack.int8 import tensors_in
from autoprune.repack.outputs import noise_of
from autoprune.repack.report import ProgramModel
from autoprune.repack.runtime.by_torch import TorchPlan
from autoprune.tasks.zoo.small import lenet5, residual_cnn, tiny_transformer


class Inline(nn.Module):
    """Sums in one forward, which no module returns; a pooled map that a layer and a sum read; a shared activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.b, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.act(self.norm(self.stem(x))), 2)
        x = self.act(self.a(x)) + x
        x = self.act(self.b(x) + x)
        y: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return y


class Inverted(nn.Module):
    """MobileNet's block: depthwise, a linear bottleneck, its sum returned by a module."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.deep = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm, self.down = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.relu6(self.norm(self.deep(F.hardswish(self.up(x))))))
        return y


class Rows(nn.Module):
    """Residual rows that stay float, a norm that goes into the columns of the Linear behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(12, 24), nn.Linear(24, 12), nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(x)))
        y: Tensor = self.head(self.norm(F.relu(x)))
        return y


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (lambda: residual_cnn(1, 10, (8, 16)), (2, 1, 16, 16)),
    "pooled": (lambda: lenet5(1, 10, (8, 12, 20)), (2, 1, 28, 28)),
    "inline": (Inline, (2, 3, 12, 12)),
    "inverted": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Inverted(), Inverted()), (2, 3, 12, 12)),
    "rows": (Rows, (4, 12)),
    "transformer": (lambda: tiny_transformer(1, 10, 16, 1, 2, 4, 16), (2, 1, 16, 16)),
}


def data(shape: tuple[int, ...], count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def trained_(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """Some steps of anybody's training, towards anything."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model.train()
    for x in batches:
        loss = model(x).square().mean() + model(x).sum() / 100
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def ready(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    return trained_(make(), data(shape, 5, 1)), data(shape, 1)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_int8_computes_what_was_trained(name: str) -> None:
    model, x = ready(name)
    autoprune.quantize_(model, x, data(tuple(x.shape), 3, 2))
    trained_(model, data(tuple(x.shape), 5, 3))
    fast = autoprune.repack(model, x, precision="int8")
    plain = autoprune.dequantize_(copy.deepcopy(model))
    assert isinstance(fast, ProgramModel)
    assert any(row.precision == "int8" for row in fast.report)
    said = TorchPlan(fast.program.graph, fast.program.weights)
    for given in data(tuple(x.shape), 4, 4):
        with torch.inference_mode():
            wanted, whole, got = model(given), plain(given), fast(given)
            exact = tensors_in(said.run((given,)))
        quantising = noise_of((whole,), (wanted,))
        assert noise_of(exact, (wanted,)) < 1e-3 * quantising
        assert noise_of((got,), (wanted,)) < 0.2 * quantising  # a kernel's GELU may round a value near a tie otherwise


def test_a_model_is_undone_and_its_parameters_stay_what_they_are() -> None:
    model, x = ready("residual")
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    parameters = dict(model.named_parameters())
    with torch.inference_mode():
        plain = model(x)
    rows = autoprune.quantize_(model, x, data(tuple(x.shape), 3))
    assert {row.precision for row in rows} == {"int8"}
    assert dict(model.named_parameters()) == parameters
    assert [type(module) for module in model.modules()] == kinds
    with torch.inference_mode():
        assert 0 < noise_of((model(x),), (plain,)) < 0.1
    assert autoprune.dequantize_(model) is model
    assert not grids_of(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(model(x), plain)


def test_rounded_weights_compute_the_same_and_are_a_fixed_point() -> None:
    model, x = ready("pooled")
    autoprune.quantize_(model, x, data(tuple(x.shape), 2))
    rounded, grids = copy.deepcopy(model), grids_of(model)
    autoprune.dequantize_(rounded, rounded=True)
    weights = copy.deepcopy(rounded.state_dict())
    with torch.inference_mode():
        wanted = model(x)
        attach_(rounded, grids)
        assert noise_of((rounded(x),), (wanted,)) < 1e-6
    assert all(torch.allclose(rounded.state_dict()[name], value, atol=1e-7) for name, value in weights.items())


def test_states_and_copies_keep_the_grids() -> None:
    model, x = ready("residual")
    autoprune.quantize_(model, x, data(tuple(x.shape), 2, 1))
    other, _ = ready("residual")
    autoprune.quantize_(other, x, [10 * each for each in data(tuple(x.shape), 2, 2)])
    assert grids_of(other) != grids_of(model)
    other.load_state_dict(model.state_dict())
    assert grids_of(other) == grids_of(model) == grids_of(copy.deepcopy(model))
    with torch.inference_mode():
        assert torch.equal(other(x), model(x))
        assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_quantising_again_calibrates_anew() -> None:
    model, x = ready("pooled")
    batches = data(tuple(x.shape), 2)
    autoprune.quantize_(model, x, batches)
    once, hooks = grids_of(model), sum(len(each._forward_hooks) for each in model.modules())
    autoprune.quantize_(model, x, batches)
    assert grids_of(model) == once
    assert sum(len(each._forward_hooks) for each in model.modules()) == hooks


def test_a_failing_call_leaves_the_weight_in_its_place() -> None:
    layer = nn.Sequential(nn.Conv2d(3, 4, 3))
    attach_(layer, {"0.int8_input": Grid(0.1, 5)})
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 2, 5, 5))
    assert layer[0].weight is dict(layer.named_parameters())["0.weight"]


def test_a_layer_that_is_the_whole_model_becomes_int8() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(32, 16), torch.randn(20, 32)
    assert [row.precision for row in autoprune.quantize_(model, x, [x])] == ["int8"]
    assert list(grids_of(model)) == ["int8_input"]
    fast = autoprune.repack(model, x, precision="int8")
    assert [row.precision for row in fast.report] == ["int8"]
    with torch.inference_mode():
        assert noise_of((fast(x),), (model(x),)) < 1e-5
    calibrated = autoprune.repack(autoprune.dequantize_(model), x, precision="int8", calibration=[x])
    assert [row.precision for row in calibrated.report] == ["int8"]


@pytest.mark.parametrize("place", ["0.int8_output", "1.int8_input"])
def test_rounded_values_can_be_changed_in_place(place: str) -> None:
    class InPlace(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[0](x)
            x += 1
            return F.relu(self[1](x), inplace=True)

    model = InPlace(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    attach_(model, {place: Grid(0.02, 100), "1.int8_output": Grid(0.02, 100)})
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Waiting(nn.Linear):
    """Its first call waits until it may go on."""

    def __init__(self) -> None:
        super().__init__(6, 5)
        self.first, self.inside, self.go_on = True, threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            self.first = False
            self.inside.set()
            assert self.go_on.wait(60)
        return super().forward(x)


@pytest.mark.parametrize("exact", [False, True])
def test_a_thread_that_ends_first_changes_nothing_in_another(exact: bool) -> None:
    """Whether that one, which computes without gradients, rounds or is exact."""
    torch.manual_seed(0)
    layer, x = Waiting(), torch.randn(4, 6)
    attach_(layer, {"int8_input": Grid(0.02, 128)})
    weight = layer.weight
    wanted = F.linear(fake_quantized(x, Grid(0.02, 128)), fake_quantized_weight(weight), layer.bias)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(layer, x)
        assert layer.inside.wait(60)
        with torch.no_grad(), unrounded() if exact else nullcontext():
            assert torch.equal(layer(x), F.linear(x, weight, layer.bias) if exact else wanted)
        layer.go_on.set()
        got = waiting.result()
    assert torch.equal(got, wanted)
    got.sum().backward()
    assert weight.grad is not None
    assert layer.weight is weight


def test_a_weight_that_another_tool_computes_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    attach_(model, {"0.int8_input": Grid(0.02, 128)})
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(AutopruneError, match="make it plain"):
        model(torch.zeros(1, 6))
    with pytest.raises(AutopruneError, match="make it plain"):
        dequantize_(model, rounded=True)
    with pytest.raises(AutopruneError, match="make it plain"):
        attach_(model, {"0.int8_input": Grid(0.02, 128)})
    prune.remove(model[0], "weight")
    assert model(torch.ones(1, 6)).shape == (1, 5)


def test_a_shared_weight_is_rounded_for_the_int8_layer_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.words = nn.Linear(6, 20, bias=False), nn.Embedding(20, 6)
            self.words.weight = self.head.weight

        def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
            x = self.words(tokens)
            return x, self.head(x)

    torch.manual_seed(0)
    model, tokens = Tied(), torch.arange(12).reshape(3, 4)
    attach_(model, {"head.int8_input": Grid(0.05, 128)})
    with torch.no_grad():
        wanted = model(tokens)
        dequantize_(model, rounded=True)
        attach_(model, {"head.int8_input": Grid(0.05, 128)})
        got = model(tokens)
    assert torch.equal(got[0], wanted[0])
    assert noise_of(got, wanted) < 1e-6


def test_gradients_pass_where_values_are_on_the_grid() -> None:
    x = torch.tensor([-1.0, -0.26, 0.1, 0.9, 5.0], requires_grad=True)
    rounded = fake_quantized(x, Grid(0.01, 50))
    assert torch.equal(rounded.detach(), Grid(0.01, 50).rounded(x.detach()))
    rounded.backward(torch.arange(5.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 2, 3, 0]
    weight = torch.randn(4, 3, requires_grad=True)
    fake_quantized_weight(weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(4, 3))


def test_half_precision_goes_on_in_half_precision() -> None:
    model, x = ready("pooled")
    autoprune.quantize_(model, x, data(tuple(x.shape), 2))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(x).dtype == torch.bfloat16


def test_training_lowers_the_loss_of_the_rounded_model() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(64, 6)
    target = x[:, :3] * x[:, 3:]
    autoprune.quantize_(model, x, [x])

    def loss() -> Tensor:
        return F.mse_loss(model(x), target)

    first, optimizer = loss().item(), torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < first / 2


def test_pruning_hooks_and_criteria_see_through_it() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(6, 8)
    autoprune.quantize_(model, x, [x])
    batches = [(x, torch.zeros(6, dtype=torch.int64))]
    pruning = autoprune.PruningHooks(model, x, "one_shot", sparsity=0.5, criterion="activation", batches=batches)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruning.start(optimizer, 1)
    model(x).sum().backward()
    optimizer.step()
    pruning.after_step()
    masks = pruning.finish()
    assert all((dict(model.named_parameters())[f"{name}.weight"] == 0).equal(~mask) for name, mask in masks.items())
    fast = autoprune.repack(model, x, precision="int8")
    with torch.inference_mode():
        assert noise_of((fast(x),), (model(x),)) < 1e-5


@pytest.mark.parametrize("calls", [1, 2])
def test_a_layer_that_is_called_twice_stays_float(calls: int) -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(calls):
                x = F.relu(self.one(x))
            y: Tensor = self.other(x)
            return y

    model, x = Repeated(), torch.randn(4, 8)
    rows = autoprune.quantize_(model, x, [x])
    found = {row.precision for row in rows if row.layer == "one"}
    assert found == {"int8" if calls == 1 else "float32"}
    assert {row.precision for row in rows if row.layer == "other"} == {"int8"}


def test_what_makes_no_sense_is_refused() -> None:
    model, x = ready("pooled")
    with pytest.raises(AutopruneError, match="a list of batches"):
        autoprune.quantize_(model, x, x)
    with pytest.raises(AutopruneError, match="NaN or infinite"):
        autoprune.quantize_(model, x, [x / 0])
    assert not grids_of(model)
    autoprune.quantize_(model, x, [x])
    with pytest.raises(AutopruneError, match="is fake-quantised: repack it with precision='int8'"):
        autoprune.repack(model, x)
    with pytest.raises(AutopruneError, match="leave calibration out"):
        autoprune.repack(model, x, precision="int8", calibration=[x])
    with pytest.raises(AutopruneError, match="is fake-quantised: undo that first"):
        autoprune.export_onnx(model, x, "unwritten.onnx")
    with pytest.raises(AutopruneError, match="no module 'nothing'"):
        attach_(model, {"nothing.int8_input": Grid(1.0)})
    with pytest.raises(AutopruneError, match="'1' is a ReLU"):
        attach_(model, {"1.int8_input": Grid(1.0)})


def test_grids_of_one_value_that_differ_are_refused() -> None:
    model, x = ready("residual")
    autoprune.quantize_(model, x, [x])
    model.get_buffer("2.shortcut.0.int8_input").mul_(2)
    with pytest.raises(AutopruneError, match="are grids of one value and differ"):
        autoprune.repack(model, x, precision="int8")


def test_layers_whose_weight_is_computed_stay_float() -> None:
    normed, masked, plain = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)
    parametrizations.weight_norm(normed)
    prune.l1_unstructured(masked, "weight", 0.5)
    model = nn.Sequential(normed, nn.ReLU(), masked, nn.ReLU(), plain).eval()
    batches = data((2, 3, 8, 8), 3)
    rows = autoprune.quantize_(model, batches[0], batches)
    assert [row.precision for row in rows] == ["float32", "float32", "int8"]
    assert all("plain weight" in row.why for row in rows[:2])
    assert grids_of(model).keys() == {"4.int8_input"}
    fast = autoprune.repack(model, batches[0], precision="int8")
    with torch.inference_mode():
        assert noise_of((fast(batches[1]),), (model(batches[1]),)) < 1e-5
