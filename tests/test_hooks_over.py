"""What the speed-up of `PruningHooks` is over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autoprune.errors import AutopruneError, InfeasibleTarget
from autoprune.files import read_json
from autoprune.hooks import PruningHooks
from autoprune.latency.machine import machine_identity
from autoprune.latency.table import LatencyTable
from autoprune.model.inventory import take_inventory
from autoprune.pipeline import retarget
from autoprune.pipeline.baselines import Baselines
from autoprune.plan import Plan
from autoprune.registry import Choice
from autoprune.target import OVER, Over
from autoprune.testing import fake_table, small_cnn

GROUP = Choice("group", {"size": 4})
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
FASTER = {"eager": 1.0, "onnxruntime": 2.0, "repacked": 1.5}  # than torch eager
ENGINE: dict[Over, str] = {"best": "onnxruntime", "repacked": "repacked", "eager": "eager"}


@pytest.fixture(autouse=True)
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what was measured, of a machine on which ONNX Runtime is twice as fast as torch."""
    done: list[str] = []

    def time_engines(engines: Any, protocol: Any, clock: Any, machine: Any) -> Baselines:
        done.append("engines")
        return Baselines("onnxruntime", {name: 6.0 / each for name, each in FASTER.items()}, FASTER, 1000, machine)

    def profile_table(subject: Any, patterns: Any, settings: Any, *_: Any, **__: Any) -> LatencyTable:
        done.append("table")
        table = fake_table(subject.inventory, patterns)
        return replace(table, settings=settings, machine=machine_identity())

    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retarget, "engines_of", lambda *_: None)
    monkeypatch.setattr(retarget, "time_engines", time_engines)
    monkeypatch.setattr(retarget, "profile_table", profile_table)
    return done


def planned(speedup: float, **given: Any) -> Plan:
    return PruningHooks(small_cnn(), X, speedup=speedup, pattern=GROUP, **given).plan


def predicted(plan: Plan) -> float:
    return fake_table(take_inventory(small_cnn(), X), (GROUP,)).predict_speedup(plan)


@pytest.mark.parametrize("over", OVER)
def test_it_is_over_the_baseline_that_is_named(over: Over) -> None:
    faster = FASTER[ENGINE[over]]
    assert planned(3.0, over=over) == planned(3.0 * faster, over="eager")
    assert predicted(planned(3.0, over=over)) == pytest.approx(3.0 * faster, rel=0.03)


def test_it_is_over_the_best_dense_engine_where_none_is_named() -> None:
    assert planned(3.0) == planned(3.0, over="best") != planned(3.0, over="eager")


def test_the_engines_and_the_table_are_measured_once(tmp_path: Path, timed: list[str]) -> None:
    for speedup, over in ((2.0, "best"), (3.0, "best"), (3.0, "repacked"), (3.0, "eager")):
        planned(speedup, over=over)
    assert sorted(timed) == ["engines", "table"]
    timed.clear()
    for speedup in (2.0, 3.0):  # in files of the caller's own: the table is in the cache already
        planned(speedup, table=tmp_path / "latency.json")
    assert timed == ["engines"]
    assert read_json(tmp_path / "latency.engines.json", "the engines")["best"] == "onnxruntime"


def test_another_model_has_engines_of_its_own(tmp_path: Path, timed: list[str]) -> None:
    planned(2.0)
    other: nn.Module = nn.Sequential(small_cnn(), nn.Tanh())
    PruningHooks(other, X, speedup=2.0, pattern=GROUP)
    assert timed.count("engines") == 2


def test_a_refusal_says_over_what() -> None:
    with pytest.raises(InfeasibleTarget, match=r"no plan reaches 900x over the best dense engine: .* at best"):
        planned(900.0)


@pytest.mark.parametrize("given", [{"over": "best"}, {"table": "latency.json"}])
def test_what_is_for_a_speedup_alone_is_refused_without_one(given: dict[str, Any]) -> None:
    with pytest.raises(AutopruneError, match="for a speedup alone"):
        PruningHooks(small_cnn(), X, sparsity=0.5, pattern=GROUP, **given)


def test_engines_are_timed_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(retarget, "engines", lambda: ("eager", "channels_last"))
    model = small_cnn()
    found = retarget.faster_than_eager(model, X, "best")
    assert found >= 1.0  # the best of engines among which is torch eager
    assert model.training
    assert found == retarget.faster_than_eager(model, X, "best")
