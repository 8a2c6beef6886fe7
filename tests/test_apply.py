"""Other people's models: `autoprune apply` from the command line, `compress` and `repack` from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

import autoprune
from autoprune.agents import AGENTS
from autoprune.agents.harness import search
from autoprune.cli import app
from autoprune.envs import PruneEnv
from autoprune.errors import AutopruneError, ConfigError
from autoprune.masks import sparsity
from autoprune.registry import Choice
from autoprune.testing import fake_problem

PROJECT = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 4),
    )

def loaders():
    torch.manual_seed(1)
    def batch(): return torch.randn(16, 1, 24, 24), torch.randint(0, 4, (16,))
    return [batch() for _ in range(3)], [batch() for _ in range(2)]

def wrong_shape():
    batch = (torch.randn(4, 3, 24, 24), torch.randint(0, 4, (4,)))
    return [batch], [batch]
"""
SMALL = [
    "latency.samples=5", "latency.search_samples=3", "latency.profile_samples=3", 'latency.engines=["eager"]',
    "finetune.settings.epochs=1", "env.min_saving=0.0",
]  # fmt: skip


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A policy learned on another model; it chooses sparsities alone, so that one pattern is profiled."""
    agent, env = AGENTS.create(Choice("ppo", {"net": [8]})), PruneEnv(fake_problem(), (Choice("sparsity"),))
    search(agent, env, 3, seed=0)
    agent.save_policy(tmp_path / "policy", env)
    return tmp_path / "policy"


def apply(policy: Path, *more: str) -> str:
    overrides = [part for key in SMALL for part in ("--set", key)]
    arguments = ["apply", "--policy", str(policy), "--run-dir", "out", *overrides, *more]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.mark.slow
def test_apply_prunes_a_users_own_model(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_apply_project.py").write_text(PROJECT)
    model, data = "my_apply_project:build", "my_apply_project:loaders"
    page = apply(policy, "--model", model, "--data", data, "--accuracy-drop", "0.9")
    assert "repacked" in page
    assert "the validation split that the search saw" in page
    assert (tmp_path / "out" / "repacked.safetensors").exists()
    from my_apply_project import build  # type: ignore[import-not-found]

    fast = autoprune.load(tmp_path / "out" / "repacked.safetensors", build())
    assert fast(torch.randn(2, 1, 24, 24)).shape == (2, 4)


@pytest.mark.parametrize(
    ("model", "data", "text"),
    [
        ("no_such_project:build", "no_such_project:loaders", "cannot be imported"),
        ("my_wrong_project:buidl", "my_wrong_project:loaders", "Did you mean 'build'"),
        ("my_wrong_project:build", "my_wrong_project:wrong_shape", "does not run through the model"),
    ],
)
def test_apply_says_what_is_wrong_with_a_users_model(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, data: str, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_wrong_project.py").write_text(PROJECT)
    with pytest.raises(AutopruneError, match=text):
        apply(policy, "--model", model, "--data", data, "--speedup", "1.5")
    assert not (tmp_path / "out").exists(), "a mistake claims no directory"


class Rows(nn.Module):
    """A transformer over the rows of an image: torch runs its layers fused in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True), 2)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.encoder(self.embed(x)).mean(1), self.head.weight, self.head.bias)


@pytest.mark.slow
def test_compress_takes_a_model_that_bypasses_its_submodules() -> None:
    torch.manual_seed(0)
    model = Rows().eval()
    batches = [(torch.randn(8, 8, 8), torch.randint(0, 3, (8,))) for _ in range(2)]
    held_out = torch.randn(16, 8, 8)

    def evaluate(candidate: nn.Module) -> float:
        device = next(candidate.parameters()).device  # as most do
        with torch.inference_mode():
            return float((candidate(held_out.to(device)).argmax(-1) == model(held_out).argmax(-1)).float().mean())

    config = {
        "latency": {"samples": 3, "search_samples": 3, "profile_samples": 3, "engines": ["eager"]},
        "search": {"agent": "random", "episodes": 2},
        "env": {"actions": ["sparsity"], "recovery": "none", "min_saving": 0.0},  # timings must not pick the layers
        "finetune": {"settings": {"epochs": 1, "learning_rate": 0.01}},
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    target = autoprune.Target(accuracy_drop=0.9)
    done = autoprune.compress(model, batches, evaluate, held_out[:1], target, config=config)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {"encoder.layers.0.linear1", "encoder.layers.1.linear2"} <= set(done.plan.layers)
    assert {"encoder.layers.0.self_attn.in_proj_weight", "head"} <= set(done.plan.layers)
    assert done.model(held_out).shape == (16, 3)
    assert "repacked" in done.report
    assert evaluate(done.model) == done.rows[-1].score


@pytest.mark.parametrize(("form", "head", "why"), [("program", "jit", "packed"), ("modules", "dense", "never ran")])
def test_repack_needs_nothing_but_zeros(form: Literal["program", "modules"], head: str, why: str) -> None:
    model = Rows().eval()
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.linear1.weight[:, 8:] = 0
    x = torch.randn(5, 8, 8)
    fast = autoprune.repack(model, x, form=form)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    rows = {row.name: row for row in fast.report}
    assert rows["encoder.layers.0.linear1"].sparsity == pytest.approx(0.75)
    assert rows["head"].backend == head  # the model calls it behind its module's back
    assert why in rows["head"].why
    assert sparsity(model.encoder.layers[0].linear1.weight) == pytest.approx(0.75)


def test_compress_refuses_a_wrong_section() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'search'"):
        autoprune.compress(Rows(), [], lambda _: 1.0, torch.randn(1, 8, 8), config={"serch": {}})
