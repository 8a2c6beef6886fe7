"""A run whose search chooses the precision of each layer, to its end; and plans with int8 layers in other runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import autoprune
from autoprune.config import Config, parse_config
from autoprune.errors import ConfigError
from autoprune.files import read_json
from autoprune.pipeline.choices import create_choices
from autoprune.pipeline.results import report_of
from autoprune.pipeline.run import Run
from autoprune.plan import Plan
from autoprune.precision import RunPrecision
from autoprune.report.run_report import write_report
from autoprune.testing import save_fake_table

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {
    "task": {"name": "digits", "widths": [8, 16]},
    "dense": {"epochs": 1, "learning_rate": 0.1},
    "target": {"accuracy_drop": 0.02},
    "latency": {"samples": 3, "search_samples": 3, "profile_samples": 3, "engines": ["eager"]},
    "env": {"timing": "table", "recovery": "batch_norm", "min_saving": 0.0},
    "search": {"agent": "random", "episodes": 2, "criteria": ["magnitude"], "finalists": 1},
    "finetune": {"settings": {"epochs": 2, "learning_rate": 0.05}},
}


def config(precision: RunPrecision, **changes: object) -> Config:
    return parse_config({**SMALL, "precision": precision, **changes}, "test")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run on a table in which int8 is three times as fast, of all layers but the first, which has none."""
    run = Run(config("planned"), tmp_path_factory.mktemp("planned") / "run")
    save_fake_table(run)
    write_report(report_of(run))
    return run


def test_the_search_chooses_layers_for_int8_and_the_run_ends_with_them(finished: Run) -> None:
    planned = {name: layer.precision for name, layer in finished.plan.layers.items()}
    assert planned["0.0"] == "float32"
    assert "int8" in planned.values()
    fast = autoprune.load(finished.directory / "repacked.safetensors")
    made = {row.name: row.precision for row in fast.report}
    assert {name: made[name] for name in planned} == planned
    rows = {row["name"]: row for row in read_json(finished.directory / "results.json", "the results")["rows"]}
    assert rows["repacked"]["precision"] == "mixed"
    assert rows["repacked"]["snr_db"] > 10
    whole = next(row for name, row in rows.items() if name.startswith("dense, repacked"))
    assert whole["precision"] == "float32"


def test_its_rules_tried_float32_and_int8(finished: Run) -> None:
    tried = [trial.plan for trials in finished.searched.rules.values() for trial in trials]
    assert {frozenset(layer.precision for name, layer in plan.layers.items() if name != "0.0") for plan in tried} >= {
        frozenset({"float32"}),
        frozenset({"int8"}),
    }


def test_its_report_shows_each_layer_s_precision(finished: Run) -> None:
    page = (finished.directory / "report.md").read_text()
    assert "the best dense engine of any precision" in page
    layers = {row.layer: row.precision for row in report_of(finished).record.plan}
    assert layers == {name: layer.precision for name, layer in finished.plan.layers.items()}
    assert "| precision |" in page


def test_its_plan_is_applied_alike_elsewhere_and_only_where_precisions_are_planned(
    finished: Run, tmp_path: Path
) -> None:
    path = finished.directory / "plan.json"
    for precision in ("float32", "int8", "mixed"):
        other = Run(config(precision), tmp_path / precision)
        with pytest.raises(ConfigError, match=f"layers in int8, .*, and the run's precision is '{precision}'"):
            other.adopt(path)
    given = Run(config("planned"), tmp_path / "given")
    given.adopt(path)
    made = {row.name: row.precision for row in given.repacked.report}
    assert {name: made[name] for name in given.plan.layers} == {
        name: layer.precision for name, layer in Plan.load(path).layers.items()
    }


def test_without_a_search_or_a_plan_nothing_chooses_precisions(tmp_path: Path) -> None:
    run = Run(config("planned", target={"sparsity": 0.5}), tmp_path / "run")
    with pytest.raises(ConfigError, match="precision 'planned' is for a search"):
        run.plan_uniformly()


def test_an_action_that_nothing_heeds_is_refused_before_any_work() -> None:
    actions = ["sparsity", "precision"]
    create_choices(config("planned", env={"actions": actions}))
    for precision in ("float32", "int8", "mixed"):
        with pytest.raises(ConfigError, match="the action 'precision' needs precision 'planned'"):
            create_choices(config(precision, env={"actions": actions}))
