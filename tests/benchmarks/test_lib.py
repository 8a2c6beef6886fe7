"""What the benchmarks share: sweeps that go on, rows that say where they come from, pages, the command line."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

import benchmarks.__main__ as command
from autoprune.errors import AutopruneError, FileError
from autoprune.files import append_line
from autoprune.progress import SILENT
from benchmarks import BENCHMARKS
from benchmarks.lib import others as processes
from benchmarks.lib.command_line import add_report, add_seeds, among, command_line, listed
from benchmarks.lib.page import page
from benchmarks.lib.provenance import Machines, Provenance
from benchmarks.lib.sweep import PROVENANCE, Row, Rows, missing, seed_by_seed, sweep

FOLDER = Path(command.__file__).parent


@dataclass(frozen=True)
class Squared(Row):
    seed: int
    number: float
    square: float

    @property
    def key(self) -> tuple[int, float]:
        return self.seed, self.number


@pytest.fixture
def rows(tmp_path: Path) -> Rows[Squared]:
    return Rows(tmp_path / "squares" / "rows.jsonl", Squared)


def squared(point: tuple[int, float]) -> Squared:
    return Squared(*point, point[1] ** 2)


GRID = list(seed_by_seed(2, (1.0, 2.0)))


def test_a_grid_is_walked_seed_by_seed() -> None:
    assert GRID == [(0, 1.0), (0, 2.0), (1, 1.0), (1, 2.0)]


def test_a_sweep_that_was_stopped_goes_on(rows: Rows[Squared]) -> None:
    def stopped(point: tuple[int, float]) -> Squared:
        if point == GRID[2]:
            raise KeyboardInterrupt
        return squared(point)

    with pytest.raises(KeyboardInterrupt):
        sweep(rows, missing(rows, GRID), stopped, SILENT)
    assert missing(rows, GRID) == GRID[2:]
    assert sweep(rows, missing(rows, GRID), squared, SILENT) == 0
    assert list(rows.last().values()) == [squared(point) for point in GRID]
    assert missing(rows, GRID) == []
    assert missing(rows, GRID, redo=True) == GRID


def test_a_point_that_fails_is_counted_and_costs_no_other(rows: Rows[Squared]) -> None:
    def failing(point: tuple[int, float]) -> Squared:
        if point == GRID[1]:
            raise ZeroDivisionError
        return squared(point)

    assert sweep(rows, GRID, failing, SILENT) == 1
    assert missing(rows, GRID) == [GRID[1]]


def test_several_points_at_a_time(rows: Rows[Squared]) -> None:
    with ThreadPoolExecutor(2) as pool:
        assert sweep(rows, GRID, squared, SILENT, pool=pool, note=lambda row: f"{row.square}") == 0
    assert set(rows.last()) == set(GRID)


def test_a_row_says_where_it_was_measured_and_an_old_one_can_be_read(rows: Rows[Squared]) -> None:
    append_line(rows.path, {"seed": 0, "number": 1.0, "square": 7.0})
    rows.add(squared((0, 1.0)))
    (old, nowhere), (new, here) = rows.read()
    assert (old.square, nowhere) == (7.0, None)
    assert new.square == 1.0
    assert here == Provenance.here()
    assert {"cpu", "torch", "autoprune", "onnxruntime"} <= set(Provenance.here().machine)
    assert rows.last() == {(0, 1.0): new}, "the last one counts"


def test_rows_of_something_else_are_refused(rows: Rows[Squared]) -> None:
    append_line(rows.path, {"seed": 0, PROVENANCE: None})
    with pytest.raises(FileError, match="not what this benchmark writes"):
        rows.read()


def test_a_page_names_the_machine_of_each_row_where_they_are_several() -> None:
    one, other = (Provenance("abc", {"cpu": name, "cores": 2}) for name in ("One", "Other"))
    alone = Machines([one, one])
    assert (alone.header, alone.cell([one]), alone.legend()) == ((), (), "Machine: cpu One, cores 2.")
    assert Machines([None]).legend() == "Machine: not recorded."
    both = Machines([other, None, one])
    assert both.header == ("machine",)
    assert both.cell([other]) == ("B",)
    assert both.cell([None, one]) == ("A, C",)
    assert both.legend().splitlines() == [
        "- Machine A: cpu One, cores 2.", "- Machine B: cpu Other, cores 2.", "- Machine C: not recorded.",
    ]  # fmt: skip


def test_a_page() -> None:
    text = page("A title", "name --seeds 3", "What it is.", "a | table\n", "", "The foot.")
    assert text == (
        "# A title\n\nWritten by `python -m benchmarks name --seeds 3`. What it is.\n\na | table\n\nThe foot.\n"
    )


def test_the_options_that_benchmarks_share(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    parser = command_line("name", "What it does.")
    add_seeds(parser, 3)
    add_report(parser)
    parser.add_argument("--models", type=among(("one", "two")))
    parser.add_argument("--threads", type=listed(int))
    given = parser.parse_args(["--models", "one,two", "--threads", "1, 2", "--output", str(tmp_path), "--report"])
    assert (given.models, given.threads, given.output) == (("one", "two"), (1, 2), tmp_path)
    assert (given.seeds, given.report) == (3, True)
    assert parser.parse_args([]).output == FOLDER / "results"
    with pytest.raises(SystemExit):
        parser.parse_args(["--models", "tow"])
    assert "Did you mean 'two'" in capsys.readouterr().err


def test_the_list_has_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(BENCHMARKS)
    modules = {path.stem for path in FOLDER.glob("*.py") if "\ndef main(argv" in path.read_text(encoding="utf-8")}
    assert modules - {"__main__"} == set(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_says_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: python -m benchmarks {name} " in capsys.readouterr().out


def test_an_unknown_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["enigne"])
    assert "Did you mean 'engine'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [(KeyboardInterrupt(), 130, "goes on from here"), (AutopruneError("No such thing."), 1, "error: No such thing.")],
)
def test_how_a_benchmark_ends(
    error: BaseException, status: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: object) -> int:
        raise error

    monkeypatch.setattr("benchmarks.engine.main", main)
    assert command.main(["engine"]) == status
    assert told in capsys.readouterr().err


def test_the_readme_has_every_benchmark_and_all_that_is_used_of_repack() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)`", text, re.MULTILINE) == list(BENCHMARKS)
    sources = "".join(path.read_text(encoding="utf-8") for path in FOLDER.rglob("*.py"))
    used = set(re.findall(r"^from autoprune\.(repack\.[\w.]+) import", sources, re.MULTILINE))
    assert used == set(re.findall(r"^\| `(repack\.[\w.]+)`", text, re.MULTILINE))


@pytest.mark.parametrize(
    "arguments",
    [
        ["agents"], ["generalist"], ["recurrent_training"], ["methods"], ["methods", "--quick"],
        ["methods", "--task", "fashion_mnist_wide"], ["lenet"], ["lenet", "--data", "fashion_mnist", "--seeds", "1"],
        ["fine_grained"], ["fine_grained", "--quick"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_committed_pages_are_what_the_committed_rows_say(arguments: list[str], tmp_path: Path) -> None:
    for path in (FOLDER / "results").rglob("*.json*"):
        copied = tmp_path / path.relative_to(FOLDER / "results")
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(path.read_bytes())
    assert command.main([*arguments, "--report", "--output", str(tmp_path)]) == 0
    (written,) = tmp_path.glob("*.md")
    assert written.read_text(encoding="utf-8") == (FOLDER / "results" / written.name).read_text(encoding="utf-8")


def test_what_others_take_is_told_without_what_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, ours, clock = iter([100.0, 107.0]), iter([20.0, 22.0]), iter([3.0, 5.0])
    monkeypatch.setattr(processes, "_busy_s", lambda: next(busy))
    monkeypatch.setattr(processes, "_own_s", lambda: next(ours))
    monkeypatch.setattr("benchmarks.lib.others.time.perf_counter", lambda: next(clock))
    with processes.others() as found:
        pass
    assert found.cores == 2.5


def test_the_machine_has_been_busy_and_so_have_we() -> None:
    assert processes._busy_s() > processes._own_s() > 0
