"""Whole residual branches: found, ranked, cut for good, and gone from the repacked program."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.errors import AutopruneError
from autoprune.model.weights import weight_of
from autoprune.repack import Branch, capture, cut_branches_, find_branches, rank_branches, remaining_macs, repack
from autoprune.repack.graph.passes import simplify
from autoprune.repack.graph.reference import reference
from autoprune.settings import TrainingSettings
from autoprune.tasks.digits import digits
from autoprune.training import train_

X = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(steps: int = 10) -> nn.Module:
    """A small ResNet whose norms have shifts."""
    task = digits(widths=(8, 16), blocks=2)
    train_(task.model, task.train, task.loss, TrainingSettings(max_steps=steps), seed=0)
    return task.model.eval()


class Mlp(nn.Module):
    """Two branches without norms, the inner one within the outer one, and a layer beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.c, self.last = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.a(x).relu()
        y = y + self.b(y)
        x = x + self.c(y.relu())
        out: Tensor = self.last(x)
        return out


def layers_of(model: nn.Module, x: Tensor) -> set[str]:
    return {op.attributes["layer"] for op in simplify(capture(model, (x,))).ops if "layer" in op.attributes}


def test_the_branches_of_a_resnet_are_its_blocks() -> None:
    branches = find_branches(trained(1), X)
    assert [branch.layers[:2] for branch in branches] == [
        ("1.conv1", "1.conv2"), ("2.conv1", "2.conv2"), ("3.conv1", "3.conv2"), ("4.conv1", "4.conv2"),
    ]  # fmt: skip


def test_a_branch_may_lie_within_another() -> None:
    torch.manual_seed(0)
    model, x = Mlp().eval(), torch.randn(3, 8)
    assert find_branches(model, x) == (Branch(("b",)), Branch(("a", "b", "c")))
    assert cut_branches_(model, x, ["b"]) == ("b",)
    assert layers_of(model, x) == {"first", "a", "c", "last"}
    torch.testing.assert_close(repack(model, x, form="program")(x), model(x))
    assert set(cut_branches_(model, x, ["a"])) == {"a", "c"}  # b is gone already
    assert layers_of(model, x) == {"first", "last"}
    torch.testing.assert_close(model(x), model.last(model.first(x)))


@pytest.mark.slow
def test_a_cut_branch_stays_cut_and_is_not_run() -> None:
    model = trained()
    task = digits(widths=(8, 16), blocks=2)
    before = remaining_macs(model, X)
    assert cut_branches_(model, X, ["2.conv1", "4.conv2"]) == ("2.conv1", "2.conv2", "4.conv1", "4.conv2")
    settings = TrainingSettings(max_steps=10, learning_rate=0.1)
    start = copy.deepcopy(model.state_dict())
    train_(model, task.train, task.loss, settings, seed=0)
    model.eval()
    assert not torch.equal(start["1.conv1.weight"], weight_of(model, "1.conv1"))
    graph = simplify(capture(model, (X,)))
    kept = {op.attributes["layer"] for op in graph.ops if "layer" in op.attributes}
    assert not any(name.startswith(("2.", "4.")) for name in kept)
    assert {"1.conv1", "1.conv2", "3.conv1", "3.conv2"} <= kept
    assert remaining_macs(model, X) == before - 2 * 2 * (8 * 8 * 9 * 32 * 32 + 16 * 16 * 9 * 16 * 16)
    with torch.no_grad():
        wanted = model(X)
    torch.testing.assert_close(reference(graph, (X,)), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(repack(model, X, form="program")(X), wanted, rtol=1e-4, atol=1e-5)


def test_the_ranking_is_the_loss_without_each() -> None:
    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(3, 8)
    nn.init.constant_(weight_of(model, "b"), 1e-6)
    nn.init.zeros_(model.b.bias)
    target = model(x).detach()
    before = copy.deepcopy(model.state_dict())
    (first, little), (second, much) = rank_branches(model, x, [(x, target)], functional.mse_loss)
    assert (first.layers, second.layers) == (("b",), ("a", "b", "c"))
    assert little < 1e-6
    assert much == pytest.approx(functional.mse_loss(model.last(model.first(x)), target).item())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(AutopruneError, match="no batches"):
        rank_branches(model, x, [], functional.mse_loss)


def test_a_layer_on_the_only_way_is_refused() -> None:
    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(3, 8)
    with pytest.raises(AutopruneError, match="'last' cannot be cut as a whole: it lies in no residual branch"):
        cut_branches_(model, x, ["b", "last"])
    assert weight_of(model, "b").any()
    with pytest.raises(AutopruneError, match="The model has none"):
        cut_branches_(nn.Sequential(nn.Linear(8, 8)), x, ["0"])


def test_a_branch_that_would_leave_a_constant_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)
            nn.init.ones_(self.norm.running_mean)  # type: ignore[arg-type]

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.norm(self.conv(x))
            return y.relu()

    model = Plain().eval()
    with pytest.raises(AutopruneError, match="branch of conv cannot be cut"):
        cut_branches_(model, torch.randn(1, 8, 6, 6), ["conv"])
    assert model.conv.weight.any()
