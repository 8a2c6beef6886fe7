"""The rows of `python -m benchmarks post_training`, and its page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoprune.report.table import markdown_table, mean_and_spread
from benchmarks.lib.page import page
from benchmarks.lib.provenance import Machines, Provenance
from benchmarks.lib.sweep import Row

ENCODER = "encoder"
FIT_NAMES = {"none": "kept weights as they were", "own": "fitted to own output", "dense": "fitted to the dense model"}


@dataclass(frozen=True)
class Outcome(Row):
    """One pruned model.

    Attributes:
        seed: of the task and its dense training.
        subject: what was pruned.
        sparsity: of every layer that was.
        criterion: and its steps.
        fit: what kept weights were fitted to.
        score: accuracy on the test split, or the mean cosine to the dense model's embeddings, in [0, 1].
        dense: the dense model's.
        epochs: of the dense training; 0 for a model that came trained.
        seconds: of one processor, that pruning took.
    """

    seed: int
    subject: str
    sparsity: float
    criterion: str
    fit: str
    score: float
    dense: float
    epochs: int
    seconds: float

    @property
    def key(self) -> tuple[int, str, float, str, str]:
        return self.seed, self.subject, self.sparsity, self.criterion, self.fit


def report(rows: Sequence[tuple[Outcome, Provenance | None]]) -> str:
    """The page: a table for each subject, a line for each sparsity and criterion."""
    latest = {row.key: (row, made) for row, made in rows}
    machines = Machines(made for _, made in latest.values())
    outcomes = [row for row, _ in latest.values()]
    parts = []
    for subject in dict.fromkeys(each.subject for each in outcomes):
        own = [each for each in outcomes if each.subject == subject]
        parts += [f"## {subject}", _about(own), table(own)]
    return page(
        "Post-training pruning",
        "post_training",
        "Trained models, pruned in groups of 8 filters without labels and training: what is left of their accuracy on "
        "the test split, or of the cosine to the dense model's embeddings. Every layer alike, of digits and "
        "Fashion-MNIST all but the first and the last. Biases are corrected and batch norms recalibrated in all of "
        "them; the columns differ in what kept weights are fitted to, layer after layer, on what the model that is "
        "pruned so far gives. `obs` in several steps inverts the Hessian anew before each. Seconds: processor time of "
        "pruning, the slowest column's.",
        *parts,
        machines.legend(),
    )


def _about(own: Sequence[Outcome]) -> str:
    dense = {each.seed: 100 * each.dense for each in own}
    if own[0].epochs == 0:
        return "Dense: 100%, by definition; the model came trained."
    epochs = " and ".join(str(count) for count in sorted({each.epochs for each in own}))
    return f"Dense: {mean_and_spread(list(dense.values()))}%, {len(dense)} seed(s), trained for {epochs} epochs."


def table(own: Sequence[Outcome]) -> str:
    """The lines of one subject, from sparsity to sparsity; ``-`` where nothing was measured."""
    fits = [fit for fit in FIT_NAMES if any(each.fit == fit for each in own)]
    lines = []
    for sparsity, criterion in sorted(
        dict.fromkeys((each.sparsity, each.criterion) for each in own), key=lambda x: x[0]
    ):
        found = [each for each in own if (each.sparsity, each.criterion) == (sparsity, criterion)]
        scores = [[100 * each.score for each in found if each.fit == fit] for fit in fits]
        cells = [f"{mean_and_spread(each)}%" if each else "-" for each in scores]
        lines.append([f"{100 * sparsity:g}%", criterion, *cells, f"{max(each.seconds for each in found):.1f}"])
    header = ("sparsity", "criterion", *(FIT_NAMES[fit] for fit in fits), "seconds")
    return markdown_table(header, lines, left=2)
