"""The only training loop: dense training, recovery, sparse training and distillation all run through `train_`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autoprune.errors import AutopruneError, NumericalError
from autoprune.latency.quiet import working
from autoprune.masks import Batches, Loss, Masks
from autoprune.model.arguments import call_with
from autoprune.model.given import called, check_loss, read
from autoprune.progress import SILENT, Progress
from autoprune.settings import TrainingSettings, learning_rate, make_optimizer
from autoprune.training.base import Pruner, Signals, SparseTraining
from autoprune.training.checkpoint import Checkpoint
from autoprune.training.distillation import Distillation, check_teachers

OnSignals = Callable[[int, Signals], None]
SIGNALS = 100  # a run


@dataclass(frozen=True)
class TrainingResult:
    """What a run did.

    Attributes:
        losses: mean training loss of each epoch, those before a resume included.
        masks: what the method cut; None without a method.
        epochs: epochs trained, the last perhaps cut short by `max_steps`.
        steps: optimizer steps.
    """

    losses: tuple[float, ...]
    masks: Masks | None
    epochs: int
    steps: int


def train_(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    settings: TrainingSettings,
    *,
    seed: int,
    method: SparseTraining | None = None,
    pruner: Pruner | None = None,
    teachers: Sequence[nn.Module] = (),
    checkpoint: Path | None = None,
    progress: Progress = SILENT,
    title: str = "training",
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
    on_signals: OnSignals | None = None,
) -> TrainingResult:
    """Trains `model` in place; the global random state and the model's mode are left as they were.

    Each epoch's randomness comes from (seed, epoch) alone, so a run resumed from its checkpoint ends with the very
    weights of an uninterrupted one.

    Args:
        model: the model; with a method, `pruner.model` is this same one.
        batches: a re-iterable of ``(inputs, target)``; inputs a tensor or a tuple.
        loss: ``loss(model(*inputs), target)`` is a scalar.
        settings: epochs, learning rate and so on.
        seed: of shuffling, augmentation and dropout (torch's global generator).
        method: prunes while training; needs `pruner`.
        pruner: the plan the method reaches.
        teachers: models to distil from; needed when ``settings.distillation_weight > 0``, unless
            ``settings.ema_teacher`` is set, and unused at 0.
        checkpoint: a folder written after each epoch and resumed from; whoever names it removes it.
        progress: where the steps are shown.
        title: of the progress bar.
        on_epoch: called after each epoch, counted from 1, with its loss and last learning rate.
        on_signals: called about a hundred times a run with the step and what the method shows of itself.

    Raises:
        AutopruneError: `batches` cannot be iterated again, or arguments do not go together.
        NumericalError: the loss diverged.
        GivenError: a batch cannot be read or trained on, or the loss is none; the message has the batch's number.
        FileError: the checkpoint is corrupt or of another run.
    """
    _check_arguments(model, method, pruner)
    check_teachers(model, settings, teachers)
    per_epoch = count_batches(batches)
    all_steps = settings.epochs * per_epoch
    total_steps = min(all_steps, settings.max_steps or all_steps)
    epochs = math.ceil(total_steps / per_epoch)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(parameters, settings)
    run = {"seed": seed, "settings": settings.to_json(), "batches": per_epoch}
    run |= {"teachers": len(teachers) if settings.distillation_weight > 0 else 0}
    run |= {"method": type(method).__name__, "plan": pruner.plan.key if method and pruner else None}

    with _kept_as_it_was(model, *teachers), progress.bar(title, total_steps) as bar:
        torch.manual_seed(epoch_seed(seed, 0))
        if method and pruner:
            method.start(pruner, total_steps)
        distillation = Distillation(model, loss, settings, teachers) if settings.distillation_weight > 0 else None
        average = distillation.average if distillation else None
        saved = Checkpoint(checkpoint, run, model, optimizer, method, average) if checkpoint else None
        losses = saved.load_() if saved else []
        bar.advance(min(len(losses) * per_epoch, total_steps))

        for epoch in range(len(losses) + 1, epochs + 1):
            torch.manual_seed(epoch_seed(seed, epoch))
            model.train()
            first = step = (epoch - 1) * per_epoch
            epoch_loss = 0.0
            for number, inputs, target in islice(read(batches, "the training data"), total_steps - first):
                step += 1
                failed = f"batch {number} of epoch {epoch} cannot be trained on"
                rate = learning_rate(settings, step, total_steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                with working():  # a timing of another run may come between two steps
                    with called(failed):
                        output = call_with(model, inputs)
                        value = distillation(output, inputs, target) if distillation else loss(output, target)
                        check_loss(value)
                    _check_finite(value, step, total_steps, rate)
                    optimizer.zero_grad()
                    with called(failed):
                        value.backward()
                    if settings.clip_norm is not None:
                        nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
                    if method:
                        method.before_step(step)
                    optimizer.step()
                    if method:
                        method.after_step(step)
                        if on_signals and (step % max(1, total_steps // SIGNALS) == 0 or step == total_steps):
                            on_signals(step, method.signals())
                    if distillation:
                        distillation.after_step(step)
                epoch_loss += value.item()
                bar.advance(1, f"loss {value.item():.3f}")
            _check_count(step - first, min(per_epoch, total_steps - first), epoch)
            losses.append(epoch_loss / (step - first))
            if saved:
                saved.save(losses)
            if on_epoch:
                on_epoch(epoch, {"loss": losses[-1], "learning_rate": rate})
        optimizer.zero_grad()
        _check_weights(parameters, total_steps)
        return TrainingResult(tuple(losses), method.finish() if method else None, epochs, total_steps)


def count_batches(batches: Batches) -> int:
    """Batches of one pass: their ``len`` where they have one, else counted by iterating.

    Raises:
        AutopruneError: there are none, or `batches` is an iterator that a second epoch would find exhausted.
    """
    if isinstance(batches, Iterator):
        raise AutopruneError(
            f"batches must be iterable again every epoch, but this {type(batches).__name__} can be read once only. "
            "Give a list, a DataLoader, or an object whose __iter__ starts anew."
        )
    try:
        count = len(batches)  # type: ignore[arg-type]
    except TypeError:
        with torch.random.fork_rng(devices=[]):  # a loader draws when it is iterated
            count = sum(1 for _ in read(batches, "the training data"))
    if count == 0:
        raise AutopruneError("there are no batches to train on: the data is empty, or smaller than one batch.")
    return count


def epoch_seed(seed: int, epoch: int) -> int:
    """The torch seed of an epoch: unrelated streams for neighbouring seeds and epochs. Epoch 0 is the start."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:8]) >> 1


def recalibrate_batch_norm_(model: nn.Module, batches: Batches) -> nn.Module:
    """Recomputes every running mean and variance as the plain average over `batches`; weights stay as they are.

    The statistics of a pruned model are not the dense one's (Li et al. 2020, EagleEye). A model without batch norm is
    not even run. Modes and momenta are left as they were.

    Raises:
        AutopruneError: `batches` is empty.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return model
    training = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    model.eval()  # dropout must not disturb what the norms see
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    seen = 0
    try:
        with torch.no_grad():
            for seen, inputs, _ in read(batches, "the calibration data"):
                with called(f"the model does not run on batch {seen} of the calibration data"):
                    call_with(model, inputs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in training.items():
            module.training = mode
    if seen == 0:
        raise AutopruneError("batch norm cannot be recalibrated on no batches; give at least one.")
    return model


@contextmanager
def _kept_as_it_was(model: nn.Module, *teachers: nn.Module) -> Iterator[None]:
    modules = [module for whole in (model, *teachers) for module in whole.modules()]
    modes = [module.training for module in modules]
    for teacher in teachers:
        teacher.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _check_arguments(model: nn.Module, method: SparseTraining | None, pruner: Pruner | None) -> None:
    if (method is None) != (pruner is None):
        raise AutopruneError("a training method and a pruner go together: give both, or neither to train densely.")
    if pruner is not None and pruner.model is not model:
        raise AutopruneError("the pruner was made for another model: build it from the model that is trained.")


def _check_finite(value: Tensor, step: int, total_steps: int, rate: float) -> None:
    if not math.isfinite(value.item()):
        raise NumericalError(
            f"training diverged: the loss is {value.item()} at step {step} of {total_steps}, learning rate {rate:.3g}. "
            "Lower learning_rate, raise warmup, or set clip_norm; if this is step 1, look for NaN in the data."
        )


def _check_weights(parameters: Sequence[nn.Parameter], total_steps: int) -> None:
    """The last step's loss was computed before it."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        raise NumericalError(
            f"training diverged: weights are not finite after step {total_steps}, the last one. Lower learning_rate, "
            "raise warmup, or set clip_norm."
        )


def _check_count(counted: int, expected: int, epoch: int) -> None:
    if counted != expected:
        raise AutopruneError(
            f"epoch {epoch} gave {counted} batches where {expected} were expected: batches must give as many as "
            "their len, again every epoch."
        )
