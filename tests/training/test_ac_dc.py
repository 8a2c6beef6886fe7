"""AC/DC: its phases, what a sparse one leaves of the weights, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autoprune.errors import ConfigError
from autoprune.masks import sparsity
from autoprune.model.weights import weight_of
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.testing.cases import LOSS, conv_net_pruner, random_batches
from autoprune.training import TRAINING, Pruner, train_
from autoprune.training.ac_dc import AcDc, phases

GROUP = Choice("group", {"size": 4})


@given(
    begin=st.floats(0.0, 0.9),
    length=st.floats(0.05, 1.0),
    rounds=st.integers(1, 12),
    total=st.integers(1, 60),
)
def test_phases_take_turns_and_end_sparse(begin: float, length: float, rounds: int, total: int) -> None:
    found = phases(begin, min(1.0, begin + length), rounds, total)
    steps = sorted(found)
    assert 1 <= steps[0] <= steps[-1] <= total
    assert found[steps[-1]]
    if len(steps) == 2 * rounds + 1:
        assert [found[step] for step in steps] == [True, False] * rounds + [True]


def test_the_defaults_are_the_papers() -> None:
    found = phases(0.1, 0.85, 7, 1400)
    assert sorted(found) == [140 + 75 * index for index in range(15)]


def test_a_run_that_begins_sparse_has_all_its_rounds() -> None:
    assert phases(0.0, 0.8, 1, 100) == {1: True, 40: False, 80: True}


def walked(method: AcDc, steps: int, pattern: Choice = GROUP) -> tuple[Pruner, list[dict[str, Tensor]], list[Tensor]]:
    """The masks, and the first layer's weight, after each of `steps` random steps."""
    subject = conv_net_pruner(pattern, [0.5, 0.5, 0.5])
    generator = torch.Generator().manual_seed(2)
    method.start(subject, steps)
    masks, weights = [], []
    for step in range(1, steps + 1):
        for name in subject.inventory.names:
            weight_of(subject.model, name).grad = torch.ones_like(weight_of(subject.model, name))
        method.before_step(step)
        for name in subject.inventory.names:
            weight = weight_of(subject.model, name)
            assert weight.grad is not None
            weight.data.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
        method.after_step(step)
        masks.append(dict(method.masks))
        weights.append(weight_of(subject.model, "0").detach().clone())
    return subject, masks, weights


def test_masks_are_made_as_a_sparse_phase_begins_and_hold_through_it() -> None:
    _, masks, weights = walked(AcDc(begin=0.2, end=0.8, rounds=1), 20)
    assert [bool(each) for each in masks] == [False] * 3 + [True] * 6 + [False] * 6 + [True] * 5
    first, last = masks[3]["0"], masks[15]["0"]
    assert sparsity(first) == sparsity(last) == 0.5
    assert not torch.equal(first, last)
    for index in (*range(3, 9), *range(15, 20)):
        mask = first if index < 9 else last
        assert torch.equal(masks[index]["0"], mask)
        assert not weights[index][~mask].any()
        assert weights[index][mask].all()


def test_what_was_cut_comes_back_as_good_as_zero() -> None:
    """In the dense phase's first step it has moved by that step alone."""
    subject = conv_net_pruner(GROUP, [0.5, 0.5, 0.5])
    method = AcDc(begin=0.25, end=1.0, rounds=1)
    method.start(subject, 8)
    for step in range(1, 7):
        method.before_step(step)
        weight_of(subject.model, "0").data.add_(1.0)
        if step == 5:
            cut = ~method.masks["0"]
        method.after_step(step)
    assert not method.masks
    returned = weight_of(subject.model, "0")[cut]
    assert bool(((returned - 1.0).abs() < 0.01).all())
    assert bool((returned != 1.0).all()), "a zero would look cut"


def test_a_filter_cut_as_a_whole_keeps_its_weights_for_the_dense_phase() -> None:
    subject = conv_net_pruner(Choice("filter"), [0.5, 0.5, 0.5])
    before = weight_of(subject.model, "0").detach().clone()
    method = AcDc(begin=0.25, end=1.0, rounds=1)
    method.start(subject, 8)
    for step in range(1, 6):
        method.before_step(step)
        method.after_step(step)
        if step == 3:
            assert not weight_of(subject.model, "0")[~method.masks["0"]].any()
    assert not method.masks
    assert torch.equal(weight_of(subject.model, "0").detach(), before)


def test_weights_train_in_dense_phases_that_do_not_in_sparse_ones() -> None:
    subject = conv_net_pruner(GROUP, [0.5, 0.5, 0.5])
    method = AcDc(begin=0.2, end=0.8, rounds=1)
    seen: list[bool] = []
    train_(
        subject.model, random_batches(20), LOSS, TrainingSettings(epochs=1), seed=0, method=method, pruner=subject,
        on_signals=lambda step, signals: seen.append(signals.scalars["sparsity"] > 0.0),
    )  # fmt: skip
    assert seen == [False] * 3 + [True] * 6 + [False] * 6 + [True] * 5


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"begin": 0.9, "end": 0.6}, "needs 0 <= begin < end <= 1, not begin=0.9, end=0.6"),
        ({"rounds": 0}, "rounds must be an integer >= 1, not 0"),
        ({"round": 3}, "has no argument 'round'. Did you mean 'rounds'?"),
    ],
)
def test_wrong_arguments_are_refused(args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TRAINING.create(Choice("ac_dc", args))
    assert said in str(caught.value)
