"""The proximal method: its operators solve their problems, its strength follows the budget, splicing brings back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.errors import ConfigError
from autoprune.model.inventory import take_inventory
from autoprune.model.weights import weight_of
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.testing.cases import random_batches
from autoprune.training import TRAINING, Pruner, train_
from autoprune.training.proximal import Proximal, half, soft

LOSS = nn.functional.cross_entropy
GROUP = Choice("group", {"size": 4})


@given(threshold=st.floats(0.01, 2.0), above=st.floats(1e-3, 5.0))
def test_half_thresholding_minimises_its_problem(threshold: float, above: float) -> None:
    size = threshold + above
    strength = (4.0 * threshold / 54.0 ** (1 / 3)) ** 1.5
    grid = torch.linspace(0.0, 2.0 * size, 200_001, dtype=torch.float64)
    objective = (grid - size).square() + strength * grid.sqrt()
    found = half(torch.tensor([size], dtype=torch.float64), threshold)
    assert found.item() == pytest.approx(float(grid[objective.argmin()]), abs=3e-5 * size)


@given(threshold=st.floats(0.01, 2.0))
def test_at_the_threshold_zero_is_as_good(threshold: float) -> None:
    size = torch.tensor([threshold], dtype=torch.float64)
    strength = (4.0 * threshold / 54.0 ** (1 / 3)) ** 1.5
    found = half(size, threshold)
    assert found.item() == pytest.approx(2 / 3 * threshold, rel=1e-6)
    value = (found - size).square() + strength * found.sqrt()
    assert value.item() == pytest.approx(threshold**2, rel=1e-6)


def test_what_is_large_is_shrunk_less_by_half_than_by_l1() -> None:
    size = torch.tensor([1.0, 10.0, 100.0])
    lost = [(size - operator(size, 0.5)) for operator in (half, soft)]
    assert lost[0].diff().lt(0).all(), "the more, the smaller"
    assert torch.equal(lost[1], torch.full((3,), 0.5))
    assert lost[0][2] < 0.05


def subject(sparsity: float = 0.75) -> Pruner:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 12))
    inventory = take_inventory(network, torch.zeros(1, 4, 6, 6))
    plan = Plan(dict.fromkeys(inventory.names, LayerPlan(sparsity, GROUP)))
    return Pruner(network, inventory, plan, [], LOSS)


def sizes(weight: Tensor) -> Tensor:
    """Root mean square of each group of 4 filters at each position."""
    return cast("Tensor", weight.flatten(1).unflatten(0, (-1, 4)).square().mean(1).sqrt())


@pytest.mark.parametrize("penalty", ["half", "l1", "none"])
def test_one_thresholding_is_the_closed_form_on_group_norms(penalty: str) -> None:
    pruner = subject()
    method = Proximal(penalty, end=1.0, updates=1, relaxation=1.0)
    before = {name: pruner.weight(name).detach().clone() for name in pruner.layers}
    method.start(pruner, 1)
    method.before_step(1)
    method.after_step(1)
    operators: dict[str, Callable[[Tensor, float], Tensor]] = {"half": half, "l1": soft, "none": lambda size, _: size}
    for name, weight in before.items():
        size = sizes(weight).double()
        threshold = float(size.flatten().sort().values[round(0.75 * size.numel()) - 1])
        wanted = torch.where(size > threshold, operators[penalty](size, threshold), torch.zeros_like(size))
        assert torch.allclose(sizes(pruner.weight(name)).double(), wanted, atol=1e-6)
        assert method.signals().scalars[f"threshold/{name}"] == pytest.approx(threshold)


@pytest.mark.parametrize("splice", [False, True])
def test_only_splicing_brings_back(splice: bool) -> None:
    pruner = subject()
    method = Proximal(end=1.0, updates=4, splice=splice)
    method.start(pruner, 4)
    came_back = 0.0
    for step in range(1, 5):
        method.before_step(step)
        with torch.no_grad():  # every weight that is cut is pulled outwards
            for name in pruner.layers:
                pruner.weight(name).add_(0.05 * (~method.masks[name] if name in method.masks else 0.0))
        method.after_step(step)
        came_back += method.signals().scalars["regrowth"]
    assert (came_back > 0.0) == splice
    assert all(not weight_of(pruner.model, name)[~mask].any() for name, mask in method.finish().items())


@pytest.mark.parametrize("splice", [False, True])
def test_a_killed_run_goes_on_bit_for_bit(splice: bool, tmp_path: Path) -> None:
    ends = []
    for kill in (False, True):
        pruner, folder = subject(), tmp_path / str(kill)
        for tries in range(2 if kill else 1):
            pruner = subject()
            method = TRAINING.create(Choice("proximal", {"splice": splice, "end": 0.9}))

            def stop(epoch: int, _: object, first: bool = kill and tries == 0) -> None:
                if first and epoch == 2:
                    raise KeyboardInterrupt

            settings = TrainingSettings(epochs=4, learning_rate=0.05)
            try:
                train_(
                    pruner.model, random_batches(6), LOSS, settings, seed=0, method=method, pruner=pruner,
                    checkpoint=folder, on_epoch=stop,
                )  # fmt: skip
            except KeyboardInterrupt:
                continue
        ends.append(pruner.model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"penalty": "hlf"}, "Did you mean 'half'"),
        ({"relaxation": 1.5}, "relaxation must be a number in"),
        ({"splice": 1}, "splice must be true or false"),
        ({"begin": 0.9}, "needs 0 <= begin < end"),
        ({"allocation": "globl"}, "Did you mean 'global'"),
    ],
)
def test_wrong_arguments_are_said(args: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TRAINING.create(Choice("proximal", args))
