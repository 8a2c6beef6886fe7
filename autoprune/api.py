"""The verbs a user composes in Python. The command line calls these and prints what they say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from autoprune.agents.policy import SHIPPED, Policy
from autoprune.config import Config, parse_config
from autoprune.errors import AutopruneError, ConfigError
from autoprune.files import as_path, temporary_folder
from autoprune.masks import Batches, Loss
from autoprune.metric import ACCURACY, Metric
from autoprune.model.arguments import Arguments
from autoprune.model.copies import copy_for_inference, uncompiled_
from autoprune.pipeline.results import report_of
from autoprune.pipeline.run import Run
from autoprune.plan import Plan
from autoprune.progress import SILENT, Progress
from autoprune.quantization import check_plain
from autoprune.repack import RepackedModel
from autoprune.repack.kernels.compiler import refused
from autoprune.repack.report import Sealed
from autoprune.report.data import ResultRow
from autoprune.report.run_report import write_report
from autoprune.target import Target
from autoprune.tasks.base import Task
from autoprune.tasks.batches import first_batches
from autoprune.tasks.checks import check_model, check_training, unfreeze_
from autoprune.tasks.losses import loss_named
from autoprune.tasks.splits import Splits

CALIBRATION_BATCHES = 4


@dataclass(frozen=True)
class Compressed:
    """What `compress` returns.

    Attributes:
        model: the fast model, called like the original.
        plan: what was decided for each layer.
        rows: the final table.
        report: the whole report as markdown.
    """

    model: RepackedModel
    plan: Plan
    rows: tuple[ResultRow, ...]
    report: str


def compress(
    model: nn.Module,
    train: Batches,
    evaluate: Callable[[nn.Module], Any],
    example_inputs: Any,
    target: Target | float = 2.0,
    *,
    loss: Loss | str = functional.cross_entropy,
    metric: Metric = ACCURACY,
    config: Mapping[str, Any] | None = None,
    directory: Path | str | None = None,
    progress: Progress = SILENT,
) -> Compressed:
    """Prunes a trained model to a target and returns it repacked, with its report.

    Args:
        model: a trained module; left as it is. Its copy is trained: frozen layers too where they are pruned, and a
            model that is frozen as a whole, whole.
        train: re-iterable batches of ``(inputs, target)``, for calibration and fine-tuning; or in another form, see
            the guide "Any task".
        evaluate: model -> score, higher is better; a number of any kind, or a dictionary with one at the metric's name.
            Called once a trial, without gradients, for the most part with a repacked model: it can be called, no more.
        example_inputs: as the model is called, at the batch size latency matters for: a tensor, a tuple of them, or a
            mapping of keyword arguments that could be given by place. Batches hold their inputs in any of these forms.
        target: a `Target`, or the speed-up wanted over the best dense engine of this machine.
        loss: ``loss(model(*inputs), target)`` is a scalar; or a name, as of ``task.loss`` in a config: ``"none"``
            trains the model to do what the dense one does, without targets.
        metric: how a score reads; accuracy is a score in [0, 1].
        config: sections of a config that differ from the defaults, e.g. ``{"search": {"episodes": 50}}``.
        directory: where the run is kept and resumed from; one that was made with another model, other data or other
            functions is refused. A temporary folder when None.
        progress: where long work is shown.

    Raises:
        AutopruneError: bad input, a target out of reach, or a directory in use; the message says what to do. A model,
            data, a loss or an evaluation that cannot be used is refused before anything that takes long.
    """
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller's script is run under
        run = _given_run(model, train, evaluate, example_inputs, target, loss, metric, config, progress)
        if directory is not None:
            return _compressed(run(as_path(directory)))
        with temporary_folder() as folder:
            return _compressed(run(folder))


def _given_run(
    model: nn.Module,
    train: Batches,
    evaluate: Callable[[nn.Module], Any],
    example_inputs: Any,
    target: Target | float,
    loss: Loss | str,
    metric: Metric,
    config: Mapping[str, Any] | None,
    progress: Progress,
) -> Callable[[Path], Run]:
    """Checks what `compress` was given; returns the run of a directory."""
    wanted = target if isinstance(target, Target) else Target(speedup=_speedup(target))
    if not isinstance(config or {}, Mapping) or not isinstance((config or {}).get("latency", {}), Mapping):
        raise ConfigError(f"config is a dictionary of sections, which are dictionaries, not {config!r:.60}.")
    refused()  # torch must know before a model runs
    check_model(model)
    check_plain(model)
    dense = unfreeze_(uncompiled_(copy_for_inference(model)).cpu())  # torch.compile would compile each copy anew
    inputs = Arguments.of(example_inputs).positional(dense)
    if not inputs[0].dim():
        raise AutopruneError("the first example input must hold samples along its first axis: it is a single number.")
    chosen = wanted.to_json()
    sections = {"target": chosen, **(config or {}), "task": "given"}
    latency = {**sections.get("latency", {}), "batch": len(inputs[0])}
    parsed = parse_config({**sections, "latency": latency}, "compress")
    splits = Splits(train, (), (), train)
    if isinstance(loss, str):
        splits = splits.trained_by(loss, copy.deepcopy(dense).eval().requires_grad_(False))
        loss = loss_named(loss)
    check_training("train", dense, splits.train, loss)
    task = Task(
        name="given",
        model=dense,
        train=splits.train,
        calibration=first_batches(splits.calibration, CALIBRATION_BATCHES),
        validation=splits.validation,
        testing=splits.testing,
        loss=loss,
        dense_training=None,
        score=lambda candidate, _: evaluate(_lent(candidate)),
        metric=metric,
        examples=inputs,
    )
    return lambda directory: Run(parsed, directory, task=task, progress=progress)


def _speedup(target: Any) -> float:
    try:
        return float(target)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ConfigError(f"target is a speed-up, above 1, or an autoprune.Target, not {target!r:.60}.") from None


class _Lent(Sealed):
    """A copy of a model, in a form that forbids what a repacked one does.

    An evaluation that cannot be made of repacked models, as most are that it will get, fails at its first call.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(())
        self._hidden = _Hidden(copy.deepcopy(model).requires_grad_(False))
        self.eval()

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return self._hidden.model(*args, **kwargs)


@dataclass(frozen=True)
class _Hidden:
    """Keeps a module from being found as a part of another, and from being pickled, as a program is not."""

    model: nn.Module

    def __deepcopy__(self, memo: object) -> _Hidden:
        return self  # nothing changes it

    def __reduce__(self) -> str:
        raise AutopruneError("what evaluate is given is called, and is no pickle: most of its models are programs.")


def _lent(model: nn.Module) -> nn.Module:
    """What `evaluate` may do with as it likes: a program, which nothing changes, or what can do as little."""
    return model if isinstance(model, Sealed) else _Lent(model)


def _compressed(run: Run) -> Compressed:
    with closing(run.lock):
        try:
            run.settle()
            report = report_of(run)
            return Compressed(run.repacked, run.plan, report.rows, write_report(report))
        finally:
            run.preparation.mark_volatile_parts()


def apply_config(
    policy: Path | None,
    model: str,
    data: str,
    target: Target,
    episodes: int,
    overrides: Mapping[str, Any] | None = None,
    *,
    loss: str | None = None,
    evaluate: str | None = None,
    metric: str | None = None,
) -> Config:
    """The config of a run that applies a saved policy to a user's own model.

    Args:
        policy: the policy's folder; None takes the one that comes with autoprune.
        model: ``package.module:function`` returning the trained module.
        data: ``package.module:function`` returning ``(train_loader, validation_loader)``.
        target: what is asked for.
        episodes: 1 takes the policy's plan; more refine it.
        overrides: sections of the config that differ.
        loss: of the task: see `autoprune.tasks.user`.
        evaluate: likewise.
        metric: likewise.
    """
    learned = Policy.load(SHIPPED if policy is None else policy)
    actions = [{"name": choice.name, **choice.args} for choice in learned.actions]
    given = dict(overrides or {})
    env = {"actions": actions, "start": learned.start, "curves": learned.curves, **given.pop("env", {})}
    agent = {"name": "policy"} if policy is None else {"name": "policy", "path": str(policy)}
    search = {"agent": agent, "episodes": episodes, **given.pop("search", {})}
    named = {"loss": loss, "evaluate": evaluate, "metric": metric}
    task = {
        "name": "user",
        "model": model,
        "data": data,
        **{key: name for key, name in named.items() if name is not None},
    }
    sections = {
        "task": {**task, **given.pop("task", {})},
        "target": target.to_json(),
        "env": env,
        "search": search,
        **given,
    }
    return parse_config(sections, "apply")
