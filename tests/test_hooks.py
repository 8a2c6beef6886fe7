"""Pruning in a user's own loop: the same as in ours, whatever the loop does between two steps."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autoprune
from autoprune import PruningHooks
from autoprune.errors import AutopruneError, ConfigError
from autoprune.inventory import take_inventory
from autoprune.masks import sparsity, weight_of
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings, make_optimizer
from autoprune.training import TRAINING, Pruner, train_
from autoprune.training.loop import epoch_seed

GROUP = Choice("group", {"size": 4})
X = torch.zeros(1, 4, 6, 6)
STEPS = 6


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 12),
    )  # fmt: skip


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 8, 4, 6, 6, generator=generator)
    y = torch.randint(0, 12, (count, 8), generator=generator)
    return list(zip(x, y, strict=True))


def hooks(model: nn.Module, method: str | Choice = "gradual", **given: Any) -> PruningHooks:
    wanted = {"sparsity": 0.75, "pattern": GROUP, "batches": batches(1), **given}
    return PruningHooks(model, X, method, **wanted)


def trained(
    model: nn.Module,
    pruning: PruningHooks,
    step: Callable[[torch.optim.Optimizer, Tensor, Tensor], None],
    settings: TrainingSettings | None = None,
) -> dict[str, Tensor]:
    optimizer = make_optimizer(list(model.parameters()), settings or TrainingSettings(learning_rate=0.05))
    torch.manual_seed(3)
    pruning.start(optimizer, STEPS)
    for x, y in batches():
        step(optimizer, x, y)
        pruning.after_step()
    masks = pruning.finish()
    assert all(not weight_of(model, name)[~mask].any() for name, mask in masks.items())
    return masks


def plain(model: nn.Module) -> Callable[[torch.optim.Optimizer, Tensor, Tensor], None]:
    def step(optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("method", list(TRAINING))
def test_a_users_loop_gives_what_ours_gives(method: str) -> None:
    args = {"factor": 1.0} if method == "expand" else {}
    ours, theirs = network(), network()
    settings = TrainingSettings(epochs=1, learning_rate=0.05, schedule="constant")
    inventory = take_inventory(ours, X)
    plan = Plan(dict.fromkeys(inventory.names, LayerPlan(0.75, GROUP)))
    pruner = Pruner(ours, inventory, plan, batches(1), functional.cross_entropy)
    made = TRAINING.create(Choice(method, args))
    train_(ours, batches(), functional.cross_entropy, settings, seed=0, method=made, pruner=pruner)

    pruning = hooks(theirs, Choice(method, args))
    optimizer = make_optimizer(list(theirs.parameters()), settings)
    torch.manual_seed(epoch_seed(0, 0))
    pruning.start(optimizer, STEPS)
    torch.manual_seed(epoch_seed(0, 1))
    for x, y in batches():
        plain(theirs)(optimizer, x, y)
        pruning.after_step()
    masks = pruning.finish()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert masks.keys() == made.masks.keys()
    cut = sum(int((~mask).sum()) for mask in masks.values())
    assert cut >= 0.7 * sum(layer.weights for layer in inventory.layers)
    fast = autoprune.repack(theirs.eval(), X, form="modules")
    with torch.inference_mode():
        torch.testing.assert_close(fast(batches()[0][0]), theirs(batches()[0][0]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["gradual", "adaptive", "thresholds"])
def test_a_closure_and_accumulated_gradients_change_nothing(method: str) -> None:
    one, other, third = network(), network(), network()
    trained(one, hooks(one, method), plain(one))

    def by_closure(optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(other(x), y)
            loss.backward()
            return loss

        assert torch.isfinite(optimizer.step(closure))  # type: ignore[arg-type]

    def accumulated(optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        for _ in range(2):  # the same batch twice, at half the weight
            (functional.cross_entropy(third(x), y) / 2).backward()
        optimizer.step()

    trained(other, hooks(other, method), by_closure)
    third[1].momentum = 0.5 * 0.1  # type: ignore[union-attr, assignment]
    trained(third, hooks(third, method), accumulated)
    for name, value in one.named_parameters():
        assert torch.equal(value, other.get_parameter(name))
        torch.testing.assert_close(value, third.get_parameter(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["gradual", "adaptive", "thresholds"])
def test_mixed_precision_and_a_step_that_the_scaler_skips(method: str) -> None:
    model = network()
    pruning = hooks(model, method)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    seen: list[bool] = []

    def step(optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(model(x), y)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        scaler.scale(loss * (float("inf") if len(seen) == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append(all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))

    masks = trained(model, pruning, step)
    assert seen == [False, False, True, False, False, False]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert sum(int((~mask).sum()) for mask in masks.values()) > 0


@pytest.mark.parametrize("method", ["gradual", "adaptive", "thresholds", "bayesian"])
def test_a_saved_loop_goes_on_bit_for_bit(method: str) -> None:
    ends = []
    for stop in (False, True):
        model = network()
        pruning = hooks(model, method)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        torch.manual_seed(3)
        pruning.start(optimizer, STEPS)
        for count, (x, y) in enumerate(batches()):
            if stop and count == 3:
                kept = (model.state_dict(), optimizer.state_dict(), pruning.state_dict(), torch.get_rng_state())
                assert all(isinstance(value, Tensor) for value in kept[2].values())
                kept = torch.load(_saved(kept), weights_only=True)
                model = network()
                pruning = hooks(model, method)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
                torch.manual_seed(3)
                pruning.start(optimizer, STEPS)
                model.load_state_dict(kept[0])
                optimizer.load_state_dict(kept[1])
                pruning.load_state_dict(kept[2])
                torch.set_rng_state(kept[3])
            plain(model)(optimizer, x, y)
            pruning.after_step()
        pruning.finish()
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


def _saved(kept: Any) -> Any:
    import io

    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    return file


def test_a_method_that_widens_keeps_the_budget_of_the_model_as_it_was() -> None:
    model = network()
    before = sum(layer.weights for layer in take_inventory(model, X).layers)
    pruning = hooks(model, Choice("expand", {"factor": 2.0}))
    assert model[0].weight.shape[0] == 32  # type: ignore[union-attr, index]
    trained(model, pruning, plain(model))
    kept = sum(int(torch.count_nonzero(weight_of(model, name))) for name in pruning.plan.layers)
    assert kept <= 0.25 * before + 8


def _process(rank: int, port: int, folder: str, method: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = network()
    pruning = hooks(model, method)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05, momentum=0.9)
    pruning.start(optimizer, STEPS)
    for x, y in batches():
        optimizer.zero_grad()
        functional.cross_entropy(parallel(x[rank::2]), y[rank::2]).backward()
        optimizer.step()
        pruning.after_step()
    masks = pruning.finish()
    state = {name: value.detach() for name, value in model.named_parameters()}
    torch.save({**state, **{f"mask.{name}": mask for name, mask in masks.items()}}, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", ["adaptive"])
def test_two_processes_end_with_the_same_masks(method: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(
        _process, (port, str(tmp_path), method), nprocs=2, start_method="spawn"
    )  # fmt: skip
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys()
    assert any(name.startswith("mask.") and sparsity(value) > 0.5 for name, value in first.items())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_cannot_be_done_is_said() -> None:
    model = network()
    with pytest.raises(ConfigError, match="unknown training method 'gradul'"):
        hooks(model, "gradul")
    with pytest.raises(AutopruneError, match="exactly one of them"):
        PruningHooks(model, X)
    pruning = hooks(model)
    with pytest.raises(AutopruneError, match="call start"):
        pruning.after_step()
    with pytest.raises(AutopruneError, match="does not train 0, 3, 6"):
        pruning.start(torch.optim.SGD(network().parameters(), lr=0.1), STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(AutopruneError, match="total_steps must be"):
        pruning.start(optimizer, 0)
    pruning.start(optimizer, STEPS)
    with pytest.raises(AutopruneError, match="called already"):
        pruning.start(optimizer, STEPS)
    with pytest.raises(AutopruneError, match="0 of 6 steps were taken"):
        pruning.finish()
    with pytest.raises(AutopruneError, match="not a state of pruning hooks"):
        pruning.load_state_dict({})


def test_an_optimizer_that_evaluates_the_loss_again_is_refused() -> None:
    model = network()
    pruning = hooks(model)
    optimizer = torch.optim.LBFGS(model.parameters())
    pruning.start(optimizer, STEPS)
    x, y = batches()[0]

    def closure() -> float:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss.item()

    with pytest.raises(AutopruneError, match="LBFGS computes the loss several times a step"):
        optimizer.step(closure)
