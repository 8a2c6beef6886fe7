"""The page of a run, ``report.md``: a pure function of plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from autoprune.report.data import Report
from autoprune.report.table import contender_table, markdown_table, plan_table, result_table, search_table

ABOUT_RESULTS = """\
Latency is the median (10th-90th percentile) of one inference of the whole model. All rows were timed in turns, in the
same rounds. *Speed-up* is over the dense model in torch eager, *vs best dense* over the fastest dense row; both are
medians of the rounds' ratios. *repacked* is bound to its inputs (fast.bind), as ONNX Runtime and OpenVINO are driven.
Parameters are counted without zeros of the pruned weights.
"""
ABOUT_ON_DEVICE = """\
Latency is the median (10th-90th percentile) of one inference of the whole model on the device, where the dense model
and the pruned one, both repacked and built for it, were timed in turns, in the same rounds. *vs best dense* is over the
dense model repacked, the median of the rounds' ratios. The other rows cannot run there, and were scored alone.
Parameters are counted without zeros of the pruned weights.
"""
ABOUT_SEARCHES = "The best plan each agent found, on the validation split, before the final training.\n"
ABOUT_CONTENDERS = """\
Plans that were all fine-tuned, each put on the target by measurement (*speed-up*: over what the target's is over). The
best on the validation split was chosen; the test split had no say.
"""
ABOUT_PLAN = "Times are those of the layer alone, in microseconds an inference, where they were measured.\n"


def report_page(report: Report) -> str:
    """Returns the page as markdown. Sections without content are left out."""
    dense = [[layer.name, layer.kind, layer.reason] for layer in report.kept_dense]
    in_torch = any(row.speedup is not None for row in report.results)
    about, over = (ABOUT_RESULTS, "over eager") if in_torch else (ABOUT_ON_DEVICE, "over dense")
    sections = [
        ("Result", about + "\n" + result_table(report.results, report.metric) if report.results else ""),
        ("What was run", _facts(report.facts)),
        (
            "Agent and rivals",
            ABOUT_SEARCHES + "\n" + search_table(report.searches, report.metric, over) if report.searches else "",
        ),
        (
            "Contenders",
            ABOUT_CONTENDERS + "\n" + contender_table(report.contenders, report.metric) if report.contenders else "",
        ),
        ("Plan", ABOUT_PLAN + "\n" + plan_table(report.plan) if report.plan else ""),
        ("Layers that stayed dense", markdown_table(("layer", "kind", "why"), dense, left=3) if dense else ""),
        ("Figures", _figures(report.figures)),
        ("How latency was measured", _facts(report.protocol)),
        ("Machine and versions", _facts(report.machine)),
    ]
    body = "\n".join(f"## {heading}\n\n{text}" for heading, text in sections if text)
    return f"# {report.title}\n\n{report.headline}\n\n{body}"


def _facts(facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    return markdown_table(("what", "value"), [[name, str(value)] for name, value in facts.items()], left=2)


def _figures(figures: Mapping[str, str]) -> str:
    return "\n".join(f"![{caption}]({quote(file)})\n" for caption, file in figures.items())
