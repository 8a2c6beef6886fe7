"""What a generalist's design is worth: actions, what is seen, shaping, learners. About 40 minutes of a core.

    python benchmarks/generalist.py                  # goes on where it was stopped
    python benchmarks/generalist.py --variants shipped absolute
    python benchmarks/generalist.py --report

Every variant learns the same family from the same seed, by surrogates alone, and is judged by them: the share of the
knapsack's loss that its plans avoid, on tasks it learned from, tasks that choose among its policies, and tasks of other
builds. The learners that learn from one episode at a time get the seconds that PPO takes. The tasks are made ready
first, once (`autoprune train configs/generalist.toml`). Writes benchmarks/results/generalist.md.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from autoprune.config import GeneralistConfig, load_generalist_config
from autoprune.files import cache_folder, read_json, write_json, write_text
from autoprune.latency.machine import machine_text
from autoprune.pipeline.generalist import Generalist
from autoprune.registry import Choice
from autoprune.report.console import Console
from autoprune.report.table import markdown_table

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CONFIG = HERE.parent / "configs" / "generalist.toml"
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


def run(variant: Variant, prepared: dict[str, Any] | None) -> dict[str, Any]:
    """Trains and judges one variant; `prepared` of another one serves all."""
    path = RESULTS / "generalist" / f"{variant.name}.json"
    config = of_variant(variant, load_generalist_config(CONFIG))
    directory = cache_folder() / "benchmarks" / "generalist" / variant.name
    generalist = Generalist(config, directory, progress=Console(), prepared=prepared)
    _ = generalist.prepared
    started = time.perf_counter()
    best = generalist.train()
    write_json(path, {"what": variant.what, "seconds": time.perf_counter() - started, **asdict(best)})
    return generalist.prepared


def page() -> str:
    rows = []
    for variant in VARIANTS:
        path = RESULTS / "generalist" / f"{variant.name}.json"
        if path.exists():
            found = read_json(path, "the variant's result")
            figures = [f"{100 * found[key]:+.1f}" for key in ("learned", "choosing", "held_out")]
            rows.append([variant.name, variant.what, *figures, f"{found['update'] + 1}", f"{found['seconds']:.0f}"])
    header = ("variant", "what", "learned", "choosing", "held out", "best update", "seconds")
    text = "\n\n".join(
        [
            "# The design of a generalist",
            "Percent of the knapsack's loss that the policy's plans avoid, without an evaluation, by surrogates: means "
            f"over tasks, each counting alike; one training a variant, and two of one design end some percent apart. "
            f"{machine_text()}",
            markdown_table(header, rows, left=2),
        ]
    )
    write_text(RESULTS / "generalist.md", text + "\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="*", default=[variant.name for variant in VARIANTS])
    parser.add_argument("--report", action="store_true", help="train nothing: write the page of what is there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    prepared = None
    for variant in VARIANTS:
        done = (RESULTS / "generalist" / f"{variant.name}.json").exists()
        if variant.name in given.variants and not given.report and not done:
            prepared = run(variant, prepared)
            page()
    print(page())


if __name__ == "__main__":
    main()
