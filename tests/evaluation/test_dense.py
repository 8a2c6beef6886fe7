"""Dense models: the task's own, and independent ones of other seeds, each trained once and cached."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autoprune.config import Config, parse_config
from autoprune.errors import ConfigError
from autoprune.evaluation.dense import dense_model, other_dense_models
from autoprune.pipeline.choices import create_choices
from autoprune.pipeline.run import Run
from autoprune.plan import LayerPlan, Plan
from autoprune.progress import SILENT
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.tasks import TASKS, TensorBatches

TASK = Choice("digits", {"widths": [4], "augment": False, "batch_size": 256})
SETTINGS = TrainingSettings(epochs=1, learning_rate=0.05)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.slow
def test_other_dense_models_are_independent_and_cached(cache: Path) -> None:
    own = dense_model(TASKS.create(TASK), TASK, SETTINGS, 0, SILENT)
    others = other_dense_models(TASK, SETTINGS.to_json(), 0, 2, SILENT)
    assert len(list(cache.glob("dense-digits-*.safetensors"))) == 3
    assert not any(model.training for model in others)
    assert not same(own, others[0])
    assert not same(*others)
    seeded = Choice("digits", {**TASK.args, "seed": 1})
    assert same(others[0], dense_model(TASKS.create(seeded), seeded, SETTINGS, 1, SILENT))
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert all(
        same(a, b) for a, b in zip(others, other_dense_models(TASK, SETTINGS.to_json(), 0, 2, SILENT), strict=True)
    )
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before


@pytest.mark.slow
def test_a_dense_model_of_other_data_or_another_build_is_not_taken(cache: Path) -> None:
    task = TASKS.create(TASK)
    own = dense_model(task, TASK, SETTINGS, 0, SILENT)
    assert same(own, dense_model(TASKS.create(TASK), TASK, SETTINGS, 0, SILENT))
    assert isinstance(task.train, TensorBatches)
    fewer = replace(task, train=TensorBatches(task.train.x[:-1], task.train.y[:-1], 256))
    loss: Callable[..., Tensor] = task.loss
    smoother = replace(task, loss=functools.partial(loss, label_smoothing=0.1))
    drawn_anew = replace(task, model=copy.deepcopy(task.model))
    with torch.no_grad():
        next(drawn_anew.model.parameters()).add_(0.01)
    for other in (fewer, smoother, drawn_anew):
        assert not same(own, dense_model(other, TASK, SETTINGS, 0, SILENT))
    assert len(list(cache.glob("dense-digits-*.safetensors"))) == 4


def config(teachers: int, **changes: object) -> Config:
    task = {"name": "digits", **TASK.args}
    settings = {"epochs": 1, "distillation_weight": 0.5, "teacher_weights": "confidence", **changes}
    finetune = {"teachers": teachers, "settings": settings}
    return parse_config(
        {"task": task, "dense": SETTINGS.to_json(), "finetune": finetune, "target": {"accuracy_drop": 0.5}}, "x"
    )


@pytest.mark.slow
def test_fine_tuning_hears_them(cache: Path, tmp_path: Path) -> None:
    ends = []
    for teachers in (1, 2):
        run = Run(config(teachers), tmp_path / str(teachers))
        layer = LayerPlan(0.5, Choice("unstructured"))
        Plan(dict.fromkeys(run.prepared.inventory.names, layer)).save(run.directory / "plan.json")
        ends.append(run.masked)
        assert len(list(cache.glob("dense-digits-*.safetensors"))) == teachers
    assert not same(*ends)


def test_teachers_that_cannot_be_had() -> None:
    user = {"name": "user", "model": "a.b:c", "data": "a.b:d"}
    settings = {"distillation_weight": 0.5}
    given = parse_config({"task": user, "finetune": {"teachers": 2, "settings": settings}}, "x")
    with pytest.raises(ConfigError, match=r"'user' comes with the one model it has.*digits, fashion_mnist"):
        create_choices(given)
    with pytest.raises(ConfigError, match="must be 1 for a task that is given"):
        create_choices(config(2), task_given=True)
    with pytest.raises(ConfigError, match="teachers is 3, but nothing is distilled from them"):
        create_choices(config(3, distillation_weight=0.0))
    with pytest.raises(ConfigError, match=r"finetune.teachers: .*less than or equal to 5"):
        config(6)
