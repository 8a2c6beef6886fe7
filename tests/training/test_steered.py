"""Steered: what an action orders, what a policy sees, and policy files."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autoprune import PruningHooks
from autoprune.errors import AutopruneError, ConfigError, FileError
from autoprune.files import read_json, write_json, write_tensors
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings, make_optimizer
from autoprune.testing import check_method
from autoprune.testing.cases import LOSS, conv_net_pruner, random_batches
from autoprune.training import TRAINING, steered, train_
from autoprune.training.schedule import rise
from autoprune.training.steered import Steered
from autoprune.training.steering import ACTION_NAMES, LIMIT, OBSERVATION_NAMES, RULES, decode
from autoprune.training.steering_policy import SteeringPolicy

GROUP = Choice("group", {"size": 4})


def policy(seed: int = 0, scale: float = 0.5, slices: int = 5) -> SteeringPolicy:
    draws = torch.Generator().manual_seed(seed)
    widths = (len(OBSERVATION_NAMES), 16, len(ACTION_NAMES))
    weights = [scale * torch.randn(out, into, generator=draws) for into, out in pairwise(widths)]
    return SteeringPolicy(tuple(weights), tuple(torch.randn(len(each), generator=draws) for each in weights), slices)


def action(**named: float) -> list[float]:
    assert set(named) <= set(ACTION_NAMES)
    return [named.get(name, 0.0) for name in ACTION_NAMES]


class Ordered(Steered):
    """Takes given actions, and keeps its masks after each."""

    def __init__(self, actions: list[list[float]]) -> None:
        super().__init__(slices=len(actions))
        self.actions, self.kept, self.seen = list(actions), list[dict[str, torch.Tensor]](), list[list[float]]()

    def turn(self) -> None:
        self.seen.append(self.observe())
        self.steer(self.actions.pop(0))
        self.kept.append(dict(self.masks))


def taken(actions: list[list[float]], pattern: Choice = GROUP, **settings: Any) -> Ordered:
    pruner, method = conv_net_pruner(pattern, [0.75] * 3), Ordered(actions)
    given = TrainingSettings(epochs=len(actions), learning_rate=0.05).changed(settings)
    train_(pruner.model, random_batches(), LOSS, given, seed=0, method=method, pruner=pruner, teachers=[nn.Identity()])
    return method


def test_the_zero_action_is_the_cubic() -> None:
    fraction = 0.0
    for index in range(1, 31):
        orders = decode(action(), index, 30, fraction)
        assert orders.fraction == pytest.approx(rise(index / 15), abs=1e-3)
        assert (orders.regrow, orders.learning_rate, orders.distillation) == (0.0, 1.0, 1.0)
        assert sum(orders.weights.values()) == pytest.approx(1.0)
        assert max(orders.weights, key=orders.weights.__getitem__) == "lamp"
        fraction = orders.fraction
    assert fraction == 1.0


@pytest.mark.parametrize("cut", [-1.0, -0.3, 0.0, 0.6, 1.0])
@pytest.mark.parametrize("slices", [1, 2, 30])
def test_every_order_goes_forward_and_the_last_one_ends(cut: float, slices: int) -> None:
    fraction = 0.0
    for index in range(1, slices + 1):
        orders = decode(action(cut=cut, regrow=1.0), index, slices, fraction)
        assert fraction <= orders.fraction <= 1.0
        fraction = orders.fraction
    assert (fraction, orders.regrow) == (1.0, 0.0)


def test_actions_move_what_their_names_say() -> None:
    usual, faster = (decode(action(cut=cut), 3, 30, 0.2) for cut in (0.0, 0.5))
    assert faster.fraction > usual.fraction
    for rule in RULES:
        assert decode(action(**{rule: 1.0}), 3, 30, 0.2).weights[rule] > usual.weights[rule]
    assert decode(action(learning_rate=-1.0), 3, 30, 0.2).learning_rate == pytest.approx(1 / 3)
    assert decode(action(regrow=1.0), 3, 30, 0.2).regrow == pytest.approx(0.3)
    assert decode(action(regrow=-1.0), 3, 30, 0.2).regrow == 0.0
    assert decode(action(distillation=-1.0), 3, 30, 0.2).distillation == 0.0


@pytest.mark.parametrize("pattern", [GROUP, Choice("unstructured"), Choice("filter")], ids=str)
def test_what_is_cut_comes_back_only_where_it_is_ordered(pattern: Choice) -> None:
    drawn = torch.Generator().manual_seed(1)
    for regrow in (-1.0, 1.0):
        actions = [(2 * torch.rand(len(ACTION_NAMES), generator=drawn) - 1).tolist() for _ in range(6)]
        for each in actions:
            each[ACTION_NAMES.index("regrow")] = regrow
        method = taken(actions, pattern)
        came = 0
        for before, after in pairwise(method.kept):
            for name, mask in before.items():
                back = int((after[name] & ~mask).sum())
                assert back <= 0.3 * int(mask.sum())
                came += back
        assert (came > 0) == (regrow > 0.0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_factor_is_one_on_the_learning_rate(optimizer: str) -> None:
    """A run at a third of the rate ends where one does that scales every step by a third."""
    ends = []
    for rate, ordered in ((0.01, 0.0), (0.03, -1.0)):
        pruner = conv_net_pruner(GROUP, [0.75] * 3)
        given = TrainingSettings(epochs=2, learning_rate=rate, optimizer=optimizer, schedule="constant")
        method = Ordered([action(learning_rate=ordered)] * 2)
        train_(pruner.model, random_batches(), LOSS, given, seed=0, method=method, pruner=pruner)
        ends.append(pruner.model.state_dict())
    for name in (
        "0.weight",
        "1.weight",
        "3.weight",
        "5.weight",
        "5.bias",
    ):  # AdamW follows noise in a bias before a norm
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-2, atol=1e-4)


def test_observations_are_named_finite_and_the_same_size_for_any_network() -> None:
    for pattern in (GROUP, Choice("unstructured")):
        for seen in taken([action(cut=0.3)] * 4, pattern).seen:
            assert len(seen) == len(OBSERVATION_NAMES)
            assert all(math.isfinite(value) and abs(value) <= LIMIT for value in seen)
    first, *_, last = taken([action(cut=0.3)] * 4).seen
    at = OBSERVATION_NAMES.index
    assert (first[at("progress")], first[at("remaining")], first[at("calibration loss")]) == (0.0, 1.0, 0.0)
    assert last[at("progress")] == 0.75
    assert last[at("previous cut")] == pytest.approx(0.3)


def test_distillation_is_led_where_the_loop_distils() -> None:
    seen: list[float] = []

    class Watched(Ordered):
        def before_step(self, step: int) -> None:
            seen.append(self.distillation_factor)
            super().before_step(step)

    def states(ordered: float) -> dict[str, torch.Tensor]:
        pruner, teacher = conv_net_pruner(GROUP, [0.75] * 3), conv_net_pruner(GROUP, [0.5] * 3).model.eval()
        given = TrainingSettings(epochs=2, learning_rate=0.05, distillation_weight=0.5)
        train_(
            pruner.model, random_batches(), LOSS, given, seed=0, method=Watched([action(distillation=ordered)] * 2),
            pruner=pruner, teachers=[teacher],
        )  # fmt: skip
        return pruner.model.state_dict()

    none, some = states(-1.0), states(0.0)
    assert set(seen) == {0.0, 1.0}
    assert any(not torch.equal(value, some[name]) for name, value in none.items())


def test_a_steering_policy_keeps_the_laws_of_methods(tmp_path: Path) -> None:
    policy().save(tmp_path)
    check_method(lambda: TRAINING.create(Choice("steered", {"path": str(tmp_path)})), examples=6)


def test_a_users_loop_is_steered_alike_and_needs_calibration_batches(tmp_path: Path) -> None:
    policy(slices=2).save(tmp_path)
    choice = Choice("steered", {"path": str(tmp_path)})
    pruner = conv_net_pruner(GROUP, [0.75] * 3)

    def hooks(**given: Any) -> PruningHooks:
        x = random_batches(1)[0][0]
        return PruningHooks(pruner.model, x, choice, sparsity=0.75, pattern=GROUP, **given)

    optimizer = make_optimizer(list(pruner.model.parameters()), TrainingSettings(learning_rate=0.05))
    with pytest.raises(AutopruneError, match="give some"):
        hooks().start(optimizer, 4)
    pruning = hooks(batches=random_batches(2))
    pruning.start(optimizer, 4)
    for x, y in random_batches(4):
        optimizer.zero_grad()
        LOSS(pruner.model(x), y).backward()
        optimizer.step()
        pruning.after_step()
    masks = pruning.finish()
    cut = sum(int((~mask).sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    assert cut == pytest.approx(0.75, abs=0.05)


def test_a_policy_survives_its_files(tmp_path: Path) -> None:
    made, seen = policy(), [0.1] * len(OBSERVATION_NAMES)
    made.save(tmp_path)
    for path in (tmp_path, tmp_path / "policy.json"):
        again = SteeringPolicy.load(path)
        assert again(seen) == made(seen)
        assert again.slices == 5
    assert all(-1.0 <= value <= 1.0 for value in policy(scale=50.0)(seen))
    assert Steered(str(tmp_path)).wanted == 5
    assert Steered(str(tmp_path), slices=7).wanted == 7


@pytest.mark.parametrize("damage", ["version", "layers", "slices", "shape", "nan", "missing"])
def test_a_damaged_policy_is_refused(damage: str, tmp_path: Path) -> None:
    made = policy()
    made.save(tmp_path)
    about = read_json(tmp_path / "policy.json", "it")
    about = {name: value for name, value in about.items() if name != "checksum"}
    tensors = {f"weight.{i}": w for i, w in enumerate(made.weights)} | {
        f"bias.{i}": b for i, b in enumerate(made.biases)
    }
    changed: dict[str, dict[str, Any]] = {
        "version": {"steering_version": 99},
        "layers": {"layers": 3},
        "slices": {"slices": 0},
    }
    write_json(tmp_path / "policy.json", {**about, **changed.get(damage, {})})
    if damage == "shape":
        write_tensors(tmp_path / "policy.safetensors", tensors | {"weight.0": torch.zeros(16, 3)})
    if damage == "nan":
        write_tensors(tmp_path / "policy.safetensors", tensors | {"bias.0": torch.full((16,), math.nan)})
    if damage == "missing":
        (tmp_path / "policy.safetensors").unlink()
    with pytest.raises(FileError):
        SteeringPolicy.load(tmp_path)


@pytest.mark.parametrize("args", [{"path": 3}, {"slices": 0}, {"slices": 10**6}, {"slice": 3}])
def test_wrong_arguments_are_refused(args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="steered"):
        TRAINING.create(Choice("steered", args))


def test_every_layer_has_a_mask_from_the_first_cut_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state without one is taken for a damaged one; rules may leave a layer whole."""
    monkeypatch.setattr(steered, "allocate", lambda *_: {"0": 0.5, "3": 0.0, "5": 0.5})
    method = taken([action()] * 2)
    assert set(method.kept[0]) == {"0", "3", "5"}
    assert bool(method.kept[0]["3"].all())
    method.resume(method.state())
