"""The agent against the uniform rule at the same measured speed-up, over seeds; one command, one table.

    python benchmarks/agent_vs_uniform.py configs/digits.toml --seeds 3

Every seed trains its own dense model and runs its own search. The uniform rule tries every criterion and group size the
agent may use, each aimed until its measured speed-up is the agent's. Both rewards are scored at that speed-up, on the
validation split, before fine-tuning. Runs are kept under --runs and resumed.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from autoprune.config import load_config
from autoprune.envs.trial import Trial
from autoprune.files import write_text
from autoprune.latency.machine import machine_text
from autoprune.metric import Metric
from autoprune.pipeline.run import Run
from autoprune.pipeline.search import RatedPlan
from autoprune.report.console import Console
from autoprune.report.table import markdown_table

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()

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
    machine = machine_text()
    spread = f"{min(gains):.3f} to {max(gains):.3f}" if gains else "-"
    text = "\n".join(
        [
            f"# {config.search.agent.name} against uniform: {given.config.stem}",
            "",
            f"`python benchmarks/agent_vs_uniform.py {given.config} --seeds {given.seeds}`",
            "",
            markdown_table(header, rows),
            f"Reward gained over uniform: mean {statistics.fmean(gains):.3f} ({spread})." if gains else "",
            "",
            f"{config.search.episodes} episodes, target {config.target.text(metric)}; batch {latency.batch}, "
            f"{latency.threads} thread(s), {latency.search_samples} interleaved rounds a trial. {machine}.",
            "",
        ]
    )
    print(text)
    write_text(RESULTS / f"agent_vs_uniform_{given.config.stem}.md", text)


def _cells(plan: RatedPlan | Trial, metric: Metric) -> list[str]:
    return [f"{plan.reward:.3f}", metric.text(plan.measurement.score), f"{plan.measurement.speedup:.2f}x"]


if __name__ == "__main__":
    main()
