"""The training loop: equal to a plain one, resumed bit for bit, and clear about what it cannot do."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from autoprune.errors import AutopruneError, FileError, NumericalError
from autoprune.files import read_tensors, write_tensors
from autoprune.model.inventory import take_inventory
from autoprune.plan import LayerPlan, Plan
from autoprune.progress import Bar, Progress
from autoprune.quantization import Grid, attach_, grids_of
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.training import TRAINING, Pruner, TrainingResult, recalibrate_batch_norm_, train_

LOSS = functional.cross_entropy


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 5)
    )


def loader(count: int = 40) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 6, 6, generator=generator)
    y = torch.randint(0, 5, (count,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)  # draws from the global generator


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Killed(Exception):
    """Stands for a killed process."""


def test_equals_a_plain_loop() -> None:
    batches = [(x, y) for x, y in loader()]
    subject = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    reference = copy.deepcopy(subject)
    settings = TrainingSettings(epochs=2, learning_rate=0.1, weight_decay=0.01, schedule="constant", clip_norm=0.5)
    result = train_(subject, batches, LOSS, settings, seed=0)

    bias, weight = reference[1].bias, reference[1].weight
    groups = [{"params": [weight], "weight_decay": 0.01}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    losses = []
    for _ in range(2):
        for x, y in batches:
            optimizer.zero_grad()
            value = LOSS(reference(x), y)
            value.backward()
            nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            optimizer.step()
            losses.append(value.item())
    assert all(
        torch.allclose(a, b, atol=1e-7) for a, b in zip(subject.parameters(), reference.parameters(), strict=True)
    )
    assert result.losses == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])
    assert (result.epochs, result.steps, result.masks) == (2, 6, None)


def run(
    settings: TrainingSettings, method: str | Choice | None, folder: Path | None, stop: int = 0, sparsity: float = 0.6
) -> tuple[Any, ...]:
    """Trains anew, killed after epoch `stop`; returns the model, the result and the epochs that ran."""
    method = Choice(method) if isinstance(method, str) else method
    subject = model()
    pruner = None
    if method:
        inventory = take_inventory(subject, torch.zeros(1, 1, 6, 6), min_weights=1)
        plan = Plan({name: LayerPlan(sparsity, Choice("unstructured")) for name in inventory.names}, method)
        pruner = Pruner(subject, inventory, plan, [], LOSS)
    ran: list[int] = []

    def on_epoch(epoch: int, figures: dict[str, float]) -> None:
        ran.append(epoch)
        assert set(figures) == {"loss", "learning_rate"}
        if epoch == stop:
            raise Killed

    result: TrainingResult | None = None
    try:
        result = train_(
            subject,
            loader(),
            LOSS,
            settings,
            seed=7,
            method=TRAINING.create(method) if method else None,
            pruner=pruner,
            checkpoint=folder,
            on_epoch=on_epoch,
        )
    except Killed:
        assert stop
    return subject, result, ran


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", [None, *TRAINING])
@pytest.mark.parametrize("stop", [1, pytest.param(3, marks=pytest.mark.slow), 4])
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, optimizer: str, method: str | None, stop: int) -> None:
    settings = TrainingSettings(epochs=4, learning_rate=0.01, optimizer=optimizer, warmup=0.2, max_steps=11)
    whole, result, ran = run(settings, method, None)
    assert ran == [1, 2, 3, 4]
    run(settings, method, tmp_path / "run", stop)
    resumed, again, ran = run(settings, method, tmp_path / "run")
    assert ran == list(range(stop + 1, 5))
    assert same(whole, resumed)
    assert result.losses == again.losses
    if method:
        assert all(torch.equal(result.masks[name], again.masks[name]) for name in result.masks)
        assert set(result.masks) == set(again.masks)


@pytest.mark.parametrize("method", ["gradual", "adaptive", "rigl"])
def test_a_killed_run_that_leaves_a_layer_whole_resumes(tmp_path: Path, method: str) -> None:
    settings = TrainingSettings(epochs=3, learning_rate=0.01, max_steps=9)
    by_erk = Choice(method, {"allocation": "erk"})
    whole, result, _ = run(settings, by_erk, None, sparsity=0.05)
    assert any(bool(mask.all()) for mask in result.masks.values()) or len(result.masks) < 3
    run(settings, by_erk, tmp_path / "run", 1, sparsity=0.05)
    resumed, again, ran = run(settings, by_erk, tmp_path / "run", sparsity=0.05)
    assert ran == [2, 3]
    assert same(whole, resumed)
    assert result.losses == again.losses


def test_seeds_differ_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ends = []
    for seed in (0, 0, 1):
        subject = model()
        torch.set_rng_state(before)
        subject.eval()
        train_(subject, loader(), LOSS, TrainingSettings(epochs=1), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        assert not any(module.training for module in subject.modules())
        assert all(parameter.grad is None for parameter in subject.parameters())
        ends.append(subject)
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run(TrainingSettings(epochs=2), None, tmp_path, 1)
    with pytest.raises(
        FileError, match=r"is of another run: its settings is .*'epochs': 2.*, here it is .*'epochs': 3"
    ):
        run(TrainingSettings(epochs=3), None, tmp_path)
    with pytest.raises(FileError, match="its method is 'NoneType', here it is 'OneShot'"):
        run(TrainingSettings(epochs=2), "one_shot", tmp_path)
    with pytest.raises(FileError, match="its batches is 3, here it is 2"):
        train_(model(), loader(32), LOSS, TrainingSettings(epochs=2), seed=7, checkpoint=tmp_path)
    other = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    with pytest.raises(FileError, match="does not fit this model"):
        train_(other, loader(), LOSS, TrainingSettings(epochs=2), seed=7, checkpoint=tmp_path)


@pytest.mark.parametrize("damage", ["cut", "swapped", "renamed"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    run(TrainingSettings(epochs=2), None, tmp_path, 1)
    (file,) = tmp_path.iterdir()
    raw = file.read_bytes()
    damaged = {
        "cut": raw[: len(raw) // 2],
        "swapped": raw[:8] + b"]" + raw[9:],
        "renamed": raw.replace(b"losses", b"lasses", 1),
    }
    assert damaged[damage] != raw
    file.write_bytes(damaged[damage])
    with pytest.raises(FileError, match="the training checkpoint is corrupt"):
        run(TrainingSettings(epochs=2), None, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda moment: moment.flatten()[:1],
        lambda moment: moment.long(),
        lambda moment: moment[None],
        lambda moment: moment[..., :0],
    ],
)
def test_an_optimizer_state_that_fits_no_parameter_is_refused(tmp_path: Path, change: Callable[..., Any]) -> None:
    """Torch takes it and fails at the next step."""
    run(TrainingSettings(epochs=2), None, tmp_path, 1)
    (file,) = tmp_path.iterdir()
    tensors, about = read_tensors(file, "the checkpoint")
    name = next(name for name in tensors if name.startswith("optimizer.") and tensors[name].dim() > 1)
    write_tensors(file, {**tensors, name: change(tensors[name])}, about)
    with pytest.raises(FileError, match=r"does not fit this model .*optimizer does not fit its parameter"):
        run(TrainingSettings(epochs=2), None, tmp_path)


@pytest.mark.parametrize(("share", "first"), [(0.0, 1), (0.5, 3), (0.9, 4)])
def test_a_model_is_fake_quantised_from_an_epoch_on(share: float, first: int) -> None:
    subject, grids = model(), []

    def quantize_(given: nn.Module) -> None:
        assert given is subject
        attach_(given, {"5.int8_input": Grid(0.1)})

    settings = TrainingSettings(epochs=4, quantize_from=share)
    train_(subject, loader(), LOSS, settings, seed=0, quantize_=quantize_,
           on_epoch=lambda epoch, _: grids.append(bool(grids_of(subject))))  # fmt: skip
    assert grids == [epoch >= first for epoch in range(1, 5)]


@pytest.mark.parametrize("damaged", [torch.tensor([math.nan, 0.0]), torch.tensor([0.1, 300.0]), torch.zeros(3)])
def test_damaged_grids_of_a_checkpoint_are_refused(tmp_path: Path, damaged: Tensor) -> None:
    run(TrainingSettings(epochs=2), None, tmp_path, 1)
    (file,) = tmp_path.iterdir()
    tensors, about = read_tensors(file, "the checkpoint")
    write_tensors(file, {**tensors, "model.0.int8_input": damaged}, about)
    with pytest.raises(FileError, match="does not fit this model"):
        run(TrainingSettings(epochs=2), None, tmp_path)


def test_a_checkpoint_needs_tensors(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return "a string"

        def set_extra_state(self, state: Any) -> None:
            assert state == "a string"

    with pytest.raises(AutopruneError, match=r"cannot be checkpointed: model.1._extra_state"):
        train_(nn.Sequential(nn.Flatten(), Odd(36, 5)), loader(), LOSS, TrainingSettings(epochs=1), seed=0,
               checkpoint=tmp_path)  # fmt: skip


class Once:
    """Says it has three batches, and has them in its first epoch alone."""

    def __init__(self) -> None:
        self.left = list(loader())

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        left, self.left = self.left, []
        return iter(left)


class Unsized:
    """Re-iterable, without a length."""

    def __iter__(self) -> Any:
        return iter(loader())


def test_batches_need_no_length() -> None:
    a, b = model(), model()
    before = torch.get_rng_state()
    train_(a, Unsized(), LOSS, TrainingSettings(epochs=2), seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    train_(b, loader(), LOSS, TrainingSettings(epochs=2), seed=0)
    assert same(a, b)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "there are no batches to train on"),
        (iter(loader()), "can be read once only. Give a list, a DataLoader"),
        (Once(), "epoch 2 gave 0 batches where 3 were expected"),
    ],
)
def test_batches_that_cannot_be_used(batches: Any, said: str) -> None:
    with pytest.raises(AutopruneError) as caught:
        train_(model(), batches, LOSS, TrainingSettings(epochs=2), seed=0)
    assert said in str(caught.value)


def test_divergence_is_an_error_that_says_where() -> None:
    batches = [(x, y) for x, y in loader()]
    batches[1] = (torch.full_like(batches[1][0], math.nan), batches[1][1])
    subject = model().eval()
    with pytest.raises(AutopruneError, match=r"the loss is nan at step 2 of 6, learning rate 0\.0\d+. Lower"):
        train_(subject, batches, LOSS, TrainingSettings(epochs=2), seed=0)
    assert not subject.training
    assert all(torch.isfinite(parameter).all() for parameter in subject.parameters())


def test_a_last_step_that_diverges_is_an_error_too() -> None:
    def endless_slope(output: Tensor, target: Tensor) -> Tensor:
        return (output.sum() - output.sum().detach()).sqrt()  # finite, and its slope is not

    with pytest.raises(NumericalError, match="not finite after step 1, the last one"):
        train_(model(), loader(), endless_slope, TrainingSettings(epochs=1, max_steps=1), seed=0)


def test_arguments_that_do_not_go_together() -> None:
    subject = model()
    settings = TrainingSettings(epochs=1)
    inventory = take_inventory(subject, torch.zeros(1, 1, 6, 6), min_weights=1)
    pruner = Pruner(subject, inventory, Plan({}), [], LOSS)
    method = TRAINING.create(Choice("one_shot"))
    with pytest.raises(AutopruneError, match="go together"):
        train_(subject, loader(), LOSS, settings, seed=0, method=method)
    with pytest.raises(AutopruneError, match="go together"):
        train_(subject, loader(), LOSS, settings, seed=0, pruner=pruner)
    with pytest.raises(AutopruneError, match="made for another model"):
        train_(model(), loader(), LOSS, settings, seed=0, method=method, pruner=pruner)
    with pytest.raises(AutopruneError, match="there is no teacher"):
        train_(subject, loader(), LOSS, TrainingSettings(distillation_weight=0.5), seed=0)
    with pytest.raises(AutopruneError, match="a teacher is the model itself"):
        train_(subject, loader(), LOSS, TrainingSettings(distillation_weight=0.5), seed=0, teachers=[subject])


def test_progress_sees_every_step(tmp_path: Path) -> None:
    class Count(Bar):
        steps = 0

        def advance(self, steps: int = 1, note: str = "") -> None:
            self.steps += steps

    class Counting(Progress):
        @contextmanager
        def bar(self, title: str, total: int) -> Iterator[Bar]:
            assert (title, total) == ("recovery", 5)
            yield shown

    shown = Count()
    train_(
        model(), loader(), LOSS, TrainingSettings(epochs=9, max_steps=5), seed=0, progress=Counting(), title="recovery",
        checkpoint=tmp_path,
    )  # fmt: skip
    assert shown.steps == 5


def test_batch_norm_is_recalibrated_to_the_average_of_batches() -> None:
    subject = model()
    norm = subject[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.momentum = 0.3
    subject.eval()
    subject[4].train()  # modes are restored one by one
    weights = [parameter.clone() for parameter in subject.parameters()]
    batches = [(x, y) for x, y in loader(32)]
    assert recalibrate_batch_norm_(subject, batches) is subject
    maps = [subject[0](x) for x, _ in batches]
    wanted = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    spread = torch.stack([m.transpose(0, 1).flatten(1).var(1) for m in maps]).mean(0)
    assert torch.allclose(subject.get_buffer("1.running_mean"), wanted, atol=1e-5)
    assert torch.allclose(subject.get_buffer("1.running_var"), spread, atol=1e-5)
    assert norm.momentum == 0.3
    assert [module.training for module in subject] == [False, False, False, False, True, False]
    assert all(torch.equal(a, b) for a, b in zip(weights, subject.parameters(), strict=True))


def test_batch_norm_recalibration_needs_batches_only_where_there_are_norms() -> None:
    recalibrate_batch_norm_(nn.Linear(3, 3), [])
    with pytest.raises(AutopruneError, match="on no batches"):
        recalibrate_batch_norm_(model(), [])
