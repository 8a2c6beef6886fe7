"""Tables are aligned markdown, whatever is in them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from autoprune.latency.timer import Latency
from autoprune.metric import BITS_PER_CHARACTER
from autoprune.report.data import MethodRow, PlanRow, ResultRow, SearchRow
from autoprune.report.table import (
    markdown_table,
    mean_and_spread,
    methods_table,
    plan_table,
    result_table,
    search_table,
    size,
)

# No control characters: rich counts some of them as zero cells wide and so do terminals.
TEXT = st.text(st.characters(exclude_categories=["C", "M"]), max_size=12)


@given(st.integers(1, 4).flatmap(lambda width: st.lists(st.lists(TEXT, min_size=width, max_size=width), min_size=1)))
def test_every_line_has_the_same_width_and_the_same_number_of_cells(rows: list[list[str]]) -> None:
    lines = markdown_table(rows[0], rows[1:]).splitlines()
    assert len(lines) == len(rows) + 1
    assert len({cell_len(line) for line in lines}) == 1
    assert {line.replace("\\|", "").count("|") for line in lines} == {len(rows[0]) + 1}


def test_figures_are_aligned_to_the_right() -> None:
    table = markdown_table(("name", "ms"), [("dense", "10.5"), ("pruned", "3.1")])
    assert table == "| name   |   ms |\n| ------ | ---: |\n| dense  | 10.5 |\n| pruned |  3.1 |\n"


def test_remarks_are_to_the_left_and_not_filled_up() -> None:
    table = markdown_table(
        ("name", "ms", "remark"), [("a", "10.5", "far too slow for us"), ("b", "1", "-")], remarks=True
    )
    assert table.splitlines() == [
        "| name |   ms | remark |",
        "| ---- | ---: | --- |",
        "| a    | 10.5 | far too slow for us |",
        "| b    |    1 | - |",
    ]


def test_the_table_of_methods_has_the_best_first_and_what_failed_last() -> None:
    rows = [
        MethodRow("joint", remark="cannot do it: no."),
        MethodRow("gradual", 0.9, 1.5, 3.0, 0.25, 1.26, "missed: 1.50x of 2x"),
        MethodRow("adaptive", 0.95, 2.0, 4.0, 0.2, 0.5),
    ]
    assert methods_table(rows).splitlines() == [
        "| method   | accuracy | vs best dense | speed-up | weights kept | minutes | remark |",
        "| -------- | -------: | ------------: | -------: | -----------: | ------: | --- |",
        "| adaptive |   95.00% |         2.00x |    4.00x |        20.0% |    0.50 | - |",
        "| gradual  |   90.00% |         1.50x |    3.00x |        25.0% |    1.26 | missed: 1.50x of 2x |",
        "| joint    |        - |             - |        - |            - |       - | cannot do it: no. |",
    ]


def test_a_ragged_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        markdown_table(("a", "b"), [("1",)])


@pytest.mark.parametrize(
    ("values", "form", "text"),
    [([], ".2f", "-"), ([1.0], ".2f", "1.00"), ([1.0, 3.0], ".1f", "2.0 ± 1.4"), ([-1.0, -1.0], "+.2f", "-1.00 ± 0.00"),
     ([0.25, 0.75], "+.2f", "+0.50 ± 0.35")],
)  # fmt: skip
def test_a_mean_and_its_spread(values: list[float], form: str, text: str) -> None:
    assert mean_and_spread(values, form) == text


def test_the_result_table() -> None:
    rows = [
        ResultRow("dense, eager", 0.9812, Latency(3.2, 3.1, 3.4, (3.2,), 1), 1.0, 0.5, 1_234_567, 4_938_268),
        ResultRow("dense, openvino", latency=Latency(1.6, 1.55, 1.7, (1.6,), 1), speedup=2.0, speedup_over_best=1.0),
    ]
    assert result_table(rows).splitlines() == [
        "| model           | accuracy | latency ms (p10-p90) | speed-up | vs best dense | parameters | size on disk |",
        "| --------------- | -------: | -------------------: | -------: | ------------: | ---------: | -----------: |",
        "| dense, eager    |   98.12% |  3.200 (3.100-3.400) |    1.00x |         0.50x |  1,234,567 |      4.94 MB |",
        "| dense, openvino |        - |  1.600 (1.550-1.700) |    2.00x |         1.00x |          - |            - |",
    ]


def test_what_was_left_out_of_the_result_table_is_told_below_it() -> None:
    rows = [ResultRow("dense, eager", 0.98), ResultRow("dense, openvino", left_out="it cannot run this model.")]
    lines = result_table(rows).splitlines()
    assert [line for line in lines if line.startswith("|") and "openvino" in line] == []
    assert lines[-1] == "dense, openvino left out: it cannot run this model."


def test_the_plan_table_ends_with_the_sparsity_of_all_weights() -> None:
    rows = [
        PlanRow("conv1", 100, 0.5, "group(size=8)", "magnitude", "jit", 12.0, 7.25),
        PlanRow("conv2", 300, 0.9, "group(size=8)", "magnitude", "jit"),
    ]
    last = plan_table(rows).splitlines()[-1]
    assert "all of these" in last
    assert "80.0%" in last
    assert " 400 " in last


def test_the_search_table() -> None:
    row = SearchRow("ppo", 300, -0.25, 0.9765, 1.5, 3.02)
    assert search_table([row]).splitlines()[-1] == (
        "| ppo           |         300 |     -0.2500 |   97.65% |      1.500 |      3.02x |"
    )


def test_tables_of_another_metric_say_its_name_and_its_figures() -> None:
    rows = [ResultRow("dense, eager", -2.0625), ResultRow("dense, openvino")]
    cells = [[cell.strip() for cell in line.split("|")] for line in result_table(rows, BITS_PER_CHARACTER).splitlines()]
    assert [line[2] for line in cells] == ["bits per character", "-----------------:", "2.0625", "-"]
    found = search_table([SearchRow("ppo", 300, -0.25, -2.0625, 1.5, 3.02)], BITS_PER_CHARACTER)
    assert "| bits per character |" in found
    assert "|             2.0625 |" in found


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_499, "999 kB"), (999_500, "1 MB"), (1_234_567, "1.23 MB"),
     (999_600_000, "1 GB"), (45_000_000_000, "45 GB"), (None, "-")],
)  # fmt: skip
def test_sizes_read_well(size_bytes: int | None, text: str) -> None:
    assert size(size_bytes) == text
