"""The page of a run is a pure function of its data; the golden file shows it whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from autoprune.latency.timer import Latency
from autoprune.model.inventory import KeptDense
from autoprune.report.data import ContenderRow, PlanRow, Report, ResultRow, SearchRow
from autoprune.report.page import report_page

GOLDEN = Path(__file__).parent / "report.md"


def latency(median_ms: float) -> Latency:
    return Latency(median_ms, 0.95 * median_ms, 1.1 * median_ms, (median_ms,), 1)


REPORT = Report(
    title="digits: at least 3x faster",
    headline="The pruned model is 3.20x faster than torch eager and keeps 98.1% accuracy (dense: 98.3%).",
    facts={"task": "digits", "target": "at least 3x faster, most accurate", "agent": "ppo", "seed": 0},
    results=(
        ResultRow("dense, eager", 0.983, latency(3.2), 1.0, 0.5, 175_258, 712_000),
        ResultRow("dense, openvino", None, latency(1.6), 2.0, 1.0),
        ResultRow("pruned, repacked", 0.981, latency(1.0), 3.2, 1.6, 31_000, 151_000),
    ),
    plan=(
        PlanRow("layer1.conv1", 2304, 0.55, "group(size=8)", "magnitude", "jit", 21.5, 14.25),
        PlanRow("layer3.conv2", 36_864, 0.91, "group(size=16)", "gradient", "jit", 98.0, 17.0),
    ),
    kept_dense=(KeptDense("stem", "conv2d", "144 weights: too few to be worth it"),),
    searches=(SearchRow("ppo", 300, 0.12, 0.979, 1.02, 3.1), SearchRow("uniform", 300, -0.4, 0.951, 1.01, 3.15)),
    contenders=(ContenderRow("ppo", False, 3.02, 0.979, 0.981), ContenderRow("knapsack", True, 3.05, 0.982, 0.98)),
    protocol={"batch": 1, "threads": 1, "samples": 100},
    machine={"cpu": "Some CPU | 3 GHz", "torch": "2.13.0", "autoprune": "0.1.0"},
    figures={"Trials": "front of trials.png", "Reward": "reward.png"},
)


def test_the_page_is_the_golden_file() -> None:
    assert report_page(REPORT) == GOLDEN.read_text(encoding="utf-8")


def test_sections_without_content_are_left_out() -> None:
    bare = replace(REPORT, facts={}, plan=(), kept_dense=(), searches=(), contenders=(), figures={})
    headings = [line for line in report_page(bare).splitlines() if line.startswith("## ")]
    assert headings == ["## Result", "## How latency was measured", "## Machine and versions"]
