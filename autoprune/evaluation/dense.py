"""The dense model of a task: trained once, kept in the user's cache, loaded by later runs."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoprune.errors import ConfigError, FileError
from autoprune.files import cache_folder, check_cache, read_tensors, write_tensors
from autoprune.identity.claim import task_parts
from autoprune.identity.fingerprint import fingerprint
from autoprune.processes.locks import turn
from autoprune.progress import Progress
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.tasks import TASKS
from autoprune.tasks.base import Task
from autoprune.training.loop import train_
from autoprune.training.recipes import recipe_for
from autoprune.version import __version__


def dense_model(
    task: Task, choice: Choice, settings: TrainingSettings | None, seed: int, progress: Progress
) -> nn.Module:
    """Returns the task's dense model, trained: by the task itself, from the cache, or now.

    An interrupted training goes on from its last whole epoch; one that another process is at is waited for.
    """
    model = copy.deepcopy(task.model)
    if settings is None:
        return model.eval()
    made_of = task_parts(task)  # data on the disk and models of the zoo change, too
    about = {"task": choice.to_json(), "settings": asdict(settings), "seed": seed, "made_of": fingerprint(made_of)}
    about |= {"torch": torch.__version__, "autoprune": __version__}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / f"dense-{task.name}-{digest}.safetensors"
    with turn(path, progress.say):
        if not path.exists():
            _train(model, task, settings, seed, path, about, progress)
            return model.eval()
        tensors, _ = read_tensors(path, "the cached dense model")
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise FileError(f"the cached dense model does not fit the task: {path} ({error}). Delete it.") from None
        progress.say(f"dense model: loaded from {path}")
        return model.eval()


def dense_settings(task: Task, changes: Mapping[str, Any] | None) -> TrainingSettings | None:
    """How a task's dense model is trained, its own settings changed; None where it comes trained and stays so."""
    if changes is None:
        return task.dense_training
    return (task.dense_training or recipe_for(task.model)).changed(changes)


def _train(
    model: nn.Module, task: Task, settings: TrainingSettings, seed: int, path: Path, about: Any, progress: Progress
) -> None:
    check_cache()
    unfinished = path.with_suffix(".training")
    train_(
        model,
        task.train,
        task.loss,
        settings,
        seed=seed,
        checkpoint=unfinished,
        progress=progress,
        title="dense training",
    )
    write_tensors(path, model.state_dict(), about)
    shutil.rmtree(unfinished, ignore_errors=True)


def check_reseedable(choice: Choice) -> None:
    """Raises ConfigError when the task's model is not drawn from a seed, so that there is no other one to train."""
    if "seed" not in inspect.signature(TASKS.get(choice.name)).parameters:
        seeded = [name for name in TASKS if "seed" in inspect.signature(TASKS.get(name)).parameters]
        raise ConfigError(
            f"the task {choice.name!r} comes with the one model it has: there are no independent ones to distil from. "
            f"Set finetune.teachers to 1, or take a task that draws its model from a seed: {', '.join(seeded)}."
        )


def other_dense_models(
    choice: Choice, changes: Mapping[str, Any] | None, seed: int, count: int, progress: Progress
) -> list[nn.Module]:
    """Returns `count` more dense models of a task, each drawn and trained from a seed of its own, and cached.

    Raises:
        ConfigError: the task's model is not drawn from a seed.
    """
    check_reseedable(choice)
    models = []
    for more in range(1, count + 1):
        own = Choice(choice.name, {**choice.args, "seed": choice.args.get("seed", 0) + more})
        task = TASKS.create(own)
        models.append(dense_model(task, own, dense_settings(task, changes), seed + more, progress))
    return models
