"""A plan's training: its method, its settings and its budget, wherever a plan is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from autoprune.allocation import Cost, MacsCost, WeightCost
from autoprune.errors import AutopruneError
from autoprune.evaluation.recovery.base import Subject
from autoprune.latency.cost import LatencyCost
from autoprune.model.inventory import Inventory
from autoprune.plan import Plan
from autoprune.precision import ModelPrecision, RunPrecision
from autoprune.progress import SILENT, Progress
from autoprune.quantization import dequantize_
from autoprune.repack import CaptureError, find_readers, quantize_
from autoprune.settings import TrainingSettings
from autoprune.tasks.base import Task
from autoprune.training import TRAINING, OnSignals
from autoprune.training.loop import train_
from autoprune.training.widening import make_pruner_


def finetune_(
    model: nn.Module,
    plan: Plan,
    subject: Subject,
    settings: TrainingSettings,
    *,
    teachers: Sequence[nn.Module] = (),
    checkpoint: Path | None = None,
    progress: Progress = SILENT,
    title: str = "training",
    on_signals: OnSignals | None = None,
    precision: RunPrecision = "float32",
) -> None:
    """Trains `model`, a copy of the dense one, in place, by the plan's method and with its settings.

    For a precision of bytes it trains what will run: fake-quantised, from ``settings.quantize_from`` of the epochs on.
    The weights it is left with are plain and exact: ranges that are found for them anew do as well as the trained ones.

    Args:
        model: widened in place where the method widens.
        plan: its ``settings`` change those given.
        subject: the task and what the budget counts.
        settings: of the run.
        teachers: to distil from beside the dense model, where the settings distil.
        checkpoint: a folder that a killed run goes on from.
        progress: where the steps are shown.
        title: of the progress bar.
        on_signals: called now and then with the step and what the method shows of itself.
        precision: that the model will run in; ``planned``: each layer as the plan says.
    """
    task, settings = subject.task, settings.changed(plan.settings)
    method = TRAINING.create(plan.training)
    inputs = task.example_inputs(subject.inventory.layers[0].input_shape[0])
    pruner = make_pruner_(
        method, model, subject.inventory, plan, inputs, task.calibration, task.loss, budget_cost(subject, plan)
    )
    train_(
        model,
        task.train,
        task.loss,
        settings,
        seed=subject.seed,
        method=method,
        pruner=pruner,
        teachers=(subject.dense, *teachers),
        quantize_=_quantizing(task, inputs, plan.precision_in(precision)),
        checkpoint=checkpoint,
        progress=progress,
        title=title,
        on_signals=on_signals,
    )
    dequantize_(model)


def _quantizing(task: Task, inputs: tuple[Any, ...], precision: ModelPrecision) -> Callable[[nn.Module], object] | None:
    """What fake-quantises a model in training; None where no layer becomes bytes."""
    if precision == "float32" or precision == "bf16":
        return None
    calibration = task.positional_calibration()
    return partial(quantize_, example_inputs=inputs, calibration=calibration, precision=precision)


def budget_cost(subject: Subject, plan: Plan) -> Callable[[Inventory], Cost]:
    """What the subject's budget counts, for the layers of a model that may have been widened."""
    table = subject.table
    if subject.budget == "weights":
        return WeightCost
    if subject.budget == "macs":
        readers = channel_readers(subject.dense, subject.task.example_inputs(1), plan)
        return lambda inventory: MacsCost(inventory, readers)
    if table is None:
        raise AutopruneError("a budget in latency needs the latency table; profile first, or take 'weights'.")
    return lambda inventory: LatencyCost(table, plan, subject.inventory, inventory)


def channel_readers(model: nn.Module, inputs: tuple[Any, ...], plan: Plan) -> dict[str, str]:
    """Layer -> its one reader, where that is pruned by input channels: what it cuts, the layer need not compute.

    None where the model cannot be captured: then a cut channel counts in its reader alone.
    """
    try:
        readers = find_readers(model, inputs)
    except CaptureError:
        return {}
    layers = plan.layers
    return {name: by for name, by in readers.items() if by in layers and layers[by].pattern.name == "channel"}
