"""Adaptive pruning: what a weight is worth, when the cells compete, and what comes back."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.allocation import make_allocation
from autoprune.errors import ConfigError
from autoprune.masks import sparsity
from autoprune.model.inventory import take_inventory
from autoprune.model.weights import weight_of
from autoprune.patterns import PATTERNS
from autoprune.patterns.base import cell_means
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.testing import check_method
from autoprune.testing.cases import random_batches
from autoprune.training import TRAINING, Pruner, train_
from autoprune.training.adaptive import Adaptive, shrinkage

LOSS = nn.functional.cross_entropy
NAMES = ["0", "3", "5"]
GROUP = Choice("group", {"size": 4})


def pruner(pattern: Choice = GROUP, share: float = 0.75) -> Pruner:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.Flatten(),
        nn.Linear(64, 12),
    )  # fmt: skip
    inventory = take_inventory(network, torch.zeros(1, 4, 6, 6))
    plan = Plan({name: LayerPlan(share, pattern) for name in inventory.names})
    return Pruner(network, inventory, plan, random_batches(3), LOSS)


def adaptive(**args: Any) -> Adaptive:
    return cast("Adaptive", TRAINING.create(Choice("adaptive", args)))


def step_(subject: Pruner, method: Adaptive, step: int, moves: dict[str, Tensor]) -> None:
    """One step of an optimizer that moves the dense weights by `moves`."""
    method.before_step(step)
    for name, move in moves.items():
        weight_of(subject.model, name).data.add_(move)
    method.after_step(step)


def moves(generator: torch.Generator, subject: Pruner) -> dict[str, Tensor]:
    return {n: 0.05 * torch.randn(weight_of(subject.model, n).shape, generator=generator) for n in NAMES}


@settings(max_examples=15)
@given(look_ahead=st.floats(0.5, 40.0), memory=st.floats(0.0, 0.99), steps=st.integers(1, 8))
def test_a_weight_is_worth_its_size_and_its_drift(look_ahead: float, memory: float, steps: int) -> None:
    subject = pruner()
    method = adaptive(look_ahead=look_ahead, memory=memory, updates=2, freeze=1.0)
    method.start(subject, 8)
    generator = torch.Generator().manual_seed(steps)
    weight = {name: weight_of(subject.model, name).detach().clone() for name in NAMES}
    seen: list[dict[str, Tensor]] = []
    for step in range(1, steps + 1):
        given_moves = moves(generator, subject)
        seen.append({name: given_moves[name] * weight[name].sign() for name in NAMES})
        weight = {name: weight[name] + given_moves[name] for name in NAMES}
        step_(subject, method, step, given_moves)
    for name in NAMES:
        drift = sum((1 - memory) * memory ** (steps - 1 - i) * outwards[name] for i, outwards in enumerate(seen))
        wanted = (weight[name].abs() + look_ahead * drift).clamp(min=0.0)
        torch.testing.assert_close(method.saliency(name), wanted, rtol=1e-4, atol=1e-5)


def test_what_is_about_to_matter_is_kept_and_without_look_ahead_it_is_cut() -> None:
    kept = {}
    for look_ahead in (0.0, 20.0):
        subject = pruner(Choice("unstructured"), 0.5)
        method = adaptive(look_ahead=look_ahead, begin=0.0, end=0.1, freeze=0.1, updates=1, allocation="planned")
        weight = weight_of(subject.model, "5").data
        weight.fill_(1.0)
        weight[:6], weight[6:] = 0.5, -1.0
        method.start(subject, 50)
        towards = torch.zeros_like(weight)
        towards[:6], towards[6:] = 0.04, 0.04  # the small grow, the large shrink
        for step in range(1, 6):
            step_(subject, method, step, {"5": towards})
        kept[look_ahead] = method.masks["5"]
    assert kept[20.0][:6].all()
    assert not kept[20.0][6:].any()
    assert torch.equal(kept[0.0], ~kept[20.0])


def test_without_look_ahead_size_alone_ranks() -> None:
    subject = pruner()
    method = adaptive(look_ahead=0)
    method.start(subject, 1)
    given_moves = moves(torch.Generator().manual_seed(3), subject)
    latent = {n: (weight_of(subject.model, n).detach() + given_moves[n]).abs() for n in NAMES}
    step_(subject, method, 1, given_moves)
    wanted = subject.masks(saliency=latent, allocation=make_allocation("lamp"))
    assert all(torch.equal(method.masks[name], wanted[name]) for name in NAMES)
    assert len({round(sparsity(mask), 3) for mask in method.masks.values()}) > 1  # the shares are the competition's


@pytest.mark.parametrize("through", [0.0, 0.1, 1.0])
def test_every_weight_learns_straight_through_its_mask(through: float) -> None:
    subject = pruner()
    method = adaptive(updates=3, end=0.3, through=through)
    method.start(subject, 10)
    optimizer = torch.optim.SGD(subject.model.parameters(), lr=0.1)
    for step in range(1, 5):
        latent = {name: value.clone() for name, value in method.latent.items()}
        for name in method.masks:
            torch.testing.assert_close(weight_of(subject.model, name).detach(), latent[name] * method.masks[name])
        optimizer.zero_grad()
        x, y = random_batches()[step - 1]
        LOSS(subject.model(x), y).backward()
        gradients = {name: cast("Tensor", weight_of(subject.model, name).grad).clone() for name in NAMES}
        method.before_step(step)
        optimizer.step()
        cut = dict(method.masks)
        method.after_step(step)
        for name in NAMES:
            part = torch.where(cut[name], 1.0, through) if cut else 1.0
            torch.testing.assert_close(method.latent[name], latent[name] - 0.1 * part * gradients[name])
            if cut:
                assert bool((method.latent[name] != latent[name])[~cut[name]].any()) == (through > 0.0)


@pytest.mark.parametrize("through", [0.0, 0.5])
def test_what_is_cut_drifts_as_its_gradient_asks(through: float) -> None:
    subject = pruner()
    method = adaptive(updates=2, end=0.5, freeze=1.0, memory=0.5, through=through, look_ahead=10)
    method.start(subject, 12)
    optimizer = torch.optim.SGD(subject.model.parameters(), lr=0.1)
    drift = {name: torch.zeros_like(weight_of(subject.model, name)) for name in NAMES}
    for step in range(1, 13):
        optimizer.zero_grad()
        x, y = random_batches()[step % 4]
        LOSS(subject.model(x), y).backward()
        for name in NAMES:
            gradient = cast("Tensor", weight_of(subject.model, name).grad)
            drift[name] = 0.5 * drift[name] - 0.5 * 0.1 * gradient * method.latent[name].sign()
        method.before_step(step)
        optimizer.step()
        method.after_step(step)
        for name in NAMES:
            torch.testing.assert_close(method.drift[name], drift[name], rtol=1e-3, atol=1e-6)
    assert all((drift[name][~method.masks[name]] != 0.0).any() for name in NAMES)


def test_the_budget_follows_the_cubic_then_the_cells_compete_on_then_all_is_frozen() -> None:
    subject = pruner(Choice("unstructured"), 0.8)
    method = adaptive(begin=0.0, end=0.5, freeze=0.75, updates=4)
    method.start(subject, 40)
    generator = torch.Generator().manual_seed(0)
    weights = sum(subject.inventory[name].weights for name in NAMES)
    masks, regrowth = [], []
    for step in range(1, 41):
        step_(subject, method, step, moves(generator, subject))
        masks.append(dict(method.masks))
        regrowth.append(method.signals().scalars["regrowth"])
        cut = sum(int((~mask).sum()) for mask in method.masks.values()) / weights
        wanted = 0.8 * (1.0 - (1.0 - min(1.0, step // 5 * 5 / 20)) ** 3)
        assert cut == pytest.approx(wanted, abs=4 / weights)
    changed = {
        step
        for step, (before, after) in enumerate(pairwise(masks), start=2)
        if before and any(not torch.equal(before[name], after[name]) for name in before)
    }
    assert changed == {10, 15, 20, 25, 30}
    assert regrowth[4] == 0.0, "nothing was cut before"
    assert all(0.0 < regrowth[step - 1] < 1.0 for step in changed)


def test_a_group_that_was_cut_comes_back_as_it_has_become() -> None:
    subject = pruner(Choice("filter"), 0.5)
    method = adaptive(end=0.2, freeze=1.0, updates=1, allocation="planned")
    weight = weight_of(subject.model, "5").data
    weight.fill_(0.5)
    weight[0] = 0.01
    method.start(subject, 10)
    growing = torch.zeros_like(weight)
    growing[0] = 0.2
    kept = []
    for step in range(1, 11):
        step_(subject, method, step, {"5": growing})
        kept.append(bool(method.masks["5"][0].all()) if method.masks else True)
    assert kept[0]
    assert kept[-1]
    torch.testing.assert_close(weight_of(subject.model, "5")[0].detach(), torch.full((64,), 2.01))


def test_a_weak_layer_pays_unless_layers_are_made_to_compare() -> None:
    shares = {}
    for normalise in (False, True):
        subject = pruner(Choice("unstructured"), 0.5)
        weight_of(subject.model, "3").data.mul_(0.01)
        method = adaptive(allocation={"name": "global", "normalise": normalise})
        method.start(subject, 1)
        step_(subject, method, 1, {})
        shares[normalise] = method.signals().scalars["sparsity/3"]
    assert shares[False] > 0.95
    assert shares[True] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("pattern", [GROUP, Choice("n:m")])
def test_the_planned_shares_can_be_kept(pattern: Choice) -> None:
    subject = pruner(pattern, 0.5)
    method = adaptive(allocation="planned")
    assert not method.finds_shares
    result = train_(
        subject.model, random_batches(), LOSS, TrainingSettings(epochs=2), seed=0, method=method, pruner=subject
    )
    assert result.masks is not None
    assert all(sparsity(mask) == pytest.approx(0.5, abs=1e-9) for mask in result.masks.values())


@given(power=st.floats(1.0, 10.0), seed=st.integers(0, 100))
def test_a_power_takes_kept_cells_down_to_the_threshold(power: float, seed: int) -> None:
    latent = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    pattern, cells = PATTERNS.create(GROUP), PATTERNS.create(GROUP).cells((8, 6))
    mask = pattern.mask(latent.square(), 0.5)
    size = cell_means(latent.square(), cells)[0].sqrt()
    kept = cell_means(mask.double(), cells)[0] == 1.0
    threshold = min(float(size[~kept].max()), 0.99 * float(size[kept].min()))
    factor = shrinkage(latent, mask, cells, power)
    after = cell_means((latent * factor).square(), cells)[0].sqrt()
    torch.testing.assert_close(
        after[kept], (size[kept] ** power - threshold**power) ** (1 / power), rtol=1e-3, atol=0.0
    )
    assert bool((factor > 0.0).all())
    assert bool((factor[~mask] == 1.0).all())


def test_a_power_shrinks_nothing_where_nothing_is_cut() -> None:
    latent, cells = torch.randn(4, 4), torch.arange(16).reshape(4, 4)
    assert bool((shrinkage(latent, torch.ones(4, 4, dtype=torch.bool), cells, 3.0) == 1.0).all())


def test_thresholding_keeps_the_laws() -> None:
    check_method(lambda: adaptive(power=3.0, through=0.5), examples=6)
    check_method(lambda: adaptive(power=3.0, through=0.5, allocation="planned"), examples=6)


def test_the_model_computes_with_thresholded_weights_while_what_is_behind_them_is_whole() -> None:
    subject = pruner()
    method = adaptive(power=3.0, end=0.2, updates=1)
    method.start(subject, 10)
    for step in range(1, 11):
        step_(subject, method, step, moves(torch.Generator().manual_seed(step), subject))
    for name in NAMES:
        mask, latent = method.masks[name], method.latent[name]
        wanted = latent * mask * shrinkage(latent, mask, subject.cells(name), 3.0)
        shown = weight_of(subject.model, name).detach()
        assert torch.equal(shown, wanted)
        assert bool((shown.abs() < latent.abs())[mask].any())


@pytest.mark.parametrize("kill_after", [1, 2, 4])
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, kill_after: int) -> None:
    class Killed(Exception):
        pass

    def run(folder: Path | None, kill: bool = False) -> tuple[Pruner, Adaptive]:
        def on_epoch(epoch: int, _: dict[str, float]) -> None:
            if kill and epoch == kill_after:
                raise Killed

        subject, method = pruner(), adaptive(updates=4, look_ahead=30.0)
        train_(
            subject.model, random_batches(), LOSS, TrainingSettings(epochs=5, learning_rate=0.1), seed=0, method=method,
            pruner=subject, checkpoint=folder, on_epoch=on_epoch,
        )  # fmt: skip
        return subject, method

    whole, method = run(None)
    with pytest.raises(Killed):
        run(tmp_path, kill=True)
    resumed, again = run(tmp_path)
    ends = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert all(torch.equal(method.drift[name], again.drift[name]) for name in NAMES)
    assert all(torch.equal(method.latent[name], again.latent[name]) for name in NAMES)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"begin": 0.7, "end": 0.6}, "needs 0 <= begin < end <= 1, not begin=0.7, end=0.6"),
        ({"freeze": 0.4}, "freeze must be a number in [0.5, 1], not 0.4"),
        ({"updates": 0}, "updates must be an integer >= 1, not 0"),
        ({"through": 1.5}, "through must be a number in [0, 1], not 1.5"),
        ({"look_ahead": -1}, "look_ahead must be a number >= 0, not -1"),
        ({"power": 0.5}, "power must be a number in [1, 100], not 0.5"),
        ({"memory": 1.0}, "memory must be a number in [0, 0.9999], not 1.0"),
        ({"allocation": "globl"}, "Did you mean 'global'?"),
        ({"lookahead": 3}, "Did you mean 'look_ahead'?"),
    ],
)
def test_refuses(args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        adaptive(**args)
    assert said in str(caught.value)
