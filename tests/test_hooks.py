"""Pruning in a user's own loop: the same as in ours, whatever the loop does between two steps."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional

import autoprune
from autoprune import PruningHooks
from autoprune.errors import AutopruneError, ConfigError, InfeasibleTarget, StaleTable
from autoprune.latency.cost import LatencyCost
from autoprune.masks import sparsity
from autoprune.model.inventory import take_inventory
from autoprune.model.weights import weight_of
from autoprune.pipeline import retarget
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings, make_optimizer
from autoprune.testing import fake_table
from autoprune.testing.cases import random_batches
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


def hooks(model: nn.Module, method: str | Choice = "gradual", **given: Any) -> PruningHooks:
    wanted = {"sparsity": 0.75, "pattern": GROUP, "batches": random_batches(1), **given}
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
    for x, y in random_batches(STEPS):
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
    pruner = Pruner(ours, inventory, plan, random_batches(1), functional.cross_entropy)
    made = TRAINING.create(Choice(method, args))
    train_(ours, random_batches(STEPS), functional.cross_entropy, settings, seed=0, method=made, pruner=pruner)

    pruning = hooks(theirs, Choice(method, args))
    optimizer = make_optimizer(list(theirs.parameters()), settings)
    torch.manual_seed(epoch_seed(0, 0))
    pruning.start(optimizer, STEPS)
    torch.manual_seed(epoch_seed(0, 1))
    for x, y in random_batches(STEPS):
        plain(theirs)(optimizer, x, y)
        pruning.after_step()
    masks = pruning.finish()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert masks.keys() == made.masks.keys()
    cut = sum(int((~mask).sum()) for mask in masks.values())
    assert cut >= 0.7 * sum(layer.weights for layer in inventory.layers)
    fast = autoprune.repack(theirs.eval(), X, form="modules")
    with torch.inference_mode():
        torch.testing.assert_close(
            fast(random_batches(STEPS)[0][0]), theirs(random_batches(STEPS)[0][0]), rtol=1e-3, atol=1e-4
        )


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
    norm = third.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm2d)
    norm.momentum = 0.5 * 0.1
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
        for count, (x, y) in enumerate(random_batches(STEPS)):
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
    assert weight_of(model, "0").shape[0] == 32
    trained(model, pruning, plain(model))
    kept = sum(int(torch.count_nonzero(weight_of(model, name))) for name in pruning.plan.layers)
    assert kept <= 0.25 * before + 8


class LightningLike:
    """The shape of a Lightning loop: the optimizer's step is handed a closure, by name, that does the rest."""

    def __init__(self, model: nn.Module, pruning: PruningHooks) -> None:
        self.model, self.pruning = model, pruning

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(self.model(batch[0]), batch[1])

    def fit(self, optimizer: torch.optim.Optimizer) -> None:
        for batch in random_batches(STEPS):

            def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
                loss = self.training_step(batch)
                optimizer.zero_grad()
                loss.backward()
                return loss

            optimizer.step(closure=closure)  # type: ignore[arg-type]
            self.pruning.after_step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_lightning_loop_gives_what_a_plain_one_gives(kind: type[torch.optim.Optimizer]) -> None:
    ends = []
    for lightning in (False, True):
        model = network()
        pruning = hooks(model, "adaptive")
        optimizer = kind(model.parameters(), lr=0.01)  # type: ignore[call-arg]
        pruning.start(optimizer, STEPS)
        if lightning:
            LightningLike(model, pruning).fit(optimizer)
        else:
            for x, y in random_batches(STEPS):
                plain(model)(optimizer, x, y)
                pruning.after_step()
        assert all(sparsity(mask) > 0 for mask in pruning.finish().values())
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


# method, criterion, whether every process has a seed of its own
PARALLEL = [
    ("adaptive", "magnitude", False),
    ("gradual", "gradient", False),  # ranks by what the model gives on data: by batch norm statistics
    ("joint", "magnitude", True),  # its threshold network starts at random
    ("bayesian", "gradient", True),  # draws batches
]


def _process(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for number, (method, criterion, seeded) in enumerate(PARALLEL):
        model = network()
        if seeded:
            torch.manual_seed(100 + rank)
        pruning = hooks(model, method, criterion=criterion, batches=random_batches(3))
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05, momentum=0.9)
        pruning.start(optimizer, STEPS)
        for x, y in random_batches(STEPS):
            optimizer.zero_grad()
            functional.cross_entropy(parallel(x[rank::2]), y[rank::2]).backward()
            optimizer.step()
            pruning.after_step()
        masks = pruning.finish()
        state = {name: value.detach() for name, value in model.named_parameters()}
        kept = {**state, **{f"mask.{name}": mask for name, mask in masks.items()}}
        torch.save(kept, Path(folder) / f"{number}.{rank}.pt")
    with pytest.raises(AutopruneError, match="measure the table first"):
        PruningHooks(network(), X, speedup=1.5, pattern=GROUP)
    torch.distributed.barrier()
    time.sleep(1.0)  # until the other has left the barrier too
    # Nothing is torn down: a process group that ends holds the interpreter's lock while it waits for a thread of its
    # own, which may be waiting for that lock.
    os._exit(0)


@pytest.mark.slow
def test_two_processes_end_with_the_same_masks_and_as_one_with_their_mean_gradients(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_processes(_process, (port, str(tmp_path)), nprocs=2, start_method="spawn")
    for number, case in enumerate(PARALLEL):
        first, second = (torch.load(tmp_path / f"{number}.{rank}.pt", weights_only=True) for rank in (0, 1))
        assert first.keys() == second.keys()
        assert any(name.startswith("mask.") and sparsity(value) > 0.5 for name, value in first.items()), case
        assert all(torch.equal(first[name], second[name]) for name in first), case

    alone = network()  # what DDP says: each step's gradient is the mean of the processes'
    pruning = hooks(alone, "adaptive", batches=random_batches(3))
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05, momentum=0.9)
    pruning.start(optimizer, STEPS)
    for x, y in random_batches(STEPS):
        optimizer.zero_grad()
        for rank in (0, 1):
            (functional.cross_entropy(alone(x[rank::2]), y[rank::2]) / 2).backward()
        optimizer.step()
        pruning.after_step()
    masks = pruning.finish()
    parallel = torch.load(tmp_path / "0.0.pt", weights_only=True)
    assert all(torch.equal(mask, parallel[f"mask.{name}"]) for name, mask in masks.items())
    for name, value in alone.named_parameters():
        torch.testing.assert_close(value, parallel[name], rtol=1e-4, atol=1e-5)


def test_a_speedup_is_planned_with_a_latency_table_that_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retarget, "PROFILE_SAMPLES", 3)
    model, file = network(), tmp_path / "latency.json"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured = retarget.latency_table(model, X, take_inventory(model, X), GROUP, file)
    assert file.exists()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    # a table in which time follows the weights, so that the figures below do not depend on the clock
    ideal = fake_table(take_inventory(model, X), (GROUP,), fixed_us=0.0)
    dense_ms = sum(layer.dense_us for layer in ideal.layers.values()) / 1e3
    whole = ((1e-9, 1e-9), (dense_ms, dense_ms))
    told = {"settings": measured.settings, "machine": measured.machine}
    replace(ideal, whole=whole, dense_ms=dense_ms, **told).save(file)
    monkeypatch.setattr(retarget, "profile_table", None)  # it is read now
    pruning = hooks(model, "adaptive", sparsity=None, speedup=4.0, over="eager", table=file)
    cost = pruning._pruner.cost
    assert isinstance(cost, LatencyCost)
    allowed = cost({name: layer.sparsity for name, layer in pruning.plan.layers.items()})
    assert allowed <= 10.0 / 4.0
    masks = trained(model, pruning, plain(model))
    spent = cost({name: sparsity(mask) for name, mask in masks.items()})
    assert 0.8 * allowed <= spent <= allowed * (1 + 1e-6)

    with pytest.raises(InfeasibleTarget, match=r"over dense torch eager: .* at best"):
        hooks(network(), sparsity=None, speedup=900.0, over="eager", table=file)
    with pytest.raises(StaleTable, match="patterns"):
        hooks(network(), sparsity=None, speedup=2.0, table=file, pattern="unstructured")
    smooth = network()
    smooth[4] = nn.GELU()  # type: ignore[operator]
    with pytest.raises(StaleTable, match="architecture"):
        hooks(smooth, sparsity=None, speedup=2.0, table=file)


def test_what_cannot_be_done_is_said() -> None:
    model = network()
    with pytest.raises(ConfigError, match="unknown training method 'gradul'"):
        hooks(model, "gradul")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"sparsity": None}, "exactly one of them"),
        ({"speedup": 2.0}, "exactly one of them"),
        ({"table": "latency.json"}, "for a speedup alone"),
        ({"sparsity": 0.0}, r"target.sparsity is a fraction in \(0, 1\)"),
        ({"sparsity": float("nan")}, r"target.sparsity is a fraction in \(0, 1\)"),
        ({"sparsity": None, "speedup": 0.9}, "target.speedup must be above 1"),
        ({"sparsity": None, "speedup": 2.0, "pattern": "n:m"}, "cannot be put on a speed-up"),
        ({"pattern": "grup"}, "Did you mean 'group'"),
        ({"criterion": "magnitud"}, "Did you mean 'magnitude'"),
        ({"keep_dense": ["*"]}, "prun"),
    ]
    for given, said in wrong:
        with pytest.raises(AutopruneError, match=said):
            hooks(model, **given)
    pruning = hooks(model)
    with pytest.raises(AutopruneError, match="call start"):
        pruning.after_step()
    with pytest.raises(AutopruneError, match="does not train 0, 3, 6"):
        pruning.start(torch.optim.SGD(network().parameters(), lr=0.1), STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for steps in (0, 2.5, True):
        with pytest.raises(AutopruneError, match="total_steps must be"):
            pruning.start(optimizer, steps)  # type: ignore[arg-type]
    pruning.start(optimizer, STEPS)
    with pytest.raises(AutopruneError, match="called already"):
        pruning.start(optimizer, STEPS)
    with pytest.raises(AutopruneError, match="0 of 6 steps were taken"):
        pruning.finish()
    with pytest.raises(AutopruneError, match="not a state of pruning hooks"):
        pruning.load_state_dict({})
    other = hooks(network(), "adaptive")
    with pytest.raises(AutopruneError, match="call start"):
        other.state_dict()
    other.start(torch.optim.SGD(other._pruner.model.parameters(), lr=0.1), STEPS)
    with pytest.raises(AutopruneError, match="made otherwise"):
        pruning.load_state_dict(other.state_dict())
    with pytest.raises(AutopruneError, match="damaged: it has 10 tensors, of 11"):
        other.load_state_dict({name: value for name, value in other.state_dict().items() if name != "latent.0"})
    renamed = {name.replace("latent.0", "latent.9"): value for name, value in other.state_dict().items()}
    with pytest.raises(AutopruneError, match=r"damaged: 'latent\.0'"):
        other.load_state_dict(renamed)
    with pytest.raises(AutopruneError, match=r"damaged: its 'latent.0' is .* here it is"):
        other.load_state_dict({**other.state_dict(), "latent.0": torch.zeros(3)})
    for x, y in random_batches(STEPS):
        plain(model)(optimizer, x, y)
        pruning.after_step()
    with pytest.raises(AutopruneError, match="all 6 steps were taken"):
        pruning.after_step()


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("lost", "it has 2 tensors, of 3"),
        ("renamed", "it has a mask of '9'"),
        ("flat", "its '3' is"),
        ("of numbers", "its '3' is"),
    ],
)
def test_a_state_whose_masks_do_not_fit_is_refused(broken: str, said: str) -> None:
    pruning = hooks(model := network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruning.start(optimizer, STEPS)
    for x, y in random_batches(STEPS):
        plain(model)(optimizer, x, y)
        pruning.after_step()
    state = pruning.state_dict()
    pruning.load_state_dict(state)
    mask = state.pop("3")
    if broken != "lost":
        name = "9" if broken == "renamed" else "3"
        state[name] = {"flat": mask.flatten(), "of numbers": mask.float()}.get(broken, mask)
    with pytest.raises(AutopruneError, match=f"damaged: {said}"):
        pruning.load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hooks.step": torch.tensor(STEPS + 1)}, f"of step {STEPS + 1}, of {STEPS}"),
        ({"hooks.step": torch.tensor(-1)}, "of step -1"),
        ({"hooks.step": torch.tensor(0.5)}, "no number 'hooks.step'"),
        ({"hooks.made": torch.tensor([], dtype=torch.int64)}, "no number 'hooks.made'"),
        ({"3": [1.0]}, "maps names to tensors"),
    ],
)
def test_what_is_no_state_is_refused(changes: dict[str, Any], said: str) -> None:
    pruning = hooks(model := network())
    pruning.start(torch.optim.SGD(model.parameters(), lr=0.1), STEPS)
    with pytest.raises(AutopruneError, match=said):
        pruning.load_state_dict({**pruning.state_dict(), **changes})


@pytest.mark.parametrize("method", list(TRAINING))
def test_any_state_of_a_training_is_taken_back_later(method: str) -> None:
    pruning = hooks(model := network(), method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruning.start(optimizer, STEPS)
    states = [pruning.state_dict()]
    for x, y in random_batches(STEPS):
        plain(model)(optimizer, x, y)
        pruning.after_step()
        states.append({name: value.clone() for name, value in pruning.state_dict().items()})
    for state in states:
        pruning.load_state_dict(state)
        again = pruning.state_dict()
        assert set(again) == set(state)


def test_an_optimizer_that_evaluates_the_loss_again_is_refused() -> None:
    model = network()
    pruning = hooks(model)
    optimizer = torch.optim.LBFGS(model.parameters())
    pruning.start(optimizer, STEPS)
    x, y = random_batches(STEPS)[0]

    def closure() -> float:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss.item()

    with pytest.raises(AutopruneError, match="LBFGS computes the loss several times a step"):
        optimizer.step(closure)
