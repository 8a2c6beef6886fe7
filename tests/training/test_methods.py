"""Laws of every training method, and of the gradual schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.allocation import WeightCost
from autoprune.errors import AutopruneError, ConfigError
from autoprune.masks import filter_rows, sparsity, weight_of
from autoprune.model.inventory import take_inventory
from autoprune.patterns import PATTERNS
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.training import TRAINING, Pruner, TrainingResult, train_

BLOCK = Choice("block", {"rows": 4, "columns": 4})
CHOICES = [
    Choice("unstructured"), Choice("group", {"size": 4}), Choice("n:m"), BLOCK, Choice("channel"), Choice("filter"),
]  # fmt: skip
LOSS = nn.functional.cross_entropy


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.Flatten(),
        nn.Linear(64, 12),
    )  # fmt: skip


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 8, 4, 6, 6, generator=generator)
    y = torch.randint(0, 12, (count, 8), generator=generator)
    return list(zip(x, y, strict=True))


def pruner(pattern: Choice, sparsities: list[float], criterion: str = "magnitude") -> Pruner:
    network = model()
    inventory = take_inventory(network, torch.zeros(1, 4, 6, 6))
    layers = {
        name: LayerPlan(value, pattern, Choice(criterion))
        for name, value in zip(inventory.names, sparsities, strict=True)
    }
    return Pruner(network, inventory, Plan(layers), batches(1), LOSS)


def test_every_pattern_is_covered() -> None:
    assert {choice.name for choice in CHOICES} == set(PATTERNS)


@pytest.mark.parametrize("name", list(TRAINING))
@settings(max_examples=15)
@given(
    pattern=st.sampled_from(CHOICES),
    criterion=st.sampled_from(["magnitude", "gradient", "activation", "random"]),
    sparsities=st.lists(st.floats(0.0, 0.97), min_size=3, max_size=3),
    steps=st.integers(1, 9),
)
def test_the_plan_is_reached_and_zeros_stay(
    name: str, pattern: Choice, criterion: str, sparsities: list[float], steps: int
) -> None:
    subject = pruner(pattern, sparsities, criterion)
    settings = TrainingSettings(epochs=3, learning_rate=0.05, max_steps=steps)
    method, rule = TRAINING.create(Choice(name)), PATTERNS.create(pattern)

    def train() -> TrainingResult:
        return train_(subject.model, batches(), LOSS, settings, seed=0, method=method, pruner=subject)

    if method.finds_shares and not rule.any_sparsity and subject.layers:
        with pytest.raises(ConfigError, match="allows one sparsity alone"):
            train()
        return
    result = train()
    assert result.steps == steps
    assert result.masks is not None
    assert set(result.masks) <= set(subject.layers)
    for layer, mask in result.masks.items():
        spec = subject.inventory[layer]
        assert rule.check(mask, spec.conv_groups)
        weight = weight_of(subject.model, layer)
        assert not weight[~mask].any()
        assert weight[mask].all()  # and nothing else was cut
        cut = ~mask.flatten(1).any(dim=1)
        for row in filter_rows(subject.model, spec).values():
            assert not row[cut].any()  # a filter that is cut as a whole leaves no constant behind
    shares = {layer: sparsity(mask) for layer, mask in result.masks.items()}
    if method.finds_shares:
        assert_same_budget(subject, shares)
        return
    for layer, plan in subject.layers.items():
        spec = subject.inventory[layer]
        wanted = rule.feasible(spec.weight_shape, plan.sparsity, spec.conv_groups)
        assert shares[layer] == pytest.approx(wanted, abs=1e-9)  # every cell here is of one size


def assert_same_budget(subject: Pruner, shares: dict[str, float]) -> None:
    """As many weights are left as the plan says, less no more than a cell a layer."""
    cost = WeightCost(subject.inventory)
    budget = cost({layer: plan.sparsity for layer, plan in subject.layers.items()})
    largest = {
        layer: int(
            torch.bincount(PATTERNS.create(plan.pattern).cells(spec.weight_shape, spec.conv_groups).flatten())[0]
        )
        for layer, plan in subject.layers.items()
        if (spec := subject.inventory[layer])
    }
    one_kept = sum(largest.values())  # a layer is never cut through, whatever the budget
    least = cost(dict.fromkeys(largest, 1.0)) + one_kept
    assert cost(shares) <= max(budget, least) + len(largest) * 0.5
    assert cost(shares) >= budget - one_kept - max(largest.values(), default=0)


@pytest.mark.parametrize("name", list(TRAINING))
def test_training_is_repeatable_and_moves_the_kept_weights(name: str) -> None:
    ends = []
    for _ in range(2):
        subject = pruner(Choice("group", {"size": 4}), [0.5, 0.5, 0.8])
        start = {key: value.clone() for key, value in subject.model.state_dict().items()}
        method = TRAINING.create(Choice(name))
        train_(subject.model, batches(), LOSS, TrainingSettings(epochs=2), seed=3, method=method, pruner=subject)
        ends.append(subject.model.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in start)
    kept = ends[0]["0.weight"] != 0
    assert (ends[0]["0.weight"][kept] != start["0.weight"][kept]).any()


@pytest.mark.parametrize("name", list(TRAINING))
def test_a_killed_run_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def train(folder: Path | None, kill: bool = False) -> dict[str, Tensor]:
        def on_epoch(epoch: int, _: dict[str, float]) -> None:
            if kill and epoch == 2:
                raise Killed

        subject, method = pruner(Choice("filter"), [0.5, 0.5, 0.5]), TRAINING.create(Choice(name))
        train_(
            subject.model, batches(), LOSS, TrainingSettings(epochs=4), seed=0, method=method, pruner=subject,
            checkpoint=folder, on_epoch=on_epoch,
        )  # fmt: skip
        return dict(subject.model.state_dict())

    whole = train(None)
    with pytest.raises(Killed):
        train(tmp_path, kill=True)
    resumed = train(tmp_path)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@settings(max_examples=25)
@given(
    begin=st.floats(0.0, 0.9),
    length=st.floats(0.05, 1.0),
    updates=st.integers(1, 30),
    total=st.integers(1, 40),
    criterion=st.sampled_from(["magnitude", "gradient", "activation"]),
)
def test_gradual_only_ever_cuts(begin: float, length: float, updates: int, total: int, criterion: str) -> None:
    subject = pruner(Choice("unstructured"), [0.9, 0.8, 0.7], criterion)
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
    subject = pruner(Choice("unstructured"), [0.8, 0.8, 0.8])
    method = TRAINING.create(Choice("gradual", {"begin": 0.0, "end": 0.5, "updates": 4}))
    method.start(subject, 16)
    seen = []
    for step in range(1, 17):
        method.after_step(step)
        seen.append(sparsity(method.masks["5"]) if method.masks else 0.0)
    wanted = [0.8 * (1 - (1 - min(8, step // 2 * 2) / 8) ** 3) for step in range(1, 17)]
    assert seen == pytest.approx(wanted, abs=1 / 768)


def test_gradual_ends_sparse_when_the_last_group_is_smaller() -> None:
    subject = pruner(Choice("group", {"size": 3}), [0.9, 0.9, 0.9])
    method = TRAINING.create(Choice("gradual"))
    result = train_(
        subject.model, batches(), LOSS, TrainingSettings(epochs=6), seed=0, method=method, pruner=subject
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
    subject = pruner(Choice("unstructured"), [0.5, 0.5, 0.5])
    with pytest.raises(AutopruneError, match="fraction of a plan"):
        subject.masks(1.5)
    foreign = Plan({"9": LayerPlan(0.5, Choice("unstructured"))})
    with pytest.raises(ConfigError, match="names a layer the model does not have: '9'"):
        Pruner(subject.model, subject.inventory, foreign, [], LOSS).masks()
    assert subject.masks(0.0) == {}
