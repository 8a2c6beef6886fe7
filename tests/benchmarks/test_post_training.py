"""The benchmark of post-training pruning: its points, its page, a model that is not there."""

from __future__ import annotations

import pytest

from autoprune.errors import MissingExtra
from benchmarks.post_training import CRITERIA_TRIED, FITS, points
from benchmarks.post_training_encoder import PACKAGES, folder_of
from benchmarks.post_training_report import ENCODER, Outcome, report, table


def outcome(seed: int, sparsity: float, fit: str, score: float, subject: str = "digits") -> Outcome:
    return Outcome(seed, subject, sparsity, "magnitude", fit, score, 0.98, 3, 12.0 + seed)


ROWS = [outcome(0, 0.9, "dense", 0.9), outcome(1, 0.9, "dense", 0.92), outcome(0, 0.5, "none", 0.8)]


def test_the_encoder_has_one_seed() -> None:
    found = points(2, ("digits", ENCODER), (0.5, 0.75), FITS)
    assert len(set(found)) == len(found) == 3 * 2 * len(CRITERIA_TRIED) * len(FITS)
    assert {point.seed for point in found if point.subject == ENCODER} == {0}


def test_a_line_has_means_over_the_seeds_and_what_was_not_measured_is_left_open() -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(ROWS).splitlines()]
    assert lines[0] == ["sparsity", "criterion", "kept weights as they were", "fitted to the dense model", "seconds"]
    assert lines[2:] == [
        ["50%", "magnitude", "80.00%", "-", "12.0"],
        ["90%", "magnitude", "-", "91.00 ± 1.41%", "13.0"],
    ]


def test_the_page_says_what_was_trained_for_how_long() -> None:
    page = report([(row, None) for row in ROWS])
    assert "Dense: 98.00 ± 0.00%, 2 seed(s), trained for 3 epochs." in page
    came_trained = Outcome(0, ENCODER, 0.5, "obs", "own", 0.9, 1.0, 0, 3.0)
    assert "the model came trained" in report([(came_trained, None)])


def test_what_is_not_installed_is_said_with_the_command() -> None:
    with pytest.raises(MissingExtra, match="the encoder needs no_such_package: pip install") as said:
        folder_of("no_such_package")
    assert PACKAGES in str(said.value)
