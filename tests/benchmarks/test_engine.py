"""`python -m benchmarks engine`: which cells and masks there are, that it goes on where it stopped, what it writes."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from autoprune.errors import FileError
from autoprune.files import append_line
from autoprune.latency.engines.eager import Eager
from autoprune.masks import sparsity
from autoprune.progress import SILENT
from autoprune.tasks.zoo.standard import standard_input, standard_model
from benchmarks import engine, engine_report
from benchmarks.engine_report import Row
from benchmarks.lib.sweep import Rows

NOTHING = engine.Dense(torch.nn.Identity(), torch.zeros(0), {}, {}, {}, {})


@pytest.fixture
def rows(tmp_path: Path) -> Rows[Row]:
    return engine_report.results_file(tmp_path, "here")


def row(cell: Any, speedup: float = 2.0) -> Row:
    ms = engine_report.spread([4.0, 2.0, 3.0])
    return Row(
        cell=cell,
        times_ms={"eager": ms, "openvino": ms, "openvino_int8": ms, engine_report.REPACKED: ms},
        deepsparse_ms=None,
        left_out={"compile": "no compiler"},
        best="openvino",
        speedup=speedup,
        speedup_spread=engine_report.spread([speedup]),
        relative_error=1e-6,
        repack_s=0.5,
        rounds=3,
        load=0.1,
        commit="abc",
        best_any="openvino_int8",
        speedup_any=speedup / 2,
        snr_db={"openvino": 120.0, "openvino_int8": 31.4, engine_report.REPACKED: 28.6},
        notes={"onnxruntime_int8": "static quantisation"},
    )


def test_the_table_has_every_cell_once() -> None:
    found = list(engine.cells(("a", "b"), (0.0, 0.5, 0.9), (1, 8), (1, 16), (1, 2)))
    assert len(found) == len(set(found)) == 2 * (1 + 2 * 2) * 2 * 2
    shared = [(cell.model, cell.batch, cell.threads) for cell in found]
    changes = sum(a != b for a, b in itertools.pairwise(shared))
    assert changes == 2 * 2 * 2 - 1, "engines are prepared once for the cells that share them"


@pytest.mark.parametrize(("name", "layers"), [("resnet18", 19), ("mobilenet_v2", 34), ("vit_small", 48)])
def test_what_is_pruned(name: str, layers: int) -> None:
    model = standard_model(name)
    x = standard_input(name, 1)
    masks = engine.group_masks(model, x, 0.75, 8)
    assert len(masks) == layers
    assert all(abs(sparsity(mask) - 0.75) < 0.01 for mask in masks.values())
    assert not any(module in masks for module in ("head", "0", "embed"))
    if name == "mobilenet_v2":
        assert all(mask.shape[2:] == (1, 1) for mask in masks.values())
    assert engine.group_masks(model, x, 0.0, 1) == {}


def test_goes_on_with_the_first_missing_cell(rows: Rows[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = list(engine.cells(("resnet18",), (0.0, 0.5), (1, 8), (1,), (1,)))
    prepared, measured = [], []

    def prepare(cell: Any, *_: Any) -> engine.Dense:
        prepared.append(cell)
        return NOTHING

    def measure(cell: Any, *_: Any) -> Any:
        measured.append(cell)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return row(cell)

    monkeypatch.setattr(engine, "prepare", prepare)
    monkeypatch.setattr(engine, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        engine.run(rows, wanted, 1.0, False, None, SILENT)
    assert engine.run(rows, wanted, 1.0, False, None, SILENT) == 0
    assert measured == [wanted[0], wanted[1], wanted[1], wanted[2]]
    assert prepared == [wanted[0], wanted[1]]
    assert engine.run(rows, wanted, 1.0, False, None, SILENT) == 0
    assert len(measured) == 4, "all is measured"
    engine.run(rows, wanted, 1.0, True, None, SILENT)
    assert len(measured) == 7


def test_a_cell_that_fails_is_counted_and_tried_again(rows: Rows[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = list(engine.cells(("resnet18",), (0.5,), (1, 8), (1,), (1,)))

    def measure(cell: Any, *_: Any) -> Any:
        if cell.group == 1:
            raise KeyError("gelu")
        return row(cell)

    monkeypatch.setattr(engine, "prepare", lambda *_: NOTHING)
    monkeypatch.setattr(engine, "measure", measure)
    assert engine.run(rows, wanted, 1.0, False, None, SILENT) == 1
    assert engine.run(rows, wanted, 1.0, False, None, SILENT) == 1
    assert list(rows.last()) == [wanted[1]]


def test_engines_far_behind_are_timed_once(rows: Rows[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    timed = list[Any]()
    wanted = list(engine.cells(("resnet18",), (0.0, 0.5), (8,), (1,), (1, 2)))

    def prepare(cell: Any, far: Any, _: Any) -> Any:
        names = [name for name in ("eager", "compile", "openvino", "openvino_bf16", "openvino_int8") if name not in far]
        return dataclasses.replace(NOTHING, calls=dict.fromkeys(names, lambda: None), left_out=dict(far))

    def measure(cell: Any, dense: Any, *_: Any) -> Any:
        timed.append(sorted(dense.calls))
        ms = {"eager": 8.0, "compile": 4.4, "openvino": 4.0, "openvino_bf16": 2.0, "openvino_int8": 1.0}
        times = {name: engine_report.spread([ms[name]]) for name in dense.calls}
        return dataclasses.replace(row(cell), times_ms=times, left_out=dense.left_out)

    monkeypatch.setattr(engine, "prepare", prepare)
    monkeypatch.setattr(engine, "measure", measure)
    assert engine.run(rows, wanted, 1.0, False, None, SILENT) == 0
    first = ["compile", "eager", "openvino", "openvino_bf16", "openvino_int8"]
    assert timed == [first, ["compile", "openvino", "openvino_int8"]] * 2, "each for its own threads"
    assert "2.0 times as long as openvino_int8" in rows.last()[wanted[1]].left_out["openvino_bf16"]
    assert (
        rows.last()[wanted[1]].left_out["eager"] == "2.0 times as long as openvino in resnet18 0% G=1 batch 1 threads 1"
    )


def test_report_says_the_goal_the_best_engine_and_what_is_slower(rows: Rows[Row], tmp_path: Path) -> None:
    for at, cell in enumerate(engine.cells(("resnet18",), (0.0, 0.5), (8, 16), (1,), (1, 2))):
        rows.add(row(cell, speedup=0.5 + at))
    with rows.path.open("a") as torn:
        torn.write('{"cell": ')
    text = engine_report.report(tmp_path, "here")
    assert (tmp_path / "engine.md").read_text() == text
    assert "1.50x (1.7x)" in text
    assert "**3.00**" in text
    assert "6 cells; the lowest speed-up is 0.50x (resnet18 0% G=1 batch 1 threads 1). Below 0.97x: 1." in text
    assert (tmp_path / "engine_resnet18.png").read_bytes().startswith(b"\x89PNG")
    assert engine_report.report(tmp_path, "elsewhere").startswith("nothing is measured yet")


def test_a_table_a_precision_with_the_noise_beside_its_times(rows: Rows[Row], tmp_path: Path) -> None:
    for cell in engine.cells(("resnet18",), (0.0, 0.75), (8,), (1,), (1,), ("float32", "int8"), (1, 4), "vnni"):
        rows.add(row(cell, speedup=4.0 + cell.block))
    text = engine_report.report(tmp_path, "here")
    floats, ints = text.split("## ")[1:]
    assert floats.startswith("The repacked model in float32, engines held to AVX-512 with VNNI")
    assert ints.startswith("The repacked model in int8, engines held to AVX-512 with VNNI")
    assert "3.00 (31 dB)" in floats
    assert "3.00 (29 dB)" not in floats, "float32 needs no such figure"
    assert "3.00 (29 dB)" in ints
    assert "8.00x (3.0x)" in floats
    assert "4.00x (2.8x)" in ints, "of the better block, over the best dense engine of any precision"
    assert "4.00x (openvino_int8)" in ints
    assert "- onnxruntime_int8, resnet18: static quantisation" in ints


def test_cells_of_other_precisions_blocks_and_instruction_sets_are_cells_of_their_own() -> None:
    axes = (("a",), (0.0, 0.5), (8,), (1,), (1,))
    found = [*engine.cells(*axes), *engine.cells(*axes, ("int8", "float32"), (1, 4), "vnni")]
    assert len(set(found)) == 2 + 2 * (1 + 2)
    assert str(found[-2]) == "a 50% G=8 batch 1 threads 1 int8 block 4 vnni"
    assert str(found[0]) == "a 0% G=1 batch 1 threads 1"


def test_rows_from_before_there_were_precisions_are_read(rows: Rows[Row]) -> None:
    new = row(engine_report.Cell("resnet18", 0.5, 8, 1, 1))
    old = new.to_json()
    for name in ("best_any", "speedup_any", "snr_db", "notes"):
        del old[name]
    for name in ("precision", "block", "isa"):
        del old["cell"][name]
    append_line(rows.path, old)
    (found,) = rows.last().values()
    assert found.cell == new.cell
    assert found.speedup_any is None
    assert "- |" in engine_report.table([found])


def test_a_masked_block_keeps_its_inputs_together() -> None:
    model, x = standard_model("resnet20"), standard_input("resnet20", 1)
    for mask in engine.group_masks(model, x, 0.75, 8, 4).values():
        fours = mask.unflatten(1, (-1, 4))
        assert torch.equal(fours.all(2), fours.any(2))


@pytest.mark.slow
def test_a_cell_in_int8_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """From masks to row, with engines that need no extra."""
    cell = engine_report.Cell("resnet20", 0.75, 8, 1, 1, "int8", 4)
    monkeypatch.setattr(engine, "rounds", lambda *_: 2)
    model, x = standard_model("resnet20"), standard_input("resnet20", 1)
    eager = Eager().prepare(model, x, 1)
    measured = engine.measure(cell, engine.Dense(model, x, {"eager": eager}, {}, {}, {}), 0.1, None)
    assert measured.best == measured.best_any == "eager"
    assert 10 < measured.snr_db[engine_report.REPACKED] < 60


def test_a_file_of_something_else_is_refused(rows: Rows[Row]) -> None:
    append_line(rows.path, {"cell": {"model": "resnet18"}})
    with pytest.raises(FileError, match="not what this benchmark writes"):
        rows.read()


def test_the_error_is_relative_to_the_largest_output() -> None:
    x = torch.tensor([[1.0, -4.0]])
    half = torch.nn.Linear(2, 2)
    with torch.no_grad():
        half.weight.copy_(0.5 * torch.eye(2))
        half.bias.zero_()
    assert engine.relative_error(half, torch.nn.Identity(), x) == pytest.approx(0.5)
