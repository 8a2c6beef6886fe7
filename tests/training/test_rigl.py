"""RigL: what is dropped and what grows, how much of it, when, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from autoprune.errors import ConfigError
from autoprune.masks import sparsity
from autoprune.model.weights import weight_of
from autoprune.patterns import PATTERNS
from autoprune.registry import Choice
from autoprune.testing.cases import conv_net_pruner
from autoprune.training import TRAINING, Pruner
from autoprune.training.rigl import Rigl

SINGLE = Choice("unstructured")
GROUPS = [Choice("group", {"size": 4}), Choice("group", {"size": 4, "permute": True}), Choice("n:m"), Choice("filter")]


def step_(subject: Pruner, method: Rigl, step: int, generator: torch.Generator) -> dict[str, Tensor]:
    """One step that moves nothing, under random gradients, which are returned."""
    gradients = {}
    for name in subject.inventory.names:
        weight = weight_of(subject.model, name)
        gradients[name] = torch.randn(weight.shape, generator=generator)
        weight.grad = gradients[name].clone()
    method.before_step(step)
    method.after_step(step)
    return gradients


def test_the_smallest_are_dropped_and_the_largest_gradients_grow() -> None:
    subject = conv_net_pruner(SINGLE, [0.75, 0.75, 0.75])
    method = Rigl(end=1.0, updates=4, replaced=0.5)
    method.start(subject, 8)
    generator = torch.Generator().manual_seed(1)
    step_(subject, method, 1, generator)
    before = {name: mask.clone() for name, mask in method.masks.items()}
    weights = {name: weight_of(subject.model, name).detach().clone() for name in before}
    gradients = step_(subject, method, 2, generator)
    share = 0.5 * (1.0 + math.cos(math.pi / 4)) / 2
    for name, mask in before.items():
        kept = round((1.0 - share) * 0.25 * mask.numel())
        order = (weights[name].abs() * mask).flatten().argsort(descending=True)
        stays = torch.zeros(mask.numel(), dtype=torch.bool)
        stays[order[:kept]] = True
        wanted = stays.clone()
        asked = gradients[name].abs().flatten().masked_fill(stays, -1.0)
        wanted[asked.argsort(descending=True)[: mask.numel() // 4 - kept]] = True
        assert torch.equal(method.masks[name].flatten(), wanted)
        grown, weight = wanted.reshape(mask.shape) & ~mask, weight_of(subject.model, name).detach()
        assert bool(grown.any())
        assert bool(weight[grown].all()), "a zero would look cut"
        assert float(weight[grown].abs().max()) < 0.01 * float(weights[name][mask].abs().max())
        assert torch.equal(weight[mask & wanted.reshape(mask.shape)], weights[name][mask & wanted.reshape(mask.shape)])


@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_less_is_replaced_step_by_step_until_the_masks_stay(growth: str) -> None:
    subject = conv_net_pruner(SINGLE, [0.5, 0.5, 0.5])
    method = Rigl(end=0.8, updates=8, growth=growth, replaced=1.0)
    torch.manual_seed(0)
    method.start(subject, 20)
    generator = torch.Generator().manual_seed(1)
    replaced = []
    for step in range(1, 21):
        before = {name: mask.clone() for name, mask in method.masks.items()}
        step_(subject, method, step, generator)
        changed = sum(int((mask & ~before[name]).sum()) for name, mask in method.masks.items())
        replaced.append(changed)
        assert all(sparsity(mask) == 0.5 for mask in method.masks.values())
    assert [step for step, count in enumerate(replaced, 1) if count] == [2, 4, 6, 8, 10, 12, 14]
    assert replaced[1] > replaced[7] > replaced[13]


@pytest.mark.parametrize("pattern", GROUPS, ids=str)
def test_cells_grow_as_a_whole(pattern: Choice) -> None:
    subject = conv_net_pruner(pattern, [0.5, 0.5, 0.5])
    method = Rigl(updates=5)
    method.start(subject, 20)
    generator = torch.Generator().manual_seed(1)
    seen = [dict(method.masks)]
    for step in range(1, 21):
        step_(subject, method, step, generator)
        seen.append(dict(method.masks))
        for name, mask in method.masks.items():
            assert PATTERNS.create(pattern).check(mask, subject.inventory[name].conv_groups)
            assert sparsity(mask) == 0.5
    assert any(not torch.equal(seen[0][name], seen[-1][name]) for name in seen[0])


def test_what_does_not_ask_to_grow_does_not() -> None:
    """All gradients are zero: what is there stays, though it is small."""
    subject = conv_net_pruner(SINGLE, [0.5, 0.5, 0.5])
    method = Rigl(end=1.0, updates=5)
    method.start(subject, 5)
    before = {name: mask.clone() for name, mask in method.masks.items()}
    for step in range(1, 6):
        for name in before:
            weight_of(subject.model, name).grad = torch.zeros_like(weight_of(subject.model, name))
        method.before_step(step)
        method.after_step(step)
    assert all(torch.equal(method.masks[name], mask) for name, mask in before.items())


def test_a_start_that_is_denser_rises_to_the_plan() -> None:
    subject = conv_net_pruner(SINGLE, [0.8, 0.8, 0.8])
    method = Rigl(end=1.0, updates=4, start=0.5)
    method.start(subject, 4)
    generator = torch.Generator().manual_seed(1)
    shares = [sparsity(method.masks["5"])]
    for step in range(1, 5):
        step_(subject, method, step, generator)
        shares.append(sparsity(method.masks["5"]))
    wanted = [0.8 * (0.5 + 0.5 * (1.0 - (1.0 - step / 4) ** 3)) for step in range(5)]
    assert shares == pytest.approx(wanted, abs=1 / 768)


def test_an_allocation_sets_shares_that_stay_and_are_resumed() -> None:
    subject = conv_net_pruner(SINGLE, [0.8, 0.8, 0.8])
    method = Rigl(end=1.0, updates=4, allocation="erk")
    method.start(subject, 4)
    generator = torch.Generator().manual_seed(1)
    first = {name: sparsity(mask) for name, mask in method.masks.items()}
    assert len(set(first.values())) > 1
    for step in range(1, 5):
        step_(subject, method, step, generator)
        assert {name: sparsity(mask) for name, mask in method.masks.items()} == pytest.approx(first, abs=1e-9)
    again = Rigl(end=1.0, updates=4, allocation="lamp")
    again.start(conv_net_pruner(SINGLE, [0.8, 0.8, 0.8]), 4)
    assert again.shares != method.shares
    again.load_state(method.state())
    assert again.shares == method.shares
    assert all(torch.equal(again.masks[name], mask) for name, mask in method.masks.items())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"begin": 0.9, "end": 0.6}, "needs 0 <= begin < end <= 1, not begin=0.9, end=0.6"),
        ({"updates": 0}, "updates must be an integer >= 1, not 0"),
        ({"replaced": 1.5}, "replaced must be a number in [0, 1], not 1.5"),
        ({"start": -0.5}, "start must be a number in [0, 1], not -0.5"),
        ({"growth": "gradients"}, "unknown growth 'gradients'. Did you mean 'gradient'?"),
    ],
)
def test_wrong_arguments_are_refused(args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TRAINING.create(Choice("rigl", args))
    assert said in str(caught.value)
