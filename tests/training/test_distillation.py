"""Distillation: Hinton's loss, several teachers by their weights, and the model's own average as one of them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.errors import FileError
from autoprune.model.weights import weight_of
from autoprune.settings import TEACHER_WEIGHTS, TrainingSettings
from autoprune.testing.cases import random_batches
from autoprune.training import TrainingResult, train_
from autoprune.training.distillation import Distillation

LOSS = functional.cross_entropy


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 5)
    )


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return random_batches(count, samples=16, shape=(1, 6, 6), classes=5)


def divergence(student: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        terms = [
            functional.kl_div(student(x).log_softmax(-1), teacher(x).log_softmax(-1), reduction="sum", log_target=True)
            for x, _ in batches()
        ]
    return float(sum(terms))


def test_distillation_lowers_the_divergence_from_the_teacher() -> None:
    teacher = model(1).eval()
    ends = {}
    for weight in (0.0, 1.0):
        student = model(2).eval()
        start = divergence(student, teacher)
        settings = TrainingSettings(epochs=12, learning_rate=0.05, distillation_weight=weight)
        train_(student, batches(), LOSS, settings, seed=0, teachers=[teacher])
        ends[weight] = divergence(student, teacher)
    assert ends[1.0] < 0.5 * start
    assert ends[1.0] < 0.5 * ends[0.0]


def test_distilling_from_oneself_changes_nothing() -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    teachers = [copy.deepcopy(student).train() for _ in range(2)]
    settings = TrainingSettings(epochs=1, learning_rate=1.0, weight_decay=0.0, distillation_weight=1.0)
    result = train_(student, batches(), LOSS, settings, seed=0, teachers=teachers)
    assert result.losses == pytest.approx([0.0], abs=1e-6)
    for teacher in teachers:
        pairs = zip(student.parameters(), teacher.parameters(), strict=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)
        assert teacher.training


def linear(count: int) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(36, 5) for _ in range(count)]


def objective(student: nn.Module, teachers: list[nn.Linear], target: Tensor, weighting: str, x: Tensor) -> Tensor:
    settings = TrainingSettings(distillation_weight=1.0, distillation_temperature=3.0, teacher_weights=weighting)
    return Distillation(student, LOSS, settings, teachers)(student(x), x, target)


def test_the_distillation_loss_is_hintons() -> None:
    x, y = torch.randn(4, 36), torch.randint(0, 5, (4,))
    student, teacher = linear(2)
    with torch.no_grad():
        p, q = (functional.softmax(net(x) / 3.0, -1) for net in (teacher, student))
        soft = float((p * (p / q).log()).sum(-1).mean()) * 9.0
        hard = float(LOSS(student(x), y))
    settings = TrainingSettings(epochs=1, distillation_weight=0.3, distillation_temperature=3.0)
    result = train_(student, [(x, y)], LOSS, settings, seed=0, teachers=[teacher])
    assert result.losses[0] == pytest.approx(0.7 * hard + 0.3 * soft, rel=1e-5)


@pytest.mark.parametrize("weighting", list(TEACHER_WEIGHTS))
def test_several_teachers_pull_by_their_weights(weighting: str) -> None:
    """The gradient is that of the weighted divergences, sample by sample; the weights by hand."""
    student, *teachers = linear(4)
    x, y = torch.randn(6, 36), torch.randint(0, 5, (6,))
    with torch.no_grad():
        true = torch.stack([teacher(x).softmax(-1)[range(6), y] for teacher in teachers])
    weights = {"mean": torch.full((3, 6), 1 / 3), "confidence": true / true.sum(0)}[weighting]
    terms = [
        (w * functional.kl_div((student(x) / 3).log_softmax(-1), p, reduction="none").sum(-1)).mean()
        for w, teacher in zip(weights, teachers, strict=True)
        if (p := (teacher(x) / 3).softmax(-1).detach()) is not None
    ]
    wanted = torch.autograd.grad(9.0 * torch.stack(terms).sum(), list(student.parameters()))
    got = torch.autograd.grad(objective(student, teachers, y, weighting, x), list(student.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_confidence_is_certainty_where_no_class_is_true() -> None:
    logits = torch.randn(2, 3, 5)
    log_shares = logits.log_softmax(2)
    certain = torch.stack([-torch.distributions.Categorical(logits=one).entropy() for one in logits])
    weights = TEACHER_WEIGHTS["confidence"]
    torch.testing.assert_close(weights(log_shares, None), certain.log_softmax(0))
    target = torch.tensor([4, -100, 0])  # cross-entropy ignores the one in the middle
    mixed = torch.stack([log_shares[:, 0, 4], certain[:, 1], log_shares[:, 2, 0]], dim=1)
    torch.testing.assert_close(weights(log_shares, target), mixed.log_softmax(0))


def test_targets_that_are_no_classes_are_distilled_too() -> None:
    student, *teachers = linear(3)
    x = torch.randn(6, 36)
    value = objective(student, teachers, torch.rand(6, 5).softmax(-1), "confidence", x)
    assert value.item() > 0


def test_tokens_are_samples() -> None:
    student, *teachers = linear(3)
    x, y = torch.randn(2, 3, 36), torch.randint(0, 5, (2, 3))
    whole = objective(student, teachers, y.flatten(), "confidence", x.flatten(0, 1))
    settings = TrainingSettings(distillation_weight=1.0, distillation_temperature=3.0, teacher_weights="confidence")
    distillation = Distillation(student, lambda output, _: output.sum() * 0.0, settings, teachers)
    torch.testing.assert_close(distillation(student(x), x, y), whole)


def test_the_average_by_hand() -> None:
    subject = model()
    settings = TrainingSettings(distillation_weight=0.5, ema_teacher=0.6)
    distillation = Distillation(subject, LOSS, settings, [])
    average = distillation.average
    assert average is not None
    assert distillation.teachers == [average]
    assert not any(module.training for module in average.modules())
    names = ["0.weight", "1.running_mean"]
    mean = {name: subject.state_dict()[name].clone() for name in names}
    for step in range(1, 5):
        for name in names:
            subject.state_dict()[name].add_(torch.randn(()))
            decay = min(0.6, step / (step + 1))
            mean[name] = decay * mean[name] + (1 - decay) * subject.state_dict()[name]
        subject.get_buffer("1.num_batches_tracked").add_(1)
        distillation.after_step(step)
    for name in names:
        torch.testing.assert_close(average.state_dict()[name], mean[name])
    assert int(average.get_buffer("1.num_batches_tracked")) == 4
    assert all(parameter.requires_grad for parameter in subject.parameters())


class Killed(Exception):
    """Stands for a killed process."""


def run(folder: Path | None, stop: int = 0, teachers: int = 1) -> tuple[nn.Module, TrainingResult | None]:
    """Trains anew with a teacher, and the average as another; killed after epoch `stop`."""
    subject = model()
    settings = TrainingSettings(
        epochs=4, learning_rate=0.05, distillation_weight=0.5, teacher_weights="confidence", ema_teacher=0.9
    )

    def on_epoch(epoch: int, figures: dict[str, float]) -> None:
        if epoch == stop:
            raise Killed

    given = [model(seed).eval() for seed in range(1, 1 + teachers)]
    try:
        result = train_(
            subject, batches(), LOSS, settings, seed=7, teachers=given, checkpoint=folder, on_epoch=on_epoch
        )
    except Killed:
        return subject, None
    return subject, result


def test_a_killed_run_goes_on_with_its_average(tmp_path: Path) -> None:
    whole, result = run(None)
    run(tmp_path, stop=2)
    with pytest.raises(FileError, match="its teachers is 1, here it is 2"):
        run(tmp_path, teachers=2)
    resumed, again = run(tmp_path)
    assert result == again
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_the_average_teaches() -> None:
    """A run with it differs from one without, and needs no other teacher."""
    ends = []
    for decay, weight in ((0.9, 0.5), (0.9, 0.0), (None, 0.0)):
        subject = model()
        settings = TrainingSettings(epochs=2, learning_rate=0.05, distillation_weight=weight, ema_teacher=decay)
        train_(subject, batches(), LOSS, settings, seed=0)
        ends.append(weight_of(subject, "5"))
    assert not torch.equal(ends[0], ends[1])
    assert torch.equal(ends[1], ends[2])
