"""SR-STE: its gradient against autograd on an explicit forward, when masks are made, fading, resume, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.errors import ConfigError
from autoprune.masks import sparsity
from autoprune.model.inventory import take_inventory
from autoprune.model.weights import weight_of
from autoprune.patterns import PATTERNS
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.testing.cases import random_batches
from autoprune.training import TRAINING, Pruner, train_
from autoprune.training.sr_ste import SrSte

LOSS = functional.cross_entropy
NOFM = Choice("n:m", {"n": 2, "m": 4})
NAMES = ["0", "3"]


def pruner(pattern: Choice = NOFM, planned: float = 0.5) -> Pruner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 8, bias=False))
    inventory = take_inventory(model, torch.zeros(1, 4, 6, 6))
    plan = Plan({name: LayerPlan(planned, pattern) for name in NAMES})
    return Pruner(model, inventory, plan, [], LOSS)


def batches(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    return random_batches(count, classes=8)


class Refined(torch.autograd.Function):
    """The paper's definition: a masked weight whose gradient is the masked one's plus the refining term."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, decay: float) -> Tensor:
        mask = PATTERNS.create(NOFM).mask(weight.abs(), 0.5)
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        weight, mask = ctx.saved_tensors
        return gradients[0] + ctx.decay * ~mask * weight, None


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_it_is_the_papers_training(decay: float) -> None:
    subject = pruner()
    reference = copy.deepcopy(subject.model)
    settings = TrainingSettings(epochs=3, learning_rate=0.2, momentum=0.5, weight_decay=0.01, schedule="constant")
    method = SrSte(decay=decay, every=1, fade=0.0, freeze=1.0)
    train_(subject.model, batches(), LOSS, settings, seed=0, method=method, pruner=subject)

    first, last = weight_of(reference, "0"), weight_of(reference, "3")
    bias = reference[0].bias  # type: ignore[index]
    groups = [{"params": [first, last], "weight_decay": 0.01}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.2, momentum=0.5, nesterov=True)
    for x, y in batches() * 3:
        effective: list[Tensor] = [Refined.apply(w, decay) for w in (first, last)]  # type: ignore[no-untyped-call]
        value = LOSS(functional.linear(functional.conv2d(x, effective[0], bias).relu().flatten(1), effective[1]), y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    for name, wanted in (("0", first), ("3", last)):
        torch.testing.assert_close(method.latent[name], wanted.detach(), rtol=1e-4, atol=1e-6)
        assert torch.equal(method.masks[name], PATTERNS.create(NOFM).mask(wanted.abs(), 0.5))
        torch.testing.assert_close(weight_of(subject.model, name).detach(), method.latent[name] * method.masks[name])


def run(method: SrSte, steps: int, pattern: Choice = NOFM) -> tuple[Pruner, list[dict[str, Tensor]]]:
    """The masks before the first step and after each, while random steps are taken."""
    subject = pruner(pattern)
    generator = torch.Generator().manual_seed(2)
    method.start(subject, steps)
    masks = [dict(method.masks)]
    for step in range(1, steps + 1):
        for name in NAMES:
            weight_of(subject.model, name).grad = torch.zeros_like(weight_of(subject.model, name))
        method.before_step(step)
        for name in NAMES:
            weight = weight_of(subject.model, name).data
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
        method.after_step(step)
        masks.append(dict(method.masks))
    return subject, masks


@pytest.mark.parametrize("pattern", [NOFM, Choice("group", {"size": 4}), Choice("filter")])
def test_masks_change_every_few_steps_until_they_freeze(pattern: Choice) -> None:
    method = SrSte(every=4, freeze=0.7)
    _, masks = run(method, 20, pattern)
    changed = {i for i in range(1, 21) if any(not torch.equal(masks[i][n], masks[i - 1][n]) for n in NAMES)}
    assert changed == {4, 8, 12}
    assert all(sparsity(mask) == 0.5 for each in masks for mask in each.values())
    assert method.signals().scalars["regrowth"] > 0.0


def test_what_is_cut_fades() -> None:
    for steps, factor in ((1, 0.9), (5, 0.5), (10, 0.0)):
        method = SrSte(fade=0.5, every=1)
        subject = pruner()
        method.start(subject, 20)
        assert torch.equal(weight_of(subject.model, "0"), method.latent["0"]), "nothing has faded yet"
        for step in range(1, steps + 1):
            method.before_step(step)
            method.after_step(step)
        mask = method.masks["0"]
        weight, latent = weight_of(subject.model, "0").detach(), method.latent["0"]
        assert torch.equal(weight[mask], latent[mask])
        torch.testing.assert_close(weight[~mask], latent[~mask] * factor)


@pytest.mark.parametrize("kill_after", [1, 3])
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, kill_after: int) -> None:
    class Killed(Exception):
        pass

    def train(folder: Path | None, kill: bool = False) -> tuple[Pruner, SrSte]:
        def on_epoch(epoch: int, _: dict[str, float]) -> None:
            if kill and epoch == kill_after:
                raise Killed

        subject, method = pruner(), SrSte(decay=0.01, every=3, fade=0.7, freeze=0.9)
        train_(
            subject.model, batches(), LOSS, TrainingSettings(epochs=4, learning_rate=0.1), seed=0, method=method,
            pruner=subject, checkpoint=folder, on_epoch=on_epoch,
        )  # fmt: skip
        return subject, method

    whole, method = train(None)
    with pytest.raises(Killed):
        train(tmp_path, kill=True)
    resumed, again = train(tmp_path)
    ends = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert all(torch.equal(method.latent[name], again.latent[name]) for name in NAMES)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"decay": -1.0}, "decay must be a number >= 0"),
        ({"every": 0}, "every must be an integer >= 1"),
        ({"fade": 1.5}, r"fade must be a number in \[0, 1\]"),
        ({"fade": 0.5, "freeze": 0.4}, r"freeze must be a number in \[0.5, 1\]"),
        ({"lambda": 0.1}, "has no argument 'lambda'"),
    ],
)
def test_wrong_arguments_are_refused(args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TRAINING.create(Choice("sr_ste", args))
