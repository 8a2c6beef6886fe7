"""`python -m benchmarks main_job`: what its page says of given rows."""

from __future__ import annotations

from benchmarks.main_job import Job, report


def test_the_page_has_a_table_a_state_of_the_machine_and_a_mean() -> None:
    others = {"auto": 0.98, "uniform": 0.97}
    first = Job(0, False, 100.0, 2.0, 0.99, 0.98, "auto", others)
    second = Job(1, False, 200.0, 2.2, 0.99, 0.97, "knapsack", {"knapsack": 0.97})
    text = report([second, first, Job(0, True, 300.0, 2.1, 0.99, 0.98, "auto", others)])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert [line[0] for line in lines if not line[0].startswith("-")] == ["seed", "0", "1", "mean", "seed", "0", "mean"]
    assert lines[2] == ["0", "100", "2.00x", "99.00%", "auto", "98.00%", "98.00%", "97.00%", "-", "-"]
    assert lines[4][:4] == ["mean", "150", "2.10x", "99.00 ± 0.00"]
    assert lines[4][-4:] == ["98.00", "97.00", "97.00", "-"]
    assert "## While another process keeps one core busy" in text
