"""Losses and evaluations by name, against their definitions; the forms of batches and outputs that they read."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.errors import AutopruneError, ConfigError
from autoprune.metric import ACCURACY
from autoprune.model.arguments import Arguments, prediction
from autoprune.model.classes import class_axis, classes_last
from autoprune.model.given import inputs_and_target
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.tasks import EVALUATIONS, LOSSES
from autoprune.tasks.batches import MappedBatches
from autoprune.tasks.evaluations import accuracy, bits, f1, fidelity, iou, mse, perplexity, rmse, target_variance
from autoprune.tasks.losses import loss_named
from autoprune.tasks.scoring import evaluation
from autoprune.training.distillation import Distillation

DRAWN = torch.Generator().manual_seed(0)


class Fixed(nn.Module):
    """Gives its input as output."""

    def forward(self, x: Any) -> Any:
        return x


def scored(figure: Callable[[nn.Module, Any], float], *batches: tuple[Tensor, Tensor]) -> float:
    return figure(Fixed(), batches)


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


X, Y = torch.zeros(3, 2), torch.zeros(3)


@pytest.mark.parametrize(
    ("batch", "inputs", "target"),
    [
        ((X, Y), X, Y),
        ([X, Y], X, Y),
        ((X, X, Y), (X, X), Y),
        (((X, X), Y), (X, X), Y),
        (X, X, None),
        ([X], X, None),
        ({"x": X, "mask": X, "labels": Y}, {"x": X, "mask": X}, Y),
        (OrderedDict(x=X, target=Y), {"x": X}, Y),
        ({"x": X}, {"x": X}, None),
    ],
)
def test_batches_in_any_form(batch: Any, inputs: Any, target: Any) -> None:
    parts = inputs_and_target(batch)
    assert parts is not None
    assert type(parts[0]) is type(inputs)
    assert parts[1] is target
    assert all(a is b for a, b in zip(Arguments.of(parts[0]).tensors, Arguments.of(inputs).tensors, strict=True))


@pytest.mark.parametrize("batch", [None, "text", 3, (), [], {}])
def test_what_is_no_batch(batch: Any) -> None:
    assert inputs_and_target(batch) is None


def test_the_prediction_of_a_nested_output() -> None:
    one, many = torch.tensor(1.0), torch.ones(2, 3)
    for output in (many, (many, one), (one, many), {"loss": one, "out": many}, Output(one, many), [[many]]):
        assert prediction(output) is many
    assert prediction({"hidden": torch.zeros(2, 3), "logits": many}) is many
    assert prediction("text") == "text"


@pytest.mark.parametrize(
    ("output", "target", "axis"),
    [
        ((4, 3), (4,), 1),
        ((4, 5, 3), (4, 5), 2),
        ((4, 3, 5), (4, 5), 1),
        ((4, 5, 5), (4, 5), 2),  # both fit: tokens
        ((4, 3, 6, 6), (4, 6, 6), 1),
        ((4, 6, 6, 3), (4, 6, 6), 3),
        ((4, 6, 6, 6), (4, 6, 6), 1),  # both fit: an image
        ((4, 3), (4, 3), None),
        ((4, 3), (5,), None),
        ((4,), (), None),
    ],
)
def test_the_axis_of_the_classes(output: tuple[int, ...], target: tuple[int, ...], axis: int | None) -> None:
    logits, indices = torch.zeros(output), torch.zeros(target).long()
    assert class_axis(logits, indices) == axis
    assert class_axis(logits, indices.float()) is None
    assert class_axis(logits, indices.bool()) is None
    if axis is not None:
        assert classes_last(logits, indices).shape == (*target, output[axis])


def test_cross_entropy_is_torchs_wherever_the_classes_are() -> None:
    logits, target = torch.randn(4, 3, 6, 5, generator=DRAWN), torch.randint(3, (4, 6, 5), generator=DRAWN)
    target[0, 0] = -100
    wanted = functional.cross_entropy(logits, target)
    cross_entropy = loss_named("cross_entropy")
    torch.testing.assert_close(cross_entropy(logits, target), wanted)
    torch.testing.assert_close(cross_entropy(logits.movedim(1, -1), target.int()), wanted)
    torch.testing.assert_close(cross_entropy(Output(None, logits), target.where(target >= 0, -1)), wanted)


@pytest.mark.parametrize(
    ("name", "torchs"),
    [
        ("mse", functional.mse_loss),
        ("l1", functional.l1_loss),
        ("huber", functional.huber_loss),
        ("bce_with_logits", functional.binary_cross_entropy_with_logits),
    ],
)
def test_elementwise_losses_are_torchs(name: str, torchs: Callable[[Tensor, Tensor], Tensor]) -> None:
    output, target = torch.randn(6, 1, generator=DRAWN), torch.randint(2, (6,), generator=DRAWN)
    for given, wanted in ((output, target), (output, target[:, None]), (output[:, 0], target[:, None].bool())):
        torch.testing.assert_close(loss_named(name)(given, wanted), torchs(output[:, 0], target.float()))
    with pytest.raises(AutopruneError, match=rf"{name} takes targets of the output's shape; targets are .*\(5,\)"):
        loss_named(name)(output, target[:5])


def test_the_models_own_loss() -> None:
    one = torch.tensor(2.0)
    assert loss_named("model")({"loss": one}, None) is one
    assert loss_named("model")(Output(one, X), Y) is one
    with pytest.raises(AutopruneError, match="which a Tensor has not"):
        loss_named("model")(X, Y)


def test_accuracy_of_classes_tokens_maps_and_labels() -> None:
    logits = torch.eye(3)
    assert scored(accuracy, (logits, torch.tensor([0, 1, 0]))) == pytest.approx(2 / 3)
    assert scored(accuracy, (logits, torch.tensor([0, -100, 0]))) == pytest.approx(1 / 2)
    assert scored(accuracy, (logits[None], torch.tensor([[0, 1, 2]])), (logits, torch.tensor([2, 1, 2]))) == 5 / 6
    assert scored(accuracy, (torch.tensor([[1.0], [-1.0]]), torch.tensor([1.0, 1.0]))) == 0.5
    maps = torch.zeros(1, 2, 2, 2)
    maps[:, 1, 0] = 1
    assert scored(accuracy, (maps, torch.tensor([[[1, 1], [1, 0]]]))) == 0.75


def test_iou_is_the_mean_over_classes_of_all_batches_together() -> None:
    def one_hot(classes: list[int]) -> Tensor:
        return functional.one_hot(torch.tensor([classes]), 4).movedim(-1, 1).float()[..., None]

    first = one_hot([0, 0, 1, 1]), torch.tensor([[0, 1, 1, 1]])[..., None]
    second = one_hot([1, 0]), torch.tensor([[1, -100]])[..., None]
    assert scored(iou, first, second) == pytest.approx((1 / 2 + 3 / 4) / 2), "classes 2 and 3 are nowhere"


def test_f1_counts_all_labels_together() -> None:
    logits, labels = torch.tensor([[1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]), torch.tensor([[1, 0, 1], [0, 0, 1]])
    assert scored(f1, (logits, labels)) == pytest.approx(2 * 2 / (3 + 3))
    assert scored(f1, (-torch.ones(1, 2), torch.zeros(1, 2))) == 1.0


def test_errors_are_means_over_all_values() -> None:
    batches = (torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 0.0])), (torch.tensor([[3.0]]), torch.tensor([0.0]))
    assert scored(mse, *batches) == pytest.approx(14 / 3)
    assert scored(rmse, *batches) == pytest.approx(math.sqrt(14 / 3))
    assert target_variance([(X, torch.tensor([0.0])), (X, torch.tensor([2.0]))]) == 1.0


def test_bits_and_perplexity_of_a_uniform_guess() -> None:
    batch = torch.zeros(2, 5, 8), torch.tensor([[0, 1, 2, 3, -100]] * 2)
    assert scored(bits, batch) == pytest.approx(3.0)
    assert scored(perplexity, batch) == pytest.approx(8.0)


def test_fidelity_is_r_squared() -> None:
    target = torch.randn(8, 3, generator=DRAWN)
    assert scored(fidelity, (target, target)) == 1.0
    assert scored(fidelity, (target.mean().expand(8, 3), target)) == pytest.approx(0.0, abs=1e-6)
    halves = (target[:4] + 1, target[:4]), (target[4:] + 1, target[4:])
    assert scored(fidelity, *halves) == pytest.approx(1 - 1 / float(target.var(correction=0)), rel=1e-5)


@pytest.mark.parametrize("name", list(EVALUATIONS))
def test_every_evaluation_refuses_no_data_and_what_does_not_fit(name: str) -> None:
    row = evaluation(name)
    with pytest.raises(AutopruneError, match="no data to evaluate on"):
        row.figure(Fixed(), [])
    with pytest.raises(AutopruneError, match=r"takes .*; targets are float32 of shape \(5,\), the model gave"):
        row.figure(Fixed(), [(torch.zeros(4, 3), torch.zeros(5))])
    assert row.metric.factor < 0 or row.metric.unit == "%"


def test_names_that_do_not_exist() -> None:
    assert "mse" in LOSSES
    with pytest.raises(ConfigError, match=r"unknown loss 'cross_entrop'\. Did you mean 'cross_entropy'"):
        loss_named("cross_entrop")
    with pytest.raises(ConfigError, match="unknown evaluation"):
        evaluation("mse_loss")
    assert evaluation("accuracy").metric is ACCURACY
    assert Choice("mse").name in EVALUATIONS


def test_mapped_batches_are_as_many_and_begin_anew() -> None:
    batches = MappedBatches([(X, Y), (X + 1, Y)], lambda inputs, target: (inputs * 2, target))
    assert len(batches) == 2
    for _ in range(2):
        assert [float(x.sum()) for x, _ in batches] == [0.0, 12.0]
    with pytest.raises(TypeError):
        len(MappedBatches(iter([]), lambda inputs, target: (inputs, target)))


def test_distillation_reads_nested_outputs_and_classes_of_maps() -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"aux": x.sum(), "logits": x}

    settings = TrainingSettings(distillation_weight=0.5)
    maps, target = torch.randn(2, 3, 4, 4, generator=DRAWN), torch.randint(3, (2, 4, 4), generator=DRAWN)
    nested = Distillation(Fixed(), loss_named("cross_entropy"), settings, [Nested()])
    plain = Distillation(Fixed(), loss_named("cross_entropy"), settings, [Fixed()])
    student = maps.roll(1, 0)
    flat, teacher = (x.movedim(1, -1).flatten(0, 2) for x in (student, maps))
    wanted = plain(flat, teacher, target.flatten())
    torch.testing.assert_close(nested({"aux": maps.sum(), "logits": student}, maps, target), wanted)
    torch.testing.assert_close(plain(student, maps, target), wanted)
