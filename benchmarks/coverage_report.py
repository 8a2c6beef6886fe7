"""The rows of ``python -m benchmarks coverage``, and the page made of them."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from autoprune.report.table import markdown_table
from benchmarks.coverage_models import MODELS
from benchmarks.lib.page import page
from benchmarks.lib.provenance import Machines, Provenance
from benchmarks.lib.sweep import Row

EQUAL = 1e-4  # of the largest output
GOAL = 2.0  # times as fast as the best dense engine
NONE = "-"


@dataclass(frozen=True)
class Covered(Row):
    """What became of one model; None, or nothing, of what was not reached.

    Attributes:
        model: family and name.
        seconds: of all that was done with it.
        form: ``program``, or ``modules`` for packed layers in the model's own code.
        why: it is no program.
        failure: what ended it early: an error, a signal, the end of the time; empty where nothing did.
        doing: what was being done then.
        planned: share of the prunable weights that the inventory offers.
        cold_s: seconds of repacking, with an empty cache.
        cached_s: likewise, when the cache knows the model.
        memory_mb: of the process before it was repacked.
        peak_mb: at most, until it was repacked.
        error: largest difference from the masked model, as a share of the largest output.
        saved_equal: whether the loaded model computes the same bits.
        native: share of the time that native code takes.
        torch_steps: operator of a program that torch runs -> how often, share of the time.
        batch: error with two samples, or the words of a refusal.
        size: likewise at another image size or sequence length.
        load: cores that other processes took while it was timed; of the first rows, the machine's load average.
        times_ms: medians; ``repacked``, ``eager`` (the masked model) and the dense engines.
        left_out: engine -> why.
        best: the fastest of all but ``repacked``.
        over_eager: times as fast as the masked model in torch.
        over_best: times as fast as `best`.
    """

    model: str
    seconds: float
    form: str = ""
    why: str = ""
    failure: str = ""
    doing: str = ""
    planned: float | None = None
    cold_s: float | None = None
    cached_s: float | None = None
    memory_mb: float | None = None
    peak_mb: float | None = None
    error: float | None = None
    saved_equal: bool | None = None
    native: float | None = None
    torch_steps: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    batch: float | str | None = None
    size: float | str | None = None
    load: float | None = None
    times_ms: Mapping[str, float] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    best: str = ""
    over_eager: float | None = None
    over_best: float | None = None

    @property
    def key(self) -> str:
        return self.model

    @property
    def family(self) -> str:
        return self.model.partition(":")[0]

    def __str__(self) -> str:
        times = "" if self.over_best is None else f", {self.over_best:.2f}x over {self.best}"
        return f"{self.form or 'not repacked'}{times}{f', {self.failure}' if self.failure else ''}"


Made = tuple[Covered, Provenance | None]


def report(rows: Sequence[Made]) -> str:
    """The page; the last row of a model counts."""
    found, models, machines, foot = _sorted(rows)
    about = (
        "Models of other people with random weights, 75% of every convolution, Linear and recurrent weight "
        "cut in groups of 8 filters (4, 2, 1 where 8 does not divide), repacked and called as their users "
        "call them; batch 1, one thread, float32. Speed-ups are medians of the ratios of one run, in which "
        "all are timed in turns: over torch with the same zeros, and over the best of the dense engines "
        "that can run the model."
    )
    parts = (
        "## In short", _summary(models), "## Why not one program", _reasons(models), "## What torch runs in programs",
        _operators(models), "## The models", _about_columns(), _table(found, machines), "## What ended early",
        _failures(models), foot,
    )  # fmt: skip
    return page("Any model in", "coverage", about, *parts)


def forms(rows: Sequence[Made]) -> str:
    """The page of what does not depend on a clock; the last row of a model counts."""
    found, models, machines, foot = _sorted(rows)
    about = (
        "What becomes of models of other people, with random weights, 75% of every convolution, Linear and recurrent "
        "weight cut in groups of 8 filters (4, 2, 1 where 8 does not divide), repacked and called as their users call "
        "them, float32, on one thread. Nothing was tuned and nothing was timed: how fast they are is "
        f"[another page](coverage.md). Tried so far: {len(models)} of the {len(MODELS)} models."
    )
    parts = (
        "## In short", markdown_table(FORMS, [_forms_line(name, group) for name, group in _groups(models)]),
        "## Why not one program", _reasons(models), "## What torch runs in programs", _operators(models, timed=False),
        "## What is refused or differs", _differences(models), "## The models", _forms_table(found, machines),
        "## What ended early", _failures(models), foot,
    )  # fmt: skip
    return page("Any model in: the forms", "coverage --forms", about, *parts)


def _sorted(rows: Sequence[Made]) -> tuple[list[Made], list[Covered], Machines, str]:
    """The last row of each model by its name, with and without provenance; the machines, and the foot of the page."""
    last = {row.key: (row, made) for row, made in rows}
    found = [last[key] for key in sorted(last)]
    machines = Machines(made for _, made in found)
    commits = sorted({made.commit for _, made in found if made is not None})
    return found, [row for row, _ in found], machines, f"{machines.legend()} Commit: {', '.join(commits) or 'unknown'}."


SUMMARY = (
    "family", "models", "repacked", "whole programs", "equal", "loaded: same bits", "other batch equal",
    "other size: equal, refused", "x torch: programs", "x torch: modules", "x best engine: programs",
    "x best engine: modules", f"at least {GOAL:g}x best",
)  # fmt: skip


def _summary(models: Sequence[Covered]) -> str:
    return markdown_table(SUMMARY, [_summary_line(name, rows) for name, rows in _groups(models)])


def _groups(models: Sequence[Covered]) -> list[tuple[str, Sequence[Covered]]]:
    """All models, then those of each family."""
    families = dict.fromkeys(row.family for row in models)
    return [("all", models), *((name, [row for row in models if row.family == name]) for name in families)]


def _summary_line(name: str, rows: Sequence[Covered]) -> list[str]:
    programs, modules = ([row for row in rows if row.form == form] for form in ("program", "modules"))
    compared = [row for row in rows if row.over_best is not None]
    return [
        *_agreement(name, rows),
        _median(row.over_eager for row in programs),
        _median(row.over_eager for row in modules),
        _median(row.over_best for row in programs),
        _median(row.over_best for row in modules),
        _of(sum((row.over_best or 0.0) >= GOAL for row in compared), len(compared)),
    ]


def _forms_line(name: str, rows: Sequence[Covered]) -> list[str]:
    programs = [row for row in rows if row.form == "program"]
    return [*_agreement(name, rows), _of(sum(not row.torch_steps for row in programs), len(programs))]


def _agreement(name: str, rows: Sequence[Covered]) -> list[str]:
    programs, modules = ([row for row in rows if row.form == form] for form in ("program", "modules"))
    return [
        name,
        str(len(rows)),
        str(len(programs) + len(modules)),
        _of(len(programs), len(rows)),
        _of(sum(_equal(row.error) for row in rows), sum(row.error is not None for row in rows)),
        _of(sum(bool(row.saved_equal) for row in rows), sum(row.saved_equal is not None for row in rows)),
        _of(sum(_equal(row.batch) for row in rows), sum(row.batch is not None for row in rows)),
        f"{sum(_equal(row.size) for row in rows)}, {sum(isinstance(row.size, str) for row in rows)}",
    ]


FORMS = (*SUMMARY[:8], "programs without torch")


def _equal(error: float | str | None) -> bool:
    return isinstance(error, float) and error <= EQUAL


def _of(count: int, all_of: int) -> str:
    return f"{count} of {all_of}"


def _median(values: Iterable[float | None]) -> str:
    """With the least and the most."""
    known = sorted(value for value in values if value is not None)
    return f"{statistics.median(known):.2f} ({known[0]:.2f}-{known[-1]:.2f})" if known else NONE


def _reasons(models: Sequence[Covered]) -> str:
    """Counted without what stands in quotes: the name of a value is the model's own."""
    reasons: dict[str, list[str]] = {}
    for row in models:
        if row.why:
            reasons.setdefault(re.sub(r"'[^']*'", "'...'", row.why), []).append(row.model)
    ranked = sorted(reasons.items(), key=lambda item: -len(item[1]))
    lines = [[why, str(len(names)), ", ".join(names)] for why, names in ranked]
    return markdown_table(("reason", "models", "which"), lines, remarks=True) if lines else "All are."


def _operators(models: Sequence[Covered], timed: bool = True) -> str:
    programs, calls, shares = Counter[str](), Counter[str](), dict[str, list[float]]()
    for row in models:
        for operator, (count, share) in row.torch_steps.items():
            programs[operator] += 1
            calls[operator] += count
            shares.setdefault(operator, []).append(share)
    lines = [
        [name, str(count), str(calls[name]), _percent(statistics.median(shares[name])), _percent(max(shares[name]))]
        for name, count in programs.most_common()
    ]
    header = ("operator", "programs", "calls", "share of the time: median", "most")
    columns = len(header) if timed else 3
    whole = sum(row.form == "program" and not row.torch_steps for row in models)
    told = f"Programs without any: {_of(whole, sum(row.form == 'program' for row in models))}."
    return f"{told}\n\n{markdown_table(header[:columns], [line[:columns] for line in lines])}" if lines else told


def _differences(models: Sequence[Covered]) -> str:
    """A line for each call that is refused or gives something else."""
    lines = []
    for row in models:
        for what, found in (("as in the example", row.error), ("another batch", row.batch), ("another size", row.size)):
            if found is not None and not _equal(found):
                lines.append([row.model, what, found if isinstance(found, str) else f"differs by {found:.0e}"])
        if row.saved_equal is False:
            lines.append([row.model, "loaded", "differs"])
    return markdown_table(("model", "call", "what"), lines, remarks=True) if lines else "Nothing."


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.0f}%"


def _about_columns() -> str:
    return (
        "`native`: share of the time that native code takes; `planned`: share of the prunable weights that "
        "autoprune itself would offer for pruning; `load`: cores that other processes took while the model was "
        "timed, which interrupt long calls more than short ones, so that speed-ups look larger than they are; "
        "`repack s`: with an empty cache, and when the cache knows the model; "
        "`MB`: peak of the process, and how much repacking added; `error`: of the largest output; "
        "`loaded`: whether the model that is read from a file computes the same bits."
    )


Column = tuple[str, Callable[[Covered], str]]
COLUMNS: Sequence[Column] = (
    ("form", lambda row: row.form or "none"),
    ("native", lambda row: _percent(row.native)),
    ("planned", lambda row: _percent(row.planned)),
    ("ms", lambda row: _number(row.times_ms.get("repacked"), ".2f")),
    ("x torch", lambda row: _number(row.over_eager, ".2f")),
    ("x best", lambda row: _number(row.over_best, ".2f")),
    ("best", lambda row: row.best or NONE),
    ("load", lambda row: _number(row.load, ".1f")),
    ("repack s", lambda row: f"{_number(row.cold_s, '.1f')}, {_number(row.cached_s, '.1f')}"),
    ("MB", lambda row: _memory(row)),
    ("error", lambda row: _number(row.error, ".0e")),
    ("loaded", lambda row: {True: "equal", False: "differs", None: NONE}[row.saved_equal]),
    ("other batch", lambda row: _other(row.batch)),
    ("other size", lambda row: _other(row.size)),
    ("why no program, or what torch runs", lambda row: row.why or _steps(row)),
)


def _forms_table(found: Sequence[Made], machines: Machines) -> str:
    kept = ("form", "error", "loaded", "other batch", "other size")
    told: Column = ("why no program, or what torch runs", lambda row: row.why or _steps(row, timed=False))
    return _table(found, machines, (*(column for column in COLUMNS if column[0] in kept), told))


def _table(found: Sequence[Made], machines: Machines, columns: Sequence[Column] = COLUMNS) -> str:
    names = [name for name, _ in columns]
    lines = []
    for row, made in found:
        *cells, remark = (cell(row) for _, cell in columns)
        commit = made.commit if made else "unknown"
        lines.append([row.model, *cells, *machines.cell([made]), commit, remark])
    return markdown_table(("model", *names[:-1], *machines.header, "commit", names[-1]), lines, left=2, remarks=True)


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _memory(row: Covered) -> str:
    if row.peak_mb is None or row.memory_mb is None:
        return NONE
    return f"{row.peak_mb:.0f} (+{max(0.0, row.peak_mb - row.memory_mb):.0f})"


def _other(error: float | str | None) -> str:
    return "refused" if isinstance(error, str) else _number(error, ".0e")


def _steps(row: Covered, timed: bool = True) -> str:
    steps = row.torch_steps.items()
    return ", ".join(f"{name} x{count}" + (f" ({_percent(share)})" if timed else "") for name, (count, share) in steps)


def _failures(models: Sequence[Covered]) -> str:
    lines = [f"- {row.model}, {row.doing or 'before anything'}: {row.failure}" for row in models if row.failure]
    return "\n".join(lines) or "Nothing."
