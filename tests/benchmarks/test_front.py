"""The benchmark of large pruned against small dense networks: its points, and whom its page compares."""

from __future__ import annotations

from pathlib import Path

from benchmarks.front import FRONTS, METHODS, points
from benchmarks.front_report import DENSE, Outcome, report


def outcome(width: float, method: str, latency: float, validation: float, test: float) -> Outcome:
    return Outcome(
        seed=0,
        task="digits",
        width=width,
        method=method,
        setting="" if method == DENSE else "group-90",
        validation={"float32": validation, "int8": validation},
        test={"float32": test, "int8": test - 0.1},
        macs=1.0,
        seconds=1.0,
        reference_ms=2.0,
        latency={"repacked": latency, "repacked_int8": latency / 2, **({"openvino": 0.4} if method == DENSE else {})},
    )


ROWS = [
    outcome(1.0, DENSE, 0.5, 0.90, 0.90),
    outcome(2.0, "joint", 0.4, 0.93, 0.91),
    outcome(2.0, "gradual_scratch_erk", 0.3, 0.92, 0.95),  # better on the test split, which does not choose
    outcome(4.0, "joint", 0.6, 0.99, 0.99),  # slower than the dense network
]


def test_seeds_come_one_after_the_other_and_every_network_once() -> None:
    found = points(2, ("digits", "spoken_digits"), METHODS)
    assert len(set(found)) == len(found)
    assert [point.seed for point in found] == sorted(point.seed for point in found)
    assert {point.width for point in found if point.method == DENSE} >= set(FRONTS["digits"].dense)


def test_networks_are_as_wide_as_their_point_says() -> None:
    assert FRONTS["fashion_mnist"].at(1.5).task.args["widths"] == [24, 48, 96]
    assert FRONTS["spoken_digits"].at(0.5).task.args["hidden"] == 64
    assert FRONTS["digits"].at(0.5).key != FRONTS["digits"].at(1.0).key


def test_a_dense_network_meets_the_best_of_those_as_fast_by_validation(tmp_path: Path) -> None:
    text = report([(row, None) for row in ROWS], tmp_path)
    float32, int8 = (line for line in text.splitlines() if line.startswith("| 1x ") and "joint" in line)
    assert [cell.strip() for cell in float32.split("|")[1:-1]] == [
        "1x", "0.400", "openvino", "90.00", "2x, 90% cut, joint search and training", "0.400", "91.00", "+1.00",
    ]  # fmt: skip
    assert [cell.strip() for cell in int8.split("|")[1:5]] == ["1x", "0.250", "repacked_int8", "80.00"]
    assert "The reference takes 2.000 ms" in text
    assert (tmp_path / "front_digits.png").stat().st_size > 0
