"""The stages that apply a plan: the dense model pruned by it, fine-tuned, and repacked.

As in `preparation`, each stage is a function to a frozen result; `AppliedPlan` does each once for its plan. A changed
plan is another `AppliedPlan`.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import nn

from autoprune.errors import FileError, NumericalError
from autoprune.evaluation.dense import other_dense_models
from autoprune.evaluation.evaluator import Evaluator
from autoprune.evaluation.recovery import Subject
from autoprune.evaluation.recovery.finetune import finetune_
from autoprune.files import read_tensors, write_tensors
from autoprune.identity.digest import digest
from autoprune.latency.timer import torch_threads
from autoprune.pipeline.preparation import Context, Preparation, Prepared
from autoprune.plan import Plan
from autoprune.progress import Progress
from autoprune.quantization import dequantize_
from autoprune.repack import RepackedModel, load, repack, save
from autoprune.report.tensorboard import TrialWriter
from autoprune.settings import TrainingSettings
from autoprune.training import TRAINING

MADE_FOR = "made_for"  # in a model's file: the run and the plan it is of, as `made_for` gives them
_PRUNED, _MASKED = "pruned.safetensors", "masked.safetensors"
REPACKED = "repacked.safetensors"
SHRUNK = "shrunk.safetensors"  # once a user asks for it
_OUTCOMES = (
    _MASKED,
    SHRUNK,
    REPACKED,
    "results.json",
    "report.json",
    "report.html",
    "report.md",
)  # each is made of one before it


TRAININGS = 3  # of one plan, until one does not diverge
SLOWER = 0.25  # of the learning rate, after each that did


@dataclass(frozen=True)
class Pruned:
    """The dense model under the plan's masks, recovered as in the search, not fine-tuned."""

    plan: Plan
    model: nn.Module


@dataclass(frozen=True)
class FineTuned:
    """The masked model, fine-tuned by the plan's method, or as post-training pruning leaves it."""

    plan: Plan
    model: nn.Module


@dataclass(frozen=True)
class Repacked:
    """The fast model of a fine-tuned one, its backends chosen by measurement on this machine."""

    plan: Plan
    model: RepackedModel


def made_for(context: Context, plan: Plan) -> str:
    """What tells a model of this run and a plan from any other; the directory must be claimed."""
    return digest(context.claim.key, plan.key)


def is_complete(context: Context, plan: Callable[[], Plan]) -> bool:
    """Whether the report is there, and of the plan that is there, which is only asked for where it has to be."""
    if not all((context.directory / name).exists() for name in ("report.md", _MASKED, "plan.json")):
        return False
    _, about = read_tensors(context.directory / _MASKED, "the saved model")
    return bool(about.get(MADE_FOR) == made_for(context, plan()))


def load_pruned(context: Context, prepared: Prepared, plan: Plan) -> Pruned | None:
    """What `prune` saved; None when there is none of this plan."""
    model = _loaded(context, _PRUNED, prepared, plan, trained=context.choices.recovery.trains)
    return None if model is None else Pruned(plan, model)


def prune(context: Context, evaluator: Evaluator, plan: Plan) -> Pruned:
    """Masks the dense model by the plan, recovers it as the search did, and saves it.

    Raises:
        NumericalError: the recovery diverged.
    """
    model = evaluator.masked_model(plan)
    write_tensors(context.directory / _PRUNED, model.state_dict(), {MADE_FOR: made_for(context, plan)})
    return Pruned(plan, model)


def load_fine_tuned(context: Context, prepared: Prepared, plan: Plan) -> FineTuned | None:
    """What `fine_tune` saved; None when there is none of this plan."""
    model = _loaded(context, _MASKED, prepared, plan, trained=True)
    return None if model is None else FineTuned(plan, model)


def fine_tune(context: Context, subject: Subject, plan: Plan) -> FineTuned:
    """Trains the dense model to the plan by the plan's method, or goes on training, and saves it.

    What will run in int8 is fake-quantised in the later part of the training, and learns to bear what bytes lose.

    Args:
        context: of the run.
        subject: the dense model; with the latency table where its budget is latency.
        plan: applied.

    Raises:
        NumericalError: it diverged again and again.
    """
    settings, checkpoint = subject.settings.changed(plan.settings), context.directory / "finetune"
    teachers = _other_teachers(context, settings)
    with torch_threads(context.work_threads), TrialWriter(context.directory / "tensorboard" / "finetune") as writer:
        for attempt in range(1, TRAININGS + 1):
            model = copy.deepcopy(subject.dense)
            rate = settings.learning_rate * SLOWER ** (attempt - 1)
            try:
                finetune_(
                    model,
                    replace(plan, settings={**plan.settings, "learning_rate": rate}),
                    subject,
                    subject.settings,
                    teachers=teachers,
                    checkpoint=checkpoint,
                    progress=context.progress,
                    title="fine-tuning",
                    on_signals=lambda step, signals: writer.training(step, signals.scalars, signals.histograms),
                    precision=subject.precision,
                )
                break
            except NumericalError as error:
                if attempt == TRAININGS:
                    raise
                context.progress.say(f"fine-tuning diverged ({error}): again, at {SLOWER:g} of the learning rate")
                shutil.rmtree(checkpoint, ignore_errors=True)
    dequantize_(model.eval())  # what is kept is plain: repacking finds the same grids on the same calibration data
    _remove_after(context.directory, _MASKED)
    write_tensors(context.directory / _MASKED, model.state_dict(), {MADE_FOR: made_for(context, plan)})
    shutil.rmtree(checkpoint, ignore_errors=True)
    return FineTuned(plan, model)


def recover(context: Context, subject: Subject, plan: Plan) -> FineTuned:
    """Has the run's recovery prune the dense model by the plan, in the place of fine-tuning, and saves it.

    Raises:
        NumericalError: the data, or what layers read on it, is not finite.
    """
    model = copy.deepcopy(subject.dense)
    with torch_threads(context.work_threads):
        context.choices.recovery.recover_(model, plan, replace(subject, progress=context.progress))
    _remove_after(context.directory, _MASKED)
    write_tensors(context.directory / _MASKED, model.eval().state_dict(), {MADE_FOR: made_for(context, plan)})
    return FineTuned(plan, model)


def adopt_fine_tuned(context: Context, folder: Path) -> None:
    """Takes what `fine_tune` saved in another folder of the same run, of a plan that is to be the run's."""
    tensors, about = read_tensors(folder / _MASKED, "the saved model")
    _remove_after(context.directory, _MASKED)
    write_tensors(context.directory / _MASKED, tensors, about)


def keep_dense(context: Context, prepared: Prepared, plan: Plan) -> FineTuned:
    """Saves the dense model in the place of a fine-tuned one: a plan that cuts nothing has nothing to train for."""
    model = copy.deepcopy(prepared.dense).eval()
    _remove_after(context.directory, _MASKED)
    write_tensors(context.directory / _MASKED, model.state_dict(), {MADE_FOR: made_for(context, plan)})
    return FineTuned(plan, model)


def _other_teachers(context: Context, settings: TrainingSettings) -> Sequence[nn.Module]:
    """The dense models of other seeds that fine-tuning distils from, beside the run's own."""
    config = context.config
    if config.finetune.teachers == 1 or settings.distillation_weight == 0:
        return []
    return other_dense_models(config.task, config.dense, config.seed, config.finetune.teachers - 1, context.progress)


def load_repacked(context: Context, prepared: Prepared, plan: Plan) -> Repacked | None:
    """What `repack_fine_tuned` saved; None when there is none. The fine-tuned model must be of this plan."""
    path = context.directory / REPACKED
    return Repacked(plan, load(path, _untrained(context, prepared, plan))) if path.exists() else None


def repack_fine_tuned(context: Context, prepared: Prepared, fine_tuned: FineTuned) -> Repacked:
    """Repacks a fine-tuned model and saves it; values that the file rounds are rounded in the model too."""
    latency, path, plan = context.config.latency, context.directory / REPACKED, fine_tuned.plan
    precision = plan.precision_in(context.config.precision)
    with torch_threads(latency.threads):
        model = repack(
            fine_tuned.model,
            prepared.task.example_inputs(latency.batch),
            precision=precision,
            calibration=prepared.task.calibration_inputs(precision),
            protocol=context.protocol(latency.search_samples),
            clock=context.clock,
        )
    value_bits = context.config.repack.value_bits
    _remove_after(context.directory, REPACKED)
    save(model, path, value_bits=value_bits)
    return Repacked(plan, model if value_bits == 32 else load(path, _untrained(context, prepared, plan)))


def _untrained(context: Context, prepared: Prepared, plan: Plan) -> nn.Module:
    """The architecture that fine-tuning gives: the task's, or wider where the plan's method widens it."""
    model = copy.deepcopy(prepared.task.model)
    if not context.config.finetune.post_training:
        inputs = prepared.task.example_inputs(context.config.latency.batch)
        TRAINING.create(plan.training).widen_(model, inputs, plan)
    return model


def _remove_after(directory: Path, name: str) -> None:
    """Removes what was made from the file that is about to be made anew."""
    for later in _OUTCOMES[_OUTCOMES.index(name) + 1 :]:
        (directory / later).unlink(missing_ok=True)


def _loaded(context: Context, name: str, prepared: Prepared, plan: Plan, *, trained: bool) -> nn.Module | None:
    """The model of a file; `trained`: the plan's method trained it."""
    path = context.directory / name
    if not path.exists():
        return None
    model = _untrained(context, prepared, plan) if trained else copy.deepcopy(prepared.task.model)
    return load_model(path, model, made_for(context, plan), context.progress)


def load_model(path: Path, model: nn.Module, key: str, progress: Progress) -> nn.Module | None:
    """Fills a model from a file of a run.

    Args:
        path: of the file.
        model: of the same architecture; its values are replaced in place.
        key: `made_for` of the run and the plan.
        progress: told where the file is of another.

    Returns:
        The model in eval mode; None where the file is of another plan or run.

    Raises:
        FileError: the file is missing, corrupt, or of another architecture.
    """
    tensors, about = read_tensors(path, "the saved model")
    if about.get(MADE_FOR) != key:
        progress.say(f"{path} is of another plan or run: it is made anew")
        return None
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise FileError(
            f"the saved model {path} does not fit the task ({error}). Delete it to redo its stage."
        ) from None
    return model.eval()


class AppliedPlan:
    """A plan and the results of these stages, each loaded or made when it is first asked for, and once.

    Args:
        context: of the run.
        preparation: the stages before the search.
        plan: its layers are the model's.
    """

    def __init__(self, context: Context, preparation: Preparation, plan: Plan) -> None:
        self._context, self._preparation, self.plan = context, preparation, plan

    @cached_property
    def pruned(self) -> Pruned:
        found = load_pruned(self._context, self._preparation.prepared, self.plan)
        return found or prune(self._context, self._preparation.evaluator, self.plan)

    @cached_property
    def fine_tuned(self) -> FineTuned:
        before = self._preparation
        if found := load_fine_tuned(self._context, before.prepared, self.plan):
            return found
        if all(layer.whole for layer in self.plan.layers.values()):
            return keep_dense(self._context, before.prepared, self.plan)
        subject = before.subject
        if self._context.config.finetune.post_training:
            return recover(self._context, subject, self.plan)
        if subject.budget == "latency":
            subject = before.evaluator.subject  # with the table, which takes a while
        return fine_tune(self._context, subject, self.plan)

    @cached_property
    def repacked(self) -> Repacked:
        fine_tuned = self.fine_tuned  # first: where it is made anew, what was repacked before is removed
        found = load_repacked(self._context, self._preparation.prepared, self.plan)
        return found or repack_fine_tuned(self._context, self._preparation.prepared, fine_tuned)
