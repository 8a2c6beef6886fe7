"""A user's own model and data: found, checked on the first batch, and clear errors."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autoprune.errors import AutopruneError, ConfigError
from autoprune.registry import Choice
from autoprune.tasks import TASKS, Task

MODULE = """
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

    def split(count, classes=3):
        generator = torch.Generator().manual_seed(count)
        x = torch.randn(count, 3, 4, generator=generator)
        y = torch.randint(0, classes, (count,), generator=generator)
        return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)

    def data(): return split(80), split(16)
    def three(): return split(80), split(16), split(24)
    def wrong_shape(): return [(torch.zeros(2, 5), torch.zeros(2).long())], split(16)
    def float_targets(): return [(torch.zeros(2, 12), torch.zeros(2))], split(16)
    def one_hot(): return [(torch.zeros(2, 12), torch.zeros(2, 3).long())], split(16)
    def too_many_classes(): return split(80), split(16, classes=9)
    def not_a_number(): return [(torch.full((2, 12), float("nan")), torch.zeros(2).long())], split(16)
    def not_pairs(): return [torch.zeros(2, 12)], split(16)
    def text_inputs(): return [("text", torch.zeros(2).long())], split(16)
    def once(): return iter(split(80)), split(16)
    def empty(): return [], split(16)
    def one(): return split(80)
    def four(): return (split(80),) * 4
    def fails(): raise OSError("disk on fire")
    def needs_arguments(path): return path
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_project.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "broken_project.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("my_project", "broken_project"):
        sys.modules.pop(name, None)


def user(model: str = "my_project:model", data: str = "my_project:data") -> Task:
    return TASKS.create(Choice("user", {"model": model, "data": data}))


def test_a_project_in_the_working_folder_is_a_task() -> None:
    task, again = user(), user()
    assert task.dense_training is None
    assert 0.0 <= task.evaluate(task.model) <= 1.0
    assert task.evaluate(task.model) == task.test(task.model)
    assert task.example_inputs(3)[0].shape == (3, 3, 4)
    assert len(task.calibration) == 4
    assert all(torch.equal(a[0], b[0]) for a, b in zip(task.calibration, again.calibration, strict=True))


def test_a_third_loader_is_the_test_split() -> None:
    task = user(data="my_project:three")
    assert sum(len(y) for _, y in task.testing) == 24
    assert sum(len(y) for _, y in task.validation) == 16


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"model": "my_project"}, "model must be 'package.module:function', such as 'my_project.models:build'"),
        ({"model": "no_project:model"}, "No module named 'no_project'. Run from the folder that holds it"),
        ({"model": "broken_project:model"}, "importing broken_project failed: ZeroDivisionError"),
        ({"model": "my_project:modle"}, "my_project has no function 'modle'. Did you mean 'model'?"),
        ({"model": "my_project:data"}, "must return a torch.nn.Module, not a tuple"),
        ({"model": "my_project:fails"}, "failed when called without arguments: OSError: disk on fire"),
        ({"model": "my_project:needs_arguments"}, "failed when called without arguments: TypeError"),
        ({"data": "my_project:one"}, "must return (train, validation) or (train, validation, test), not a DataLoader"),
        ({"data": "my_project:four"}, "not a tuple of 4"),
        ({"data": "my_project:once"}, "the train split of data='my_project:once' must be iterable again and again"),
    ],
)
def test_a_project_that_cannot_be_used(args: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        user(**args)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("wrong_shape", "does not run through the model: inputs of shape (2, 5): RuntimeError"),
        ("float_targets", "targets must be class indices of type int64, not torch.float32; use target.long()"),
        ("one_hot", "for targets of shape (2, 3) the model must give logits of that shape and one more dimension"),
        ("too_many_classes", "the validation split of data='my_project:too_many_classes': targets must be class"),
        ("not_a_number", "holds NaN or infinity in its first batch"),
        ("not_pairs", "must be an (inputs, target) pair, not a Tensor"),
        ("text_inputs", "inputs must be a tensor or a tuple of them, not a str"),
        ("empty", "the train split of data='my_project:empty' is empty"),
    ],
)
def test_data_that_does_not_fit(data: str, said: str) -> None:
    with pytest.raises(AutopruneError) as caught:
        user(data=f"my_project:{data}")
    assert said in str(caught.value)
