"""What `python -m benchmarks methods` keeps and shows: a row a run, the table, the plots."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from autoprune.files import write_text
from autoprune.report.plots import save_png
from autoprune.report.table import MISSING, markdown_table, mean_and_spread
from benchmarks.lib.page import page
from benchmarks.lib.sweep import Row, Rows
from benchmarks.methods_table import RECIPES, SETTINGS, Shown

DENSE = "dense"


@dataclass(frozen=True, order=True)
class Job:
    """One run: a row of RECIPES in a row of SETTINGS (none for dense training), with one seed."""

    method: str
    setting: str
    seed: int

    def __str__(self) -> str:
        return " ".join(part for part in (self.method, self.setting, f"seed {self.seed}") if part)

    @property
    def key(self) -> str:
        """For file names."""
        return "-".join(part for part in (self.method, self.setting.replace(":", "of"), str(self.seed)) if part)


@dataclass(frozen=True)
class Outcome(Row):
    """What a run came to.

    Attributes:
        validation, test: accuracy, in [0, 1].
        seconds: processor time of training, the dense start included.
        sparsities: layer -> share of zeros.
        macs: multiply-accumulates left, filters that nobody reads counted out, over the dense model's.
        rounds: of an iterative method: the validation accuracy at the end of each round, before the next one's cut;
            the last one's is the run's own. Empty for other methods, and where the run was stopped in between.
    """

    job: Job
    validation: float
    test: float
    seconds: float
    sparsities: Mapping[str, float]
    macs: float = 1.0
    rounds: Sequence[float] = ()

    @property
    def key(self) -> Job:
        return self.job

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        return cls(**{**data, "job": Job(**data["job"])})


@dataclass(frozen=True)
class Timing(Row):
    """A run's repacked model against the dense model, in turns: how many times faster.

    Attributes:
        over_eager: than torch eager.
        best: the fastest dense engine.
        over_best: than that engine.
        machine: where it was timed.
    """

    job: Job
    over_eager: float
    best: str
    over_best: float
    machine: str

    @property
    def key(self) -> Job:
        return self.job

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Timing:
        return cls(**{**data, "job": Job(**data["job"])})


def runs_of(folder: Path, shown: Shown) -> Rows[Outcome]:
    """Every run that ended; `folder` is that of all results."""
    return Rows(folder / "methods" / shown.name / "runs.jsonl", Outcome)


def times_of(folder: Path, shown: Shown) -> Rows[Timing]:
    return Rows(folder / "methods" / shown.name / "times.jsonl", Timing)


def report(folder: Path, shown: Shown) -> str:
    """Writes the page and the plots of a task; returns the page."""
    outcomes = [*runs_of(folder, shown).last().values()]
    timings = {timing.job: timing for timing in times_of(folder, shown).last().values()}
    dense = {outcome.job.seed: outcome for outcome in outcomes if outcome.job.method == DENSE}
    settings = [name for name in SETTINGS if any(outcome.job.setting == name for outcome in outcomes)]
    sections = [_section(name, outcomes, dense, timings) for name in settings]
    sections += [rounds for name in settings if (rounds := _rounds(name, outcomes))]
    timed = [f"Timed on {machine}." for machine in sorted({timing.machine for timing in timings.values()})]
    about = _about(shown, dense)
    text = page(f"Training methods: {shown.name}", f"methods --task {shown.name}", about, *sections, *timed)
    write_text(folder / f"methods_{shown.name}.md", text)
    if settings and dense:
        save_png(_figure(settings, outcomes, dense), folder / f"methods_{shown.name}.png")
    return text


def _about(shown: Shown, dense: Mapping[int, Outcome]) -> str:
    accuracy = mean_and_spread([100 * outcome.test for outcome in dense.values()])
    seconds = statistics.fmean(outcome.seconds for outcome in dense.values()) if dense else 0.0
    return (
        f"{shown.task}, {shown.epochs} epochs in every "
        f"run; those marked * start from a dense model trained for {shown.start_epochs} of them. All layers "
        "but the first and the last are pruned, to the same number of weights in every run of a setting; 97% is the "
        "share of zeros. Accuracy on the test "
        "split, percent: mean ± standard deviation over the seeds; every choice was made on a validation split.\n\n"
        f"Dense: {accuracy}%, {seconds:.0f} s of training on one thread, seeds {sorted(dense)}."
    )


def _section(
    setting: str, outcomes: Sequence[Outcome], dense: Mapping[int, Outcome], timings: Mapping[Job, Timing]
) -> str:
    header = (
        "method",
        "",
        "seeds",
        "test accuracy",
        "points under dense",
        "MACs left",
        "faster than eager",
        "than the best dense",
        "training s",
    )
    rows = []
    for name, recipe in RECIPES.items():
        runs = [outcome for outcome in outcomes if (outcome.job.method, outcome.job.setting) == (name, setting)]
        if not runs:
            continue
        lost = [100 * (dense[run.job.seed].test - run.test) for run in runs if run.job.seed in dense]
        timing = next((timings[run.job] for run in runs if run.job in timings), None)
        rows.append(
            (
                name + ("*" if recipe.from_trained else ""),
                recipe.what,
                str(len(runs)),
                mean_and_spread([100 * run.test for run in runs]),
                mean_and_spread(lost),
                f"{100 * statistics.fmean(run.macs for run in runs):.1f}%",
                f"{timing.over_eager:.2f}x" if timing else MISSING,
                f"{timing.over_best:.2f}x ({timing.best})" if timing else MISSING,
                f"{statistics.fmean(run.seconds for run in runs):.0f}",
            )
        )
    rows.sort(key=lambda row: float(row[4].split()[0]) if row[4] != MISSING else 0.0)
    return f"## {setting}\n\n{markdown_table(header, rows, left=2)}"


def _rounds(setting: str, outcomes: Sequence[Outcome]) -> str:
    """Of the methods that prune in rounds, what each round comes to; empty when none was run."""
    runs: dict[str, list[Sequence[float]]] = {}
    for outcome in outcomes:
        if outcome.job.setting == setting and outcome.rounds:
            runs.setdefault(outcome.job.method, []).append(outcome.rounds)
    if not runs:
        return ""
    count = max(len(rounds) for found in runs.values() for rounds in found)
    header = ("round", *(f"{name} ({len(found)} seeds)" for name, found in runs.items()))
    rows = []
    for at in range(count):
        ended = [mean_and_spread([100 * rounds[at] for rounds in found if at < len(rounds)]) for found in runs.values()]
        rows.append((str(at + 1), *ended))
    return (
        f"## {setting}, round by round\n\nValidation accuracy, percent, at the end of each round, before the next "
        f"one's cut, batch norms recalibrated; the last row is the trained model's.\n\n{markdown_table(header, rows)}"
    )


def _figure(settings: Sequence[str], outcomes: Sequence[Outcome], dense: Mapping[int, Outcome]) -> Figure:
    """Points under dense, a row a method, a panel a setting; a dot a seed."""
    names = [name for name in RECIPES if any(outcome.job.method == name for outcome in outcomes) and name != DENSE]
    figure = Figure(figsize=(3.2 * len(settings) + 1.6, 0.32 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    for axis, setting in zip(axes, settings, strict=True):
        for place, name in enumerate(reversed(names)):
            lost = [
                100 * (dense[run.job.seed].test - run.test)
                for run in outcomes
                if (run.job.method, run.job.setting) == (name, setting) and run.job.seed in dense
            ]
            axis.plot(lost, [place] * len(lost), "o", markersize=4, alpha=0.8)
        axis.axvline(0.0, color="0.6", linewidth=0.8)
        axis.set(title=setting, xlabel="points under dense")
        axis.set_yticks(range(len(names)), list(reversed(names)))
        axis.grid(axis="x", alpha=0.3)
    return figure
