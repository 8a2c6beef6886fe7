"""Reconstruction: the kept weights are the least-squares fit to the dense layer's output."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from autoprune.criteria import LayerStatistics
from autoprune.errors import AutopruneError, ConfigError
from autoprune.evaluation.recovery import RECOVERIES, Subject
from autoprune.evaluation.recovery.reconstruct import reconstruct_
from autoprune.model.inventory import take_inventory
from autoprune.model.weights import weight_of
from autoprune.patterns import PATTERNS
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.tasks.base import Task

PATTERN_CHOICES = [Choice("unstructured"), Choice("group", {"size": 4}), Choice("n:m"), Choice("channel")]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.ReLU(inplace=True),
        nn.Flatten(2), nn.Linear(4, 12), nn.Flatten(), nn.Linear(96, 10),
    ).eval()  # fmt: skip


NAMES = ["0", "3", "6", "8"]


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 40, 4, 6, 6, generator=generator)
    x[..., 1:] += x[..., :-1]  # neighbours are alike: there is something to make up for
    return [(part, torch.randint(0, 10, (40,), generator=generator)) for part in x]


def masks(pattern: Choice) -> dict[str, Tensor]:
    model, rule = network(), PATTERNS.create(pattern)
    inventory = take_inventory(model, torch.zeros(1, 4, 6, 6), min_weights=1)
    assert inventory.names == NAMES
    return {n: rule.mask(weight_of(model, n).abs(), 0.5, inventory[n].conv_groups) for n in NAMES}


@pytest.mark.parametrize("pattern", PATTERN_CHOICES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_no_other_kept_weights_come_nearer(name: str, pattern: Choice) -> None:
    model, dense = network(), network()
    if name != "0":
        weight_of(model, "0").data *= torch.rand(8, 1, 1, 1) + 0.5  # the layer reads something else than in `dense`
    mask, weight = masks(pattern)[name], weight_of(model, name)
    weight.data *= mask
    reconstruct_(model, dense, name, mask, batches(), damping=1e-10)
    assert not weight[~mask].any()

    at = int(name)
    with torch.no_grad():
        x = torch.cat([x for x, _ in batches()])
        read, wanted = model[:at](x).double(), dense[: at + 1](x).double()
    layer = copy.deepcopy(model[at]).double()

    def error_and_slope(values: Tensor) -> tuple[float, Tensor]:
        leaf = values.detach().double().requires_grad_()
        error = (torch.func.functional_call(layer, {"weight": leaf}, (read,)) - wanted).square().sum()
        return error.item(), torch.autograd.grad(error, leaf)[0]

    error, slope = error_and_slope(weight)
    error_before, slope_before = error_and_slope(weight_of(dense, name) * mask)
    # least squares is convex: where its slope along the kept weights is 0, it is at its least
    assert float(slope[mask].abs().max()) < 1e-3 * float(slope_before[mask].abs().max())
    assert error < error_before


def test_damping_holds_the_weights_where_they_were() -> None:
    model, dense = network(), network()
    mask = masks(Choice("unstructured"))["3"]
    weight = weight_of(model, "3")
    weight.data *= mask
    before = weight.detach().clone()
    reconstruct_(model, dense, "3", mask, batches(), damping=1e9)
    torch.testing.assert_close(weight.detach(), before)


def test_an_uncut_model_stays_as_it_is() -> None:
    model, dense = network(), network()
    mask = torch.ones_like(weight_of(model, "3"), dtype=torch.bool)
    reconstruct_(model, dense, "3", mask, batches())
    torch.testing.assert_close(weight_of(model, "3"), weight_of(dense, "3"))


def subject(dense: nn.Module) -> Subject:
    inventory = take_inventory(dense, torch.zeros(1, 4, 6, 6), min_weights=1)
    data = batches()
    task = Task("test", dense, data, tuple(data), data, data, nn.functional.cross_entropy, None)
    return Subject(task, dense, inventory, dict.fromkeys(NAMES, LayerStatistics()), TrainingSettings(), 0)


@pytest.mark.parametrize("pattern", PATTERN_CHOICES, ids=str)
def test_the_recovered_model_is_nearer_the_dense_one_than_recalibration_brings_it(pattern: Choice) -> None:
    dense = network()
    given = subject(dense)
    plan = Plan({name: LayerPlan(0.5, pattern) for name in NAMES[:3]})
    distance = {}
    for recovery in ("batch_norm", "reconstruct"):
        model = copy.deepcopy(dense).train()
        RECOVERIES.create(Choice(recovery)).recover_(model, plan, given)
        assert model.training
        for name, mask in given.masks(plan).items():
            assert not weight_of(model, name)[~mask].any()
        model.eval()
        with torch.no_grad():
            distance[recovery] = sum(float((model(x) - dense(x)).square().sum()) for x, _ in batches())
    assert distance["reconstruct"] < 0.8 * distance["batch_norm"]


def test_without_calibration_it_is_an_error() -> None:
    mask = torch.ones_like(weight_of(network(), "3"), dtype=torch.bool)
    with pytest.raises(AutopruneError, match="never reached 3"):
        reconstruct_(network(), network(), "3", mask, [])


def test_refuses_no_damping() -> None:
    with pytest.raises(ConfigError, match="damping must be a number > 0, not 0"):
        RECOVERIES.create(Choice("reconstruct", {"damping": 0}))


def test_every_module_is_in_its_own_mode_afterwards() -> None:
    """A batch norm that is kept in eval mode while the rest is trained stays so."""
    model, dense = network().train(), network().train()
    model[1].eval()
    dense[1].eval()
    reconstruct_(model, dense, "3", masks(Choice("unstructured"))["3"], batches())
    assert [module.training for module in (model, model[1], model[3])] == [True, False, True]
    assert [module.training for module in (dense, dense[1], dense[3])] == [True, False, True]
