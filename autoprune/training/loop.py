"""The only training loop: dense training, recovery, sparse training and distillation all run through `train_`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError, NumericalError
from autoprune.latency.quiet import working
from autoprune.masks import Batches, Loss, Masks
from autoprune.model.arguments import call_with
from autoprune.model.given import called, check_loss, read
from autoprune.model.inventory import own_modes
from autoprune.progress import SILENT, Bar, Progress
from autoprune.settings import TrainingSettings, learning_rate, make_optimizer
from autoprune.training.base import Pruner, Signals, SparseTraining
from autoprune.training.checkpoint import Checkpoint
from autoprune.training.distillation import Distillation, check_teachers

OnSignals = Callable[[int, Signals], None]
OnEpoch = Callable[[int, dict[str, float]], None]
Quantize = Callable[[nn.Module], object]
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
    quantize_: Quantize | None = None,
    checkpoint: Path | None = None,
    progress: Progress = SILENT,
    title: str = "training",
    on_epoch: OnEpoch | None = None,
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
        quantize_: fake-quantises the model: called once, before the first epoch that ``settings.quantize_from`` lets be
            quantised; the model is left so.
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
    lengths = _Lengths.of(settings, count_batches(batches))
    trainer = _Trainer(model, loss, settings, lengths.steps, method, on_signals, quantize_)
    with _kept_as_it_was(model, *teachers), progress.bar(title, lengths.steps) as bar:
        torch.manual_seed(epoch_seed(seed, 0))
        trainer.start(pruner, teachers)
        saved = trainer.checkpoint(checkpoint, seed, lengths, pruner, teachers)
        losses = _train_epochs_(trainer, batches, lengths, seed, saved, bar, on_epoch)
        return TrainingResult(tuple(losses), method.finish() if method else None, lengths.epochs, lengths.steps)


@dataclass(frozen=True)
class _Lengths:
    """How long a run is: steps of a whole epoch, epochs (the last perhaps cut short) and optimizer steps in all."""

    epoch: int
    epochs: int
    steps: int

    @classmethod
    def of(cls, settings: TrainingSettings, per_epoch: int) -> _Lengths:
        """Of a run on `per_epoch` batches."""
        whole = settings.epochs * per_epoch
        steps = min(whole, settings.max_steps or whole)
        return cls(per_epoch, math.ceil(steps / per_epoch), steps)


class _Trainer:
    """Takes optimizer steps."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        settings: TrainingSettings,
        total_steps: int,
        method: SparseTraining | None,
        on_signals: OnSignals | None,
        quantize_: Quantize | None,
    ) -> None:
        self.model, self.loss, self.settings, self.total_steps = model, loss, settings, total_steps
        self.method, self.on_signals, self.quantize_ = method, on_signals, quantize_
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(self.parameters, settings)
        self.distillation: Distillation | None = None

    def start(self, pruner: Pruner | None, teachers: Sequence[nn.Module]) -> None:
        """Before the first step; the method may cut already."""
        if self.method and pruner:
            self.method.start(pruner, self.total_steps)
        if self.settings.distillation_weight > 0:
            self.distillation = Distillation(self.model, self.loss, self.settings, teachers)

    def checkpoint(
        self, folder: Path | None, seed: int, lengths: _Lengths, pruner: Pruner | None, teachers: Sequence[nn.Module]
    ) -> Checkpoint | None:
        """What keeps this run in `folder`; after `start`."""
        run = {"seed": seed, "settings": self.settings.to_json(), "batches": lengths.epoch}
        run |= {"teachers": len(teachers) if self.distillation else 0, "quantized": self.quantize_ is not None}
        run |= {"method": type(self.method).__name__, "plan": pruner.plan.key if self.method and pruner else None}
        average = self.distillation.average if self.distillation else None
        return Checkpoint(folder, run, self.model, self.optimizer, self.method, average) if folder else None

    def take(self, step: int, inputs: Any, target: Any, failed: str) -> float:
        """Takes `step`, counted from 1, and returns its loss; `failed` begins the message of a GivenError."""
        rate = learning_rate(self.settings, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with working():  # a timing of another run may come between two steps
            with called(failed):
                output = call_with(self.model, inputs)
                if self.distillation:
                    self.distillation.weight = self._distillation_weight
                value = self.distillation(output, inputs, target) if self.distillation else self.loss(output, target)
                check_loss(value)
            _check_finite(value, step, self.total_steps, rate)
            if self.method:
                self.method.see_loss(value.item())
            self.optimizer.zero_grad()
            with called(failed):
                value.backward()
            if self.settings.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
            self._update_(step)
        return value.item()

    @property
    def _distillation_weight(self) -> float:
        factor = 1.0 if self.method is None else self.method.distillation_factor
        return min(1.0, factor * self.settings.distillation_weight)

    def end(self, total_steps: int) -> None:
        """After the last step; raises NumericalError where it diverged."""
        self.optimizer.zero_grad()
        _check_weights(self.parameters, total_steps)

    def _update_(self, step: int) -> None:
        """The optimizer's step, and what follows it."""
        if self.method:
            self.method.before_step(step)
        self.optimizer.step()
        if self.method:
            self.method.after_step(step)
            if self.on_signals and (step % max(1, self.total_steps // SIGNALS) == 0 or step == self.total_steps):
                self.on_signals(step, self.method.signals())
        if self.distillation:
            self.distillation.after_step(step)


def _train_epochs_(
    trainer: _Trainer,
    batches: Batches,
    lengths: _Lengths,
    seed: int,
    saved: Checkpoint | None,
    bar: Bar,
    on_epoch: OnEpoch | None,
) -> list[float]:
    """All epochs that are not done yet; returns the mean loss of each, those before a resume included."""
    losses = saved.load_() if saved else []
    bar.advance(min(len(losses) * lengths.epoch, lengths.steps))
    while len(losses) < lengths.epochs:
        _train_epoch_(trainer, batches, lengths, seed, losses, bar)
        if saved:
            saved.save(losses)
        if on_epoch:
            rate = learning_rate(trainer.settings, min(len(losses) * lengths.epoch, lengths.steps), lengths.steps)
            on_epoch(len(losses), {"loss": losses[-1], "learning_rate": rate})
    trainer.end(lengths.steps)
    return losses


class SteppedTraining:
    """A training of `train_` that its caller takes epoch by epoch, and can save and go on with between two of them.

    It ends with the very weights of `train_`, whose arguments these are. Between two epochs the global random state and
    the model's mode are the caller's.

    Attributes:
        losses: mean training loss of each epoch so far.
        epochs: of the whole training.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        loss: Loss,
        settings: TrainingSettings,
        *,
        seed: int,
        method: SparseTraining | None = None,
        pruner: Pruner | None = None,
        teachers: Sequence[nn.Module] = (),
    ) -> None:
        _check_arguments(model, method, pruner)
        check_teachers(model, settings, teachers)
        self._model, self._batches, self._seed = model, batches, seed
        self._pruner, self._teachers = pruner, tuple(teachers)
        self._lengths = _Lengths.of(settings, count_batches(batches))
        self._trainer = _Trainer(model, loss, settings, self._lengths.steps, method, None, None)
        self.losses: list[float] = []
        self.epochs = self._lengths.epochs
        with _kept_as_it_was(model, *teachers):
            torch.manual_seed(epoch_seed(seed, 0))
            self._trainer.start(pruner, teachers)

    def advance(self) -> float:
        """Trains one epoch and returns its mean loss; raises AutopruneError when all were taken, and as `train_`."""
        if len(self.losses) >= self.epochs:
            raise AutopruneError(f"all {self.epochs} epochs of this training were taken: make another one.")
        with _kept_as_it_was(self._model, *self._teachers):
            _train_epoch_(self._trainer, self._batches, self._lengths, self._seed, self.losses, Bar())
            if len(self.losses) == self.epochs:
                self._trainer.end(self._lengths.steps)
        return self.losses[-1]

    def save(self, folder: Path) -> None:
        """Writes the state after the last epoch into `folder`."""
        self._checkpoint(folder).save(self.losses)

    def load_(self, folder: Path) -> None:
        """Goes on from what `save` wrote, of a training made with the same arguments.

        Raises:
            FileError: there is none, or it is corrupt or of another training.
        """
        self.losses = self._checkpoint(folder).load_(must_exist=True)

    def _checkpoint(self, folder: Path) -> Checkpoint:
        saved = self._trainer.checkpoint(folder, self._seed, self._lengths, self._pruner, self._teachers)
        assert saved is not None
        return saved


def _train_epoch_(
    trainer: _Trainer, batches: Batches, lengths: _Lengths, seed: int, losses: list[float], bar: Bar
) -> None:
    """Trains the epoch that follows those of `losses`, the mean loss of each, and adds its own."""
    epoch = len(losses) + 1
    if trainer.quantize_ and epoch == 1 + math.floor(trainer.settings.quantize_from * lengths.epochs):
        trainer.quantize_(trainer.model)
    torch.manual_seed(epoch_seed(seed, epoch))
    trainer.model.train()
    before = (epoch - 1) * lengths.epoch
    expected, counted, epoch_loss = min(lengths.epoch, lengths.steps - before), 0, 0.0
    for number, inputs, target in islice(read(batches, "the training data"), lengths.steps - before):
        counted += 1
        failed = f"batch {number} of epoch {epoch} cannot be trained on"
        value = trainer.take(before + counted, inputs, target, failed)
        epoch_loss += value
        bar.advance(1, f"loss {value:.3f}")
    _check_count(counted, expected, epoch)
    losses.append(epoch_loss / counted)


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


@contextmanager
def _kept_as_it_was(model: nn.Module, *teachers: nn.Module) -> Iterator[None]:
    with own_modes(model, *teachers), torch.random.fork_rng(devices=[]):
        for teacher in teachers:
            teacher.eval()
        yield


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
