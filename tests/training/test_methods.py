"""Laws of every training method, and of the gradual schedule."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoprune.errors import AutopruneError, ConfigError
from autoprune.masks import sparsity
from autoprune.model.weights import weight_of
from autoprune.patterns import PATTERNS
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.testing import check_method
from autoprune.testing.cases import LOSS, PATTERN_CHOICES, conv_net_pruner, random_batches
from autoprune.testing.methods import check_training
from autoprune.training import TRAINING, Pruner, train_


def test_every_pattern_is_covered() -> None:
    assert {choice.name for choice in PATTERN_CHOICES} == set(PATTERNS)


@pytest.mark.parametrize("name", list(TRAINING))
@settings(max_examples=15)
@given(
    pattern=st.sampled_from(PATTERN_CHOICES),
    criterion=st.sampled_from(["magnitude", "gradient", "activation", "random"]),
    sparsities=st.lists(st.floats(0.0, 0.97), min_size=3, max_size=3),
    steps=st.integers(1, 9),
)
def test_the_plan_is_reached_and_zeros_stay(
    name: str, pattern: Choice, criterion: str, sparsities: list[float], steps: int
) -> None:
    check_training(TRAINING.create(Choice(name)), conv_net_pruner(pattern, sparsities, criterion), steps)


@pytest.mark.parametrize("name", list(TRAINING))
def test_every_method_keeps_the_laws(name: str) -> None:
    check_method(lambda: TRAINING.create(Choice(name)), examples=6)


@settings(max_examples=25)
@given(
    begin=st.floats(0.0, 0.9),
    length=st.floats(0.05, 1.0),
    updates=st.integers(1, 30),
    total=st.integers(1, 40),
    criterion=st.sampled_from(["magnitude", "gradient", "activation"]),
)
def test_gradual_only_ever_cuts(begin: float, length: float, updates: int, total: int, criterion: str) -> None:
    subject = conv_net_pruner(Choice("unstructured"), [0.9, 0.8, 0.7], criterion)
    weight_of(subject.model, "0").data[:, :3] = 0.0  # ties at saliency 0 for half the run and more
    end = min(1.0, begin + length)
    method = TRAINING.create(Choice("gradual", {"begin": begin, "end": end, "updates": updates}))
    method.start(subject, total)
    before: dict[str, Tensor] = {}
    for step in range(1, total + 1):
        for layer in subject.inventory.names:
            weight_of(subject.model, layer).data.add_(0.01)  # an optimizer step moves cut weights too
        method.after_step(step)
        assert all(not (mask & ~before[layer]).any() for layer, mask in method.masks.items() if layer in before)
        if step <= int(begin * total) - 1:
            assert not method.masks
        before = dict(method.masks)
    final = method.finish()
    for layer, mask in final.items():
        assert int(mask.sum()) == round((1 - subject.plan.layers[layer].sparsity) * mask.numel())


def test_gradual_follows_the_cubic() -> None:
    subject = conv_net_pruner(Choice("unstructured"), [0.8, 0.8, 0.8])
    method = TRAINING.create(Choice("gradual", {"begin": 0.0, "end": 0.5, "updates": 4}))
    method.start(subject, 16)
    seen = []
    for step in range(1, 17):
        method.after_step(step)
        seen.append(sparsity(method.masks["5"]) if method.masks else 0.0)
    wanted = [0.8 * (1 - (1 - min(8, step // 2 * 2) / 8) ** 3) for step in range(1, 17)]
    assert seen == pytest.approx(wanted, abs=1 / 768)


def test_gradual_ends_sparse_when_the_last_group_is_smaller() -> None:
    subject = conv_net_pruner(Choice("group", {"size": 3}), [0.9, 0.9, 0.9])
    method = TRAINING.create(Choice("gradual"))
    result = train_(
        subject.model, random_batches(), LOSS, TrainingSettings(epochs=6), seed=0, method=method, pruner=subject
    )  # fmt: skip
    assert result.masks is not None
    for layer, mask in result.masks.items():
        assert PATTERNS.create(Choice("group", {"size": 3})).check(mask, subject.inventory[layer].conv_groups)
        assert sparsity(mask) == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"begin": 0.7, "end": 0.6}, "needs 0 <= begin < end <= 1, not begin=0.7, end=0.6"),
        ({"updates": 0}, "updates must be an integer >= 1, not 0"),
        ({"update": 3}, "has no argument 'update'. Did you mean 'updates'?"),
    ],
)
def test_gradual_refuses(args: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TRAINING.create(Choice("gradual", args))
    assert said in str(caught.value)


def test_pruner_refuses_a_foreign_plan_and_a_wrong_fraction() -> None:
    subject = conv_net_pruner(Choice("unstructured"), [0.5, 0.5, 0.5])
    with pytest.raises(AutopruneError, match="fraction of a plan"):
        subject.masks(1.5)
    foreign = Plan({"9": LayerPlan(0.5, Choice("unstructured"))})
    with pytest.raises(ConfigError, match="names a layer the model does not have: '9'"):
        Pruner(subject.model, subject.inventory, foreign, [], LOSS).masks()
    assert subject.masks(0.0) == {}
