"""ADMM: its steps against the algorithm written out, exact projections, the cut, and refusals."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import ConfigError
from autoprune.masks import sparsity
from autoprune.model.inventory import take_inventory
from autoprune.model.weights import weight_of
from autoprune.patterns import PATTERNS
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.testing.cases import LOSS, conv_net_pruner, random_batches
from autoprune.training import TRAINING, Pruner, train_
from autoprune.training.admm import Admm

GROUP = Choice("group", {"size": 4})


def linear(pattern: Choice, shape: tuple[int, int], share: float) -> Pruner:
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    torch.manual_seed(3)
    nn.init.normal_(weight_of(model, "0"))
    inventory = take_inventory(model, torch.zeros(1, shape[1]), min_weights=1)
    return Pruner(model, inventory, Plan({"0": LayerPlan(share, pattern)}), [], LOSS)


def step_(subject: Pruner, method: Admm, step: int, rate: float = 0.1) -> Tensor:
    """A step of gradient descent on ``|weight - 1|^2 / 2``; returns the gradient that the optimizer saw."""
    weight = weight_of(subject.model, "0")
    weight.grad = (weight - 1.0).detach()
    method.before_step(step)
    assert isinstance(weight.grad, Tensor)
    seen: Tensor = weight.grad.clone()
    with torch.no_grad():
        weight.sub_(seen, alpha=rate)
    method.after_step(step)
    return seen


def test_it_is_admm() -> None:
    subject = linear(GROUP, (8, 6), 0.5)
    x = weight_of(subject.model, "0").detach().clone()
    method = Admm(end=1.0, updates=5, strength=0.5, exponent=1.0)
    method.start(subject, 20)
    z, force, rho = x.clone(), torch.zeros_like(x), 0.0  # the dual, not over rho
    for step in range(1, 20):
        step_(subject, method, step)
        x = x - 0.1 * (x - 1.0 + rho * (x - z) + force)
        if step % 4 == 0:
            near = x + (force / rho if rho else 0.0)
            z = near * PATTERNS.create(GROUP).mask(near.square(), 0.5)
            force, rho = force + rho * (x - z), 0.5 * step / 20
        torch.testing.assert_close(weight_of(subject.model, "0").detach(), x)
    step_(subject, method, 20)
    weight = weight_of(subject.model, "0")
    assert sparsity(weight) == 0.5
    assert PATTERNS.create(GROUP).check(weight != 0)


def test_projections_are_exact() -> None:
    """No other choice of groups is nearer."""
    subject = linear(Choice("group", {"size": 2}), (4, 4), 0.5)
    method = Admm(end=1.0, updates=10)
    method.start(subject, 10)
    step_(subject, method, 1)
    weight = weight_of(subject.model, "0").detach()
    cells = subject.cells("0")
    near = [float(weight[~torch.isin(cells, torch.tensor(kept))].square().sum()) for kept in combinations(range(8), 4)]
    assert float((weight - method.target["0"]).square().sum()) == pytest.approx(min(near))


def test_weights_meet_their_targets() -> None:
    """Where the penalty is strong: what is cut in the end is as good as zero before."""
    subject = linear(GROUP, (8, 8), 0.5)
    method = Admm(end=1.0, updates=100, strength=5.0, exponent=1.0)
    method.start(subject, 1000)
    distances = []
    for step in range(1, 1000):
        step_(subject, method, step)
        distances.append(method.signals().scalars["distance"])
    assert distances[999 // 10] > 0.1
    assert distances[-1] < 0.01
    before = weight_of(subject.model, "0").detach().clone()
    step_(subject, method, 1000)
    torch.testing.assert_close(weight_of(subject.model, "0").detach(), before, atol=0.02, rtol=0.0)
    assert method.signals().scalars["distance"] == 0.0


def test_the_model_is_dense_until_the_cut_and_trains_on_after_it() -> None:
    subject = conv_net_pruner(GROUP, [0.5, 0.5, 0.5])
    shares: list[float] = []
    weights: list[Tensor] = []

    def seen(step: int, signals: Any) -> None:
        shares.append(signals.scalars["sparsity"])
        weights.append(weight_of(subject.model, "0").detach().clone())

    train_(
        subject.model, random_batches(10), LOSS, TrainingSettings(epochs=1), seed=0, method=Admm(end=0.6),
        pruner=subject, on_signals=seen,
    )  # fmt: skip
    assert shares == pytest.approx([0.0] * 5 + [0.5] * 5)
    assert all(weight.all() for weight in weights[:5])
    kept = weights[5] != 0
    assert not weights[9][~kept].any()
    assert bool((weights[9][kept] != weights[5][kept]).all())


def test_a_layer_that_is_frozen_is_left_alone() -> None:
    subject = conv_net_pruner(GROUP, [0.5, 0.5, 0.5])
    weight_of(subject.model, "5").requires_grad_(False)
    before = weight_of(subject.model, "5").detach().clone()
    train_(
        subject.model, random_batches(10), LOSS, TrainingSettings(epochs=1), seed=0, method=Admm(end=0.6),
        pruner=subject,
    )  # fmt: skip
    after = weight_of(subject.model, "5").detach()
    assert torch.equal(after[after != 0], before[after != 0])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"begin": 0.9, "end": 0.6}, "needs 0 <= begin < end <= 1, not begin=0.9, end=0.6"),
        ({"updates": 0}, "updates must be an integer >= 1, not 0"),
        ({"strength": 0.0}, "strength must be a number >= 1e-09, not 0.0"),
        ({"exponent": 20.0}, "exponent must be a number in [0.1, 10], not 20.0"),
        ({"rho": 1.0}, "has no argument 'rho'"),
    ],
)
def test_wrong_arguments_are_refused(args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TRAINING.create(Choice("admm", args))
    assert said in str(caught.value)
