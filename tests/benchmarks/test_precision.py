"""The benchmark of precisions: its points and its page."""

from __future__ import annotations

from benchmarks.precision import PATTERNS_TRIED, points
from benchmarks.precision_report import DENSE, Outcome, report, table


def outcome(seed: int, pattern: str, sparsity: float, score: float, time_ms: float) -> Outcome:
    scores = {"float32": 0.9, "int8": score}
    return Outcome(seed, "digits", pattern, sparsity, sparsity, scores, {"float32": 1.0, "int8": time_ms})


ROWS = [
    outcome(0, "group 8", 0.75, 0.88, 0.2),
    outcome(0, DENSE, 0.0, 0.9, 0.4),
    outcome(1, DENSE, 0.0, 0.9, 0.6),
    outcome(1, "group 8", 0.75, 0.86, 0.2),
]


def test_seeds_come_one_after_the_other_and_dense_models_first() -> None:
    found = points(2, ("digits",), (0.75, 0.9))
    assert [point.seed for point in found] == sorted(point.seed for point in found)
    assert len(set(found)) == len(found) == 2 * (1 + 2 * len(PATTERNS_TRIED))
    assert found[0].pattern == DENSE
    assert found[0].sparsity == 0.0


def test_a_line_has_means_over_the_seeds_and_what_int8_changes() -> None:
    dense, pruned = table(ROWS)
    assert dense[:2] == ["0%", DENSE]
    assert pruned == [
        "75%",
        "group 8",
        "90.00 ± 0.00%",
        "87.00 ± 1.41%",
        "-3.00 ± 1.41",
        "1.000",
        "0.200",
        "5.00x",
        "2.50x",
    ]


def test_the_page_shows_the_last_row_of_a_point() -> None:
    text = report([(ROWS[1], None), (outcome(0, DENSE, 0.0, 0.5, 0.4), None)])
    assert "## digits, 1 seed\n" in text
    assert "50.00%" in text
    assert "not recorded" in text


def test_a_seed_without_its_dense_model_has_no_ratio_to_it() -> None:
    ((*_, ratio),) = table(ROWS[:1])
    assert ratio == "-"


def test_a_row_survives_its_file() -> None:
    assert Outcome.from_json(ROWS[0].to_json()) == ROWS[0]
