"""What a generalist's design is worth: actions, what is seen, shaping, learners. About 40 minutes of a core.

    python -m benchmarks generalist                  # goes on where it was stopped
    python -m benchmarks generalist --variants shipped,absolute
    python -m benchmarks generalist --report

Every variant learns the same family from the same seed, by surrogates alone, and is judged by them: the share of the
knapsack's loss that its plans avoid, on tasks it learned from, tasks that choose among its policies, and tasks of other
builds. The learners that learn from one episode at a time get the seconds that PPO takes. The tasks are made ready
first, once (`autoprune train configs/generalist.toml`). Writes benchmarks/results/generalist.md.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from autoprune.config import GeneralistConfig, load_generalist_config
from autoprune.files import cache_folder, read_json, write_json
from autoprune.pipeline.generalist import Generalist
from autoprune.registry import Choice
from autoprune.report.console import Console
from autoprune.report.table import markdown_table
from benchmarks.lib.command_line import add_report, among, command_line
from benchmarks.lib.page import page, write_page
from benchmarks.lib.provenance import Machines, Provenance
from benchmarks.lib.sweep import PROVENANCE

CONFIG = Path(__file__).parents[1] / "configs" / "generalist.toml"
PPO = {"episodes_per_update": 16, "learning_rate": 5e-4, "epochs": 6, "minibatches": 8, "net": [128, 128]}
SPARSITY = (Choice("sparsity"),)
MIX, COEFFICIENT = Choice("mix"), Choice("coefficient", {"reach": 1.0})


@dataclass(frozen=True)
class Variant:
    """What differs from the shipped policy's training."""

    name: str
    what: str
    env: dict[str, Any] = field(default_factory=dict)
    agent: Choice = Choice("ppo", PPO)  # noqa: RUF009 - frozen
    updates: int = 100


VARIANTS = (
    Variant("shipped", "mix and coefficients of the knapsack's curves, PPO"),
    Variant("coefficients", "coefficients alone, a factor of up to e", {"actions": (COEFFICIENT,)}),
    Variant("wide", "mix and coefficients of up to e^2", {"actions": (MIX, Choice("coefficient", {"reach": 2.0}))}),
    Variant("mix", "the mix alone", {"actions": (MIX,)}),
    Variant("residual", "offsets from the knapsack's sparsities", {"actions": SPARSITY, "start": "knapsack"}),
    Variant("absolute", "offsets from uniform sparsities", {"actions": SPARSITY}),
    Variant("blind", "as shipped, no curves seen", {"curves": False}),
    Variant("shaped", "offsets from the knapsack's, rewards shaped",
            {"actions": SPARSITY, "start": "knapsack", "shaping": 1.0}),
    Variant("sac", "as shipped, SAC", agent=Choice("sac"), updates=40),
    Variant("recurrent", "as shipped, an LSTM over the layers", agent=Choice("recurrent_ppo", PPO), updates=30),
    Variant("tqc", "as shipped, TQC", agent=Choice("tqc"), updates=40),
    Variant("td3", "as shipped, TD3", agent=Choice("td3"), updates=40),
)  # fmt: skip


def of_variant(variant: Variant, base: GeneralistConfig) -> GeneralistConfig:
    learning = base.learning.model_copy(update={"measured_share": 0.0, "updates": variant.updates})
    env = base.env.model_copy(update=variant.env)
    return base.model_copy(update={"env": env, "agent": variant.agent, "learning": learning})


def result_of(variant: Variant, folder: Path) -> Path:
    return folder / "generalist" / f"{variant.name}.json"


def run(variant: Variant, folder: Path, prepared: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Trains and judges one variant; `prepared` of another one serves all."""
    config = of_variant(variant, load_generalist_config(CONFIG))
    directory = cache_folder() / "benchmarks" / "generalist" / variant.name
    generalist = Generalist(config, directory, progress=Console(), prepared=prepared)
    _ = generalist.prepared
    started = time.perf_counter()
    best = generalist.train()
    seconds, made = time.perf_counter() - started, Provenance.here().to_json()
    write_json(result_of(variant, folder), {"what": variant.what, "seconds": seconds, **asdict(best), PROVENANCE: made})
    return generalist.prepared


def report(folder: Path) -> str:
    """The page, from the results that are there."""
    there = [variant for variant in VARIANTS if result_of(variant, folder).exists()]
    found = [read_json(result_of(variant, folder), "the variant's result") for variant in there]
    made = [Provenance(**row[PROVENANCE]) if PROVENANCE in row else None for row in found]
    machines, rows = Machines(made), []
    for variant, row, provenance in zip(there, found, made, strict=True):
        figures = [f"{100 * row[key]:+.1f}" for key in ("learned", "choosing", "held_out")]
        where = machines.cell([provenance])
        rows.append([variant.name, variant.what, *figures, f"{row['update'] + 1}", f"{row['seconds']:.0f}", *where])
    header = ("variant", "what", "learned", "choosing", "held out", "best update", "seconds", *machines.header)
    return page(
        "The design of a generalist",
        "generalist",
        "Percent of the knapsack's loss that the policy's plans avoid, without an evaluation, by surrogates: means "
        "over tasks, each counting alike; one training a variant, and two of one design end some percent apart.",
        markdown_table(header, rows, left=2),
        machines.legend(),
    )


def main(argv: Sequence[str]) -> int:
    names = [variant.name for variant in VARIANTS]
    parser = command_line("generalist", __doc__)
    parser.add_argument("--variants", type=among(names), default=names, help=f"of {', '.join(names)}; default all")
    add_report(parser)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    prepared: Mapping[str, Any] | None = None
    try:
        for variant in VARIANTS:
            done = result_of(variant, given.output).exists()
            if variant.name in given.variants and not given.report and not done:
                prepared = run(variant, given.output, prepared)
    finally:
        write_page(given.output, "generalist", report(given.output))
    return 0
