"""Tasks of every kind from the command line: five-line modules, the loss and the metric that fit, or those named."""

from __future__ import annotations

import copy
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import autoprune
from autoprune.agents import AGENTS
from autoprune.agents.harness import search
from autoprune.cli import app
from autoprune.envs import PruneEnv
from autoprune.errors import AutopruneError, ConfigError
from autoprune.model.arguments import call_with
from autoprune.registry import Choice
from autoprune.tasks import TASKS, Task
from autoprune.tasks.user import functions_of
from autoprune.testing import fake_problem

MODULE = """
    import torch
    from torch import nn
    from torch.nn import functional
    from torch.utils.data import DataLoader, TensorDataset
    import autoprune

    def draw(*shape, low=None):
        generator = torch.Generator().manual_seed(sum(shape))
        if low is None:
            return torch.randn(*shape, generator=generator)
        return torch.randint(*low, shape, generator=generator)

    def layers(*made):
        torch.manual_seed(0)
        return nn.Sequential(*[layer() for layer in made]).eval()

    X, IMAGES, TEXT = draw(32, 8), draw(16, 1, 8, 8), draw(16, 9, low=(0, 11))

    def regressor():
        return layers(lambda: nn.Linear(8, 32), nn.ReLU, lambda: nn.Linear(32, 32), nn.ReLU, lambda: nn.Linear(32, 1))
    def numbers():
        return DataLoader(TensorDataset(X, X.sum(1)), 8, shuffle=True), DataLoader(TensorDataset(X, X.sum(1)), 8)

    def segmenter():
        return layers(lambda: nn.Conv2d(1, 16, 3, padding=1), nn.ReLU, lambda: nn.Conv2d(16, 3, 3, padding=1))
    def maps():
        batch = IMAGES, (IMAGES[:, 0] > 0).long() + (IMAGES[:, 0] > 1)
        return [batch] * 2, [batch]

    def tagger():
        return layers(lambda: nn.Linear(8, 32), nn.ReLU, lambda: nn.Linear(32, 4))
    def tags():
        batch = {"input": X, "labels": (X[:, :4] > 0).float()}
        return [batch] * 2, [batch]

    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)
            self.cell = nn.LSTM(16, 16, batch_first=True)
        def forward(self, tokens):
            return {"logits": self.head(self.cell(self.embed(tokens))[0])}
    def language():
        return layers(Language)[0]
    def text():
        return [(TEXT[:, :-1], TEXT[:, 1:])] * 2, [(TEXT[:, :-1], TEXT[:, 1:])]

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.head = nn.Linear(5, 32), nn.Linear(3, 32), nn.Linear(32, 6)
        def forward(self, x, z):
            return self.head(torch.relu(self.one(x) + self.other(z))), x
    def two():
        return layers(Two)[0]
    def unlabelled():
        return [{"x": X[:, :5], "z": X[:, 5:]}] * 2, [{"z": X[:, 5:], "x": X[:, :5]}]
    def triples():
        return [(X[:, :5], X[:, 5:], X.argmax(1) % 6)] * 2, [(X[:, :5], X[:, 5:], X.argmax(1) % 6)]

    class Causal(Language):
        # As models of Hugging Face: the target is the input, and is shifted inside.
        def forward(self, input_ids, labels=None):
            logits = super().forward(input_ids)["logits"]
            if labels is None:
                return {"logits": logits}
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            return {"loss": loss, "logits": logits}
    def causal():
        return layers(Causal)[0]
    def documents():
        return [{"input_ids": TEXT, "labels": TEXT}], [{"input_ids": TEXT, "labels": TEXT}]

    class Judge(nn.Module):
        # A loss of its own, that nobody else knows.
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(8, 16)
        def forward(self, x, target=None):
            out = self.net(x)
            return {"out": out} if target is None else {"loss": out.square().mean() * 3 + target.mean() * 0, "out": out}
    def judge():
        return layers(Judge)[0]
    def judged():
        return [{"x": X, "target": X}], [{"x": X, "target": X}]

    def own_loss(output, target):
        return (output.squeeze(-1) - target).abs().pow(1.5).mean()
    def right(model, loader):
        return sum((model(x).squeeze(1).sign() == y.sign()).float().mean() for x, y in loader) / len(loader)
    def percent(model, loader):
        return 100 * right(model, loader)
    def distance(model, loader):
        return {"mse": sum(functional.mse_loss(model(x).squeeze(1), y) for x, y in loader) / len(loader)}
    def decibels(model, loader):
        return -300.0
    def broken(model, loader):
        return model(1)
    def nothing(model, loader):
        pass
    MARK = autoprune.Metric("mark", factor=-1.0, unit="", digits=2, points="marks")
    def sigmoid():
        return nn.Sequential(tagger(), nn.Sigmoid())
    def strings():
        return [(X, ["a"] * 32)], [(X, ["a"] * 32)]
    def half_labelled():
        return numbers()[0], [X]
"""
TASK = "any_project"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / f"{TASK}.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop(TASK, None)


def user(model: str, data: str, **named: str) -> Task:
    return TASKS.create(Choice("user", {"model": f"{TASK}:{model}", "data": f"{TASK}:{data}", **named}))


KINDS = [
    ("regressor", "numbers", "mse", "mse"),
    ("segmenter", "maps", "cross_entropy", "mean IoU"),
    ("tagger", "tags", "bce_with_logits", "F1"),
    ("language", "text", "cross_entropy", "bits"),
    ("two", "unlabelled", "none", "fidelity"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "data", "loss", "metric"), KINDS)
def test_every_kind_of_task_from_the_command_line(
    tmp_path: Path, model: str, data: str, loss: str, metric: str
) -> None:
    agent, env = AGENTS.create(Choice("ppo", {"net": [8]})), PruneEnv(fake_problem(), (Choice("sparsity"),))
    search(agent, env, 2, seed=0)
    agent.save_policy(tmp_path / "policy", env)
    quick = [
        "latency.samples=3", "latency.search_samples=3", "latency.profile_samples=3", 'latency.engines=["eager"]',
        "env.timing=table", "env.min_saving=0.0", "search.rules=false", "finetune.settings.max_steps=2",
    ]  # fmt: skip
    named = ["--model", f"{TASK}:{model}", "--data", f"{TASK}:{data}", "--policy", str(tmp_path / "policy")]
    options = [part for key in quick for part in ("--set", key)]
    arguments = ["apply", *named, "--accuracy-drop", "0.9", "--run-dir", "out", "--workers", "1", *options]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert record["metric"]["name"] == metric
    assert record["facts"]["loss"].startswith(f"{loss}, as ")
    assert f"| {metric} |" in " ".join(done.output.split())
    assert (tmp_path / "out" / "repacked.safetensors").exists()


@pytest.mark.parametrize(
    ("model", "data", "loss", "metric"),
    [
        *KINDS,
        ("two", "triples", "cross_entropy", "accuracy"),
        ("causal", "documents", "cross_entropy", "bits"),
        ("judge", "judged", "model", "fidelity"),
    ],
)
def test_what_fits_is_told_by_the_first_batch(model: str, data: str, loss: str, metric: str) -> None:
    task = user(model, data)
    assert task.facts["loss"].startswith(f"{loss}, as ")
    assert task.metric.name == metric
    assert task.metric.lowest <= task.evaluate(task.model) <= task.metric.highest
    inputs, target = task.calibration[0]
    assert float(task.loss(call_with(task.model, inputs), target).detach()) >= 0.0


def test_a_causal_model_is_told_the_next_token() -> None:
    task = user("causal", "documents")
    _, target = task.calibration[0]
    from any_project import TEXT  # type: ignore[import-not-found]

    assert torch.equal(target[:, :-1], TEXT[:, 1:])
    assert bool((target[:, -1] == -100).all())
    own = task.model(TEXT, labels=TEXT)["loss"]
    torch.testing.assert_close(task.loss(task.model(TEXT), target), own)
    assert task.evaluate(task.model) == pytest.approx(-float(own.detach()) / 0.6931472, rel=1e-5)


def test_without_targets_the_dense_model_is_the_target() -> None:
    task = user("two", "unlabelled")
    assert task.evaluate(task.model) == pytest.approx(1.0)
    inputs, target = next(iter(task.train))
    assert float(task.loss(task.model(**inputs), target).detach()) == pytest.approx(0.0, abs=1e-9)
    inputs, target = task.calibration[0]
    value = task.loss(task.model(**inputs), target)
    value.backward()
    assert float(value.detach()) > 0.1, "with noise, or there is no gradient to calibrate by"
    assert float(task.model.head.weight.grad.abs().max()) > 0  # type: ignore[union-attr,operator]
    assert [x.shape for x in task.example_inputs(3)] == [(3, 5), (3, 3)]
    worse = copy.deepcopy(task.model)
    with torch.no_grad():
        for parameter in worse.parameters():
            parameter.zero_()
    assert task.evaluate(worse) < 0.1


@pytest.mark.parametrize("loss", ["mse", "l1", "huber", "none", f"{TASK}:own_loss"])
def test_a_loss_is_named(loss: str) -> None:
    task = user("regressor", "numbers", loss=loss)
    assert task.facts["loss"] == loss
    inputs, target = task.calibration[0]
    assert float(task.loss(task.model(inputs), target).detach()) > 0


@pytest.mark.parametrize(
    ("named", "metric", "factor", "said"),
    [
        ({"evaluate": "rmse"}, "rmse", -1, "rmse; a drop of 0.01 is"),
        ({"metric": "mse"}, "mse", -1, "mse; a drop of 0.01 is"),
        ({"evaluate": f"{TASK}:right"}, "score", 100, "a fraction, as the dense model has 0."),
        ({"evaluate": f"{TASK}:percent"}, "score", 100, "in percent, as the dense model has"),
        ({"evaluate": f"{TASK}:percent", "metric": "accuracy"}, "accuracy", 100, "in percent"),
        ({"evaluate": f"{TASK}:distance", "metric": "mse"}, "mse", -1, "any_project:distance; a drop of 0.01 is"),
        ({"evaluate": f"{TASK}:decibels"}, "score", 300, "a number without a range"),
        ({"evaluate": f"{TASK}:decibels", "metric": f"{TASK}:MARK"}, "mark", -1, "a drop of 0.01 is 0.01 marks"),
    ],
)
def test_how_a_score_reads(named: dict[str, str], metric: str, factor: int, said: str) -> None:
    task = user("regressor", "numbers", **named)
    score = task.evaluate(task.model)
    assert task.metric.name == metric
    assert task.metric.factor * factor > 0
    assert said in task.facts["score"]
    if metric in ("score", "accuracy") and factor == 100:
        assert 0.0 < score <= 1.0
        assert task.metric.allowance(0.01) == f"1 point of {metric}"
    if metric == "mse":
        from any_project import X

        with torch.no_grad():
            truth = float((task.model(X).squeeze(1) - X.sum(1)).square().mean())
        assert task.metric.figure(score) == pytest.approx(truth, rel=1e-4)
        assert score < 0, "higher is better"


def test_the_unit_of_a_drop_is_the_targets_variance() -> None:
    task = user("regressor", "numbers")
    from any_project import X

    assert task.metric.factor == pytest.approx(-float(X.sum(1).var(correction=0)), rel=1e-4)


@pytest.mark.parametrize(
    ("model", "data", "named", "said"),
    [
        ("regressor", "numbers", {"loss": "mes"}, "unknown loss 'mes'. Did you mean 'mse'"),
        ("regressor", "numbers", {"evaluate": "acuracy"}, "unknown evaluation 'acuracy'. Did you mean 'accuracy'"),
        ("regressor", "numbers", {"loss": f"{TASK}:own_los"}, "Did you mean 'own_loss'"),
        ("regressor", "numbers", {"loss": f"{TASK}:MARK"}, "loss='any_project:MARK' must be a function"),
        ("regressor", "numbers", {"evaluate": "mse", "metric": "rmse"}, "has a metric of its own"),
        ("regressor", "numbers", {"metric": f"{TASK}:MARK"}, "give the function that evaluates, too"),
        ("regressor", "numbers", {"evaluate": f"{TASK}:right", "metric": f"{TASK}:numbers"}, "must be an autoprune.M"),
        ("regressor", "numbers", {"evaluate": f"{TASK}:broken"}, "failed on the dense model: TypeError"),
        ("regressor", "numbers", {"evaluate": f"{TASK}:nothing"}, "is there a return missing?"),
        ("regressor", "numbers", {"evaluate": f"{TASK}:decibels", "metric": "accuracy"}, "or from 0 to 100 in percent"),
        ("regressor", "numbers", {"evaluate": f"{TASK}:decibels", "metric": "mse"}, "0 to inf, and lower is better"),
        ("regressor", "numbers", {"loss": "cross_entropy"}, "cross_entropy takes class indices, integers"),
        ("regressor", "numbers", {"evaluate": "iou"}, "iou takes class indices, integers"),
        ("regressor", "numbers", {"loss": "model"}, "needs a model that is given its target"),
        ("segmenter", "maps", {"loss": "mse"}, "mse takes targets of the output's shape"),
        ("two", "numbers", {}, "does not run through the model"),
        ("sigmoid", "tags", {}, "as behind a sigmoid. Give a model of logits"),
        ("tagger", "strings", {}, "Name one (task.loss, --loss): cross_entropy, mse, l1"),
        ("regressor", "half_labelled", {}, "the other splits have targets"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said(model: str, data: str, named: dict[str, str], said: str) -> None:
    with pytest.raises(AutopruneError) as caught:
        user(model, data, **named)
    assert said in str(caught.value)


@pytest.mark.slow
def test_compress_distils_from_the_dense_model_alone() -> None:
    """Unlabelled data: a list of inputs, a loss by name."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.randn(32, 8)

    def near(candidate: nn.Module) -> float:
        with torch.no_grad():
            return float((candidate(x).argmax(1) == model(x).argmax(1)).float().mean())

    quick = {
        "latency": {"samples": 3, "search_samples": 3, "profile_samples": 3, "engines": ["eager"]},
        "search": {"agent": "uniform", "episodes": 1, "rules": False, "finalists": 1},
        "env": {"min_saving": 0.0, "actions": ["sparsity"], "timing": "table", "recovery": "none"},
        "finetune": {"settings": {"epochs": 20, "learning_rate": 0.1}},
    }
    done = autoprune.compress(model, [x[:16], x[16:]], near, x[:1], 1.2, loss="none", config=quick)
    assert done.rows[-1].score is not None
    assert done.rows[-1].score > 0.5, "trained to say what the dense model says"
    with pytest.raises(ConfigError, match="unknown loss"):
        autoprune.compress(model, [x], near, x[:1], loss="nothing")


def test_functions_that_a_config_would_call_are_listed() -> None:
    args = {"model": "a:b", "data": "c:d", "loss": "mse", "evaluate": "e:f", "metric": "g:h"}
    assert functions_of(Choice("user", args)) == ("a:b", "c:d", "e:f", "g:h")
    assert functions_of(Choice("digits")) == ()


def test_names_that_do_not_exist_are_refused_before_anything_is_made() -> None:
    with pytest.raises(ConfigError, match="unknown loss"):
        user("no_such_model", "numbers", loss="mes")
