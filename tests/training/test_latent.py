"""Dense weights behind masked ones: silent filters come back with their biases and norms as they have become."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoprune.masks import filter_rows
from autoprune.model.inventory import take_inventory
from autoprune.model.weights import weight_of
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.training import Pruner
from autoprune.training.latent import LatentTraining

ROWS = ["0.bias", "1.weight", "1.bias"]


class Scripted(LatentTraining):
    """Cuts the given filters of layer 0 after each step."""

    def __init__(self, script: list[list[int]]) -> None:
        self.script = script

    def update(self, step: int) -> None:
        mask = torch.ones_like(self.latent["0"], dtype=torch.bool)
        mask[self.script[step - 1]] = False
        self.set_masks({"0": mask})


def run(script: list[list[int]]) -> tuple[Scripted, list[dict[str, Tensor]]]:
    """The rows in the model after each step of 0.5, with gradients of 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8))
    inventory = take_inventory(model, torch.zeros(1, 2, 5, 5))
    plan = Plan({"0": LayerPlan(0.5, Choice("filter"))})
    method = Scripted(script)
    method.start(Pruner(model, inventory, plan, [], nn.functional.mse_loss), len(script))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    seen = []
    for step in range(1, len(script) + 1):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        method.before_step(step)
        optimizer.step()
        method.after_step(step)
        seen.append({name: row.detach().clone() for name, row in filter_rows(model, inventory["0"]).items()})
    return method, seen


def test_a_filter_comes_back_with_its_rows() -> None:
    _, free = run([[], [], []])
    method, seen = run([[2], [2, 3], [3]])
    for step, cut in enumerate([[2], [2, 3], [3]]):
        for name in ROWS:
            kept = [filter_ for filter_ in range(8) if filter_ not in cut]
            assert not seen[step][name][cut].any()
            torch.testing.assert_close(seen[step][name][kept], free[step][name][kept])
    for name in ROWS:
        torch.testing.assert_close(method.rows["0"][name], free[2][name])


def test_a_filter_that_is_zero_of_itself_is_not_silenced() -> None:
    class Idle(LatentTraining):
        def update(self, step: int) -> None:
            pass

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8))
    nn.init.zeros_(weight_of(model, "0"))
    inventory = take_inventory(model, torch.zeros(1, 2, 5, 5))
    plan = Plan({"0": LayerPlan(0.5, Choice("filter"))})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Idle().start(Pruner(model, inventory, plan, [], nn.functional.mse_loss), 1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("cut", [[], [1], [0, 1, 2, 3, 4, 5, 6]])
def test_state_holds_what_the_model_hides(cut: list[int]) -> None:
    method, _ = run([cut])
    state = {name: value.clone() for name, value in method.state().items()}
    other, _ = run([[]])
    other.load_state(state)
    assert all(torch.equal(other.rows["0"][name], method.rows["0"][name]) for name in ROWS)
    models = method.pruner.model, other.pruner.model
    shown = [[model.state_dict()[name] for name in ("0.weight", *ROWS)] for model in models]
    assert all(torch.equal(a, b) for a, b in zip(*shown, strict=True))
