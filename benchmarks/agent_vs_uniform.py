"""The agent against the uniform rule at the same measured speed-up, over seeds; one command, one table.

    python -m benchmarks agent_vs_uniform configs/digits.toml --seeds 3

Every seed trains its own dense model and runs its own search. The uniform rule tries every criterion and group size the
agent may use, each aimed until its measured speed-up is the agent's. Both rewards are scored at that speed-up, on the
validation split, before fine-tuning. Runs are kept under --runs and resumed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from autoprune.config import load_config
from autoprune.envs.trial import Trial
from autoprune.metric import Metric
from autoprune.pipeline.run import Run
from autoprune.pipeline.selection import RatedPlan
from autoprune.report.console import Console
from autoprune.report.table import markdown_table
from benchmarks.lib.command_line import add_seeds, command_line
from benchmarks.lib.page import page, write_page
from benchmarks.lib.provenance import Provenance


def main(argv: Sequence[str]) -> int:
    parser = command_line("agent_vs_uniform", __doc__)
    parser.add_argument("config", type=Path)
    add_seeds(parser, 3)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args(argv)

    rows, gains = [], []
    for seed in range(given.seeds):
        config = load_config(given.config, [*given.overrides, f"seed={seed}"])
        run = Run(config, given.runs / f"{given.config.stem}-seed{seed}", progress=Console())
        agent, uniform = run.search.comparison.agent, run.search.comparison.uniform
        metric = run.task.metric
        cells = [str(seed), *_cells(agent, metric), *(_cells(uniform, metric) if uniform else ["-"] * 3)]
        rows.append(cells)
        if uniform:
            gains.append(agent.reward - uniform.reward)
    header = (
        "seed",
        *(f"{who} {what}" for who in ("agent", "uniform") for what in ("reward", metric.name, "speed-up")),
    )
    latency = config.latency
    spread = f"{min(gains):.3f} to {max(gains):.3f}" if gains else "-"
    text = page(
        f"{config.search.agent.name} against uniform: {given.config.stem}",
        f"agent_vs_uniform {given.config} --seeds {given.seeds}",
        f"{config.search.episodes} episodes, target {config.target.text(metric)}; batch {latency.batch}, "
        f"{latency.threads} thread(s), {latency.search_samples} interleaved rounds a trial.",
        markdown_table(header, rows),
        f"Reward gained over uniform: mean {statistics.fmean(gains):.3f} ({spread})." if gains else "",
        str(Provenance.here()),
    )
    write_page(given.output, f"agent_vs_uniform_{given.config.stem}", text)
    return 0


def _cells(plan: RatedPlan | Trial, metric: Metric) -> list[str]:
    return [f"{plan.reward:.3f}", metric.text(plan.measurement.score), f"{plan.measurement.speedup:.2f}x"]
