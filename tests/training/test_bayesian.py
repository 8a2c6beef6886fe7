"""Bayesian iterative pruning: the posterior, the cuts, and how they fade."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.allocation import WeightCost
from autoprune.errors import ConfigError
from autoprune.masks import sparsity
from autoprune.model.inventory import take_inventory
from autoprune.model.weights import weight_of
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.testing.cases import random_batches
from autoprune.training import TRAINING, Pruner, train_
from autoprune.training.bayesian import PRIOR, Bayesian

LOSS = nn.functional.cross_entropy
NAMES = ["0", "3", "5"]


def pruner(pattern: str = "unstructured", share: float = 0.9, criterion: str = "magnitude") -> Pruner:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.Flatten(),
        nn.Linear(64, 12),
    )  # fmt: skip
    inventory = take_inventory(network, torch.zeros(1, 4, 6, 6))
    layers = {name: LayerPlan(share, Choice(pattern), Choice(criterion)) for name in inventory.names}
    return Pruner(network, inventory, Plan(layers), random_batches(3), LOSS)


def bayesian(**args: Any) -> Bayesian:
    return cast("Bayesian", TRAINING.create(Choice("bayesian", args)))


def walk(subject: Pruner, method: Bayesian, total: int, noise: float) -> list[dict[str, Tensor]]:
    """Steps in which the weights move at random; the masks after each."""
    torch.manual_seed(5)
    method.start(subject, total)
    seen = []
    for step in range(1, total + 1):
        for name in NAMES:
            weight = weight_of(subject.model, name).data
            weight += noise * torch.randn_like(weight)
        method.after_step(step)
        seen.append(dict(method.masks))
    return seen


@pytest.mark.parametrize(("memory", "remembered"), [(True, 0.7), (False, 0.0)])
def test_the_posterior_counts_what_ranks_below_the_cut_and_decides(memory: bool, remembered: float) -> None:
    subject = pruner()
    method = bayesian(begin=0.5, end=1.0, rounds=2, draws=3, forget=0.7, fade=0.0, memory=memory)
    torch.manual_seed(5)
    method.start(subject, 12)  # rounds at 6 and 9; looks at 4, 5, 6 and at 7, 8, 9
    weight = weight_of(subject.model, "5").data
    below, score, trials = torch.zeros_like(weight), torch.zeros_like(weight), 0.0
    kept = torch.ones_like(weight, dtype=torch.bool)
    for step in range(1, 10):
        weight += 0.02 * torch.randn_like(weight)
        budget = round((0.1 if step > 6 else 1 - 0.9 * (1 - 0.5**3)) * weight.numel())
        if step >= 4:
            alive = weight.abs() * kept
            below += alive < alive.flatten().sort(descending=True).values[budget - 1]
            score, trials = score + alive / alive.mean(), trials + 1
        method.after_step(step)
        if step in (6, 9):
            redundant = (below + PRIOR) / (trials + 2 * PRIOR)
            order = (redundant - 1e-6 * score).masked_fill(~kept, 2.0).flatten().argsort()
            kept = torch.zeros(weight.numel(), dtype=torch.bool)
            kept[order[:budget]] = True
            kept = kept.reshape(weight.shape)
            assert torch.equal(method.masks["5"], kept)
            torch.testing.assert_close(method.gates["5"], 1 - redundant)
            below, score, trials = below * remembered, score * remembered, trials * remembered
    torch.testing.assert_close(method.probability("5"), (below + PRIOR) / (trials + 2 * PRIOR))


@pytest.mark.parametrize("allocation", ["planned", "global"])
def test_the_record_outweighs_a_moment_of_strength(allocation: str) -> None:
    subject = pruner()
    method = bayesian(begin=0.5, end=1.0, rounds=2, draws=2, fade=0.0, allocation=allocation)
    method.start(subject, 12)
    strongest = int(weight_of(subject.model, "5").abs().argmax())
    method.redundant["5"].view(-1)[strongest] = 98.0
    method.trials += 98.0
    for step in range(1, 7):
        assert not method.masks
        method.after_step(step)
    assert not method.masks["5"].view(-1)[strongest]


@pytest.mark.parametrize("args", [{}, {"memory": False}, {"schedule": "geometric", "fade": 1.0}])
def test_a_model_that_stands_still_is_cut_as_in_one_shot_and_keeps_its_weights(args: dict[str, Any]) -> None:
    subject = pruner("group")
    start = {name: weight_of(subject.model, name).detach().clone() for name in NAMES}
    wanted = subject.masks()
    walk(subject, bayesian(**args), 60, noise=0.0)
    for name in NAMES:
        torch.testing.assert_close(weight_of(subject.model, name).detach(), start[name] * wanted[name])


def test_what_is_cut_fades_by_way_of_the_expected_gates() -> None:
    subject = pruner()
    method = bayesian(rounds=1, draws=4, fade=1.0, end=1.0)
    start = weight_of(subject.model, "5").detach().clone()
    method.start(subject, 8)
    assert not method.masks
    gate, final = method.gates["5"], method.next["5"].float()
    torch.testing.assert_close(gate, torch.where(method.next["5"], 4 + PRIOR, PRIOR) / (4 + 2 * PRIOR))
    for step in range(1, 9):
        method.after_step(step)
        part = step / 4
        scale = 1 + part * (gate - 1) if part <= 1 else gate + (part - 1) * (final - gate)
        torch.testing.assert_close(weight_of(subject.model, "5").detach(), start * scale)
    assert torch.equal(method.masks["5"], method.next["5"])


def test_fading_spares_the_loss_the_jump() -> None:
    def largest_jump(fade: float) -> float:
        subject = pruner()
        method = bayesian(rounds=2, fade=fade, end=1.0)
        x, y = random_batches()[0]

        def loss() -> float:
            with torch.no_grad():
                return float(LOSS(subject.model.eval()(x), y))

        losses = [loss()]
        method.start(subject, 40)
        for step in range(1, 41):
            losses.append(loss())
            method.after_step(step)
        return max(abs(b - a) for a, b in pairwise(losses))

    assert largest_jump(1.0) < 0.3 * largest_jump(0.0)


@settings(max_examples=12)
@given(
    rounds=st.integers(1, 6),
    begin=st.floats(0.0, 0.8),
    fade=st.floats(0.0, 1.0),
    total=st.integers(1, 30),
    schedule=st.sampled_from(["cubic", "geometric"]),
    allocation=st.sampled_from(["planned", "global", "uniform", "erk", "lamp"]),
)
def test_only_ever_cuts_and_ends_on_the_budget(
    rounds: int, begin: float, fade: float, total: int, schedule: str, allocation: str
) -> None:
    subject = pruner(share=0.8)
    method = bayesian(
        rounds=rounds, begin=begin, end=1.0, fade=fade, schedule=schedule, allocation=allocation, draws=2
    )  # fmt: skip
    seen = walk(subject, method, total, noise=0.02)
    for before, after in pairwise(seen):
        assert all(not (after[name] & ~before[name]).any() for name in before)
    assert method.finds_shares is (allocation != "planned")
    cost = WeightCost(subject.inventory)
    left = cost({name: sparsity(mask) for name, mask in method.finish().items()})
    budget = cost(dict.fromkeys(NAMES, 0.8))
    assert budget - 4 <= left <= budget + 2


def test_geometric_rounds_keep_the_same_share_of_what_is_left() -> None:
    subject = pruner(share=0.875)
    seen = walk(subject, bayesian(schedule="geometric", rounds=3, fade=0.0, end=1.0), 3, noise=0.01)
    kept = [1 - sparsity(masks["5"]) for masks in seen[:2]]
    assert kept == pytest.approx([0.25, 0.125], abs=2e-3)


def test_predictions_agree_better_and_better_with_themselves() -> None:
    subject = pruner()
    method = bayesian()
    walk(subject, method, 60, noise=0.05)
    agreement = method.agreement()
    assert len(agreement) == 8
    assert agreement[-1] == 1.0
    assert 0.0 < agreement[0] < 1.0
    assert all(torch.equal(method.predicted[name][-1], method.finish()[name]) for name in NAMES)
    signals = method.signals()
    assert signals.scalars["agreement/round_1"] == agreement[0]
    gates = signals.histograms["expected_gate"]
    assert len(gates) == sum(int(mask.sum()) for mask in method.finish().values())
    assert signals.scalars["redundancy"] == pytest.approx(1 - float(gates.mean()))
    assert 0.0 < signals.scalars["redundancy"] < 0.5


@pytest.mark.parametrize("criterion", ["magnitude", "gradient"])
def test_a_killed_run_resumes_in_the_middle_of_a_round(tmp_path: Path, criterion: str) -> None:
    class Killed(Exception):
        pass

    def run(folder: Path | None, kill: bool = False) -> tuple[Pruner, Bayesian]:
        def on_epoch(epoch: int, _: dict[str, float]) -> None:
            if kill and epoch == 2:
                raise Killed

        subject, method = pruner("group", criterion=criterion), bayesian(rounds=3, end=1.0, fade=1.0, draws=2)
        train_(
            subject.model, random_batches(), LOSS, TrainingSettings(epochs=5), seed=0, method=method, pruner=subject,
            checkpoint=folder, on_epoch=on_epoch,
        )  # fmt: skip
        return subject, method

    whole, method = run(None)
    with pytest.raises(Killed):
        run(tmp_path, kill=True)
    resumed, again = run(tmp_path)
    ends = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert method.agreement() == again.agreement()
    assert all(torch.equal(method.score[name], again.score[name]) for name in NAMES)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"begin": 0.7, "end": 0.6}, "needs 0 <= begin < end <= 1, not begin=0.7, end=0.6"),
        ({"rounds": 0}, "rounds must be an integer >= 1, not 0"),
        ({"draws": True}, "draws must be an integer >= 1, not True"),
        ({"forget": 1.5}, "forget must be a number in [0, 1], not 1.5"),
        ({"memory": 1}, "memory must be true or false, not 1"),
        ({"schedule": "cubik"}, "Did you mean 'cubic'?"),
        ({"allocation": "globl"}, "Did you mean 'global'?"),
        ({"allocation": {"name": "global", "most": 2}}, "most must be a number in (0, 1), not 2"),
        ({"criterion": "fischer"}, "Did you mean 'fisher'?"),
    ],
)
def test_refuses(args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bayesian(**args)
    assert said in str(caught.value)
