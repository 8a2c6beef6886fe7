"""`python -m benchmarks coverage`, on a model of our own."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.files import write_json
from autoprune.model.arguments import Arguments
from benchmarks import coverage, coverage_work
from benchmarks.coverage_models import FAMILIES, MODELS
from benchmarks.coverage_models.pruning import SPARSITY, prunable_weights, prune_, randomise_
from benchmarks.coverage_models.subject import Subject, of_images
from benchmarks.coverage_report import COLUMNS, Covered, forms, report
from benchmarks.lib.provenance import Provenance


class Classified(dict[str, Tensor]):
    """As other packages return their outputs."""


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        map_: Tensor = torch.pow(1.5, self.norm(self.convolution(image)))
        return {"logits": self.head(map_.mean((2, 3)))}


def small() -> Subject:
    return of_images(Small(), (3, 8, 8), (3, 12, 12))


def test_three_quarters_of_every_kind_of_weight_are_cut_in_groups() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([
        nn.Conv2d(8, 24, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Conv1d(8, 12, 3), nn.Linear(16, 16),
        nn.ConvTranspose2d(8, 16, 2), nn.LSTM(8, 8), nn.MultiheadAttention(16, 2),
    ])  # fmt: skip
    weights = [rows.values for rows in prunable_weights(model)]
    assert len(weights) == 5 + 2 + 2
    assert sum(map(Tensor.numel, weights)) == sum(x.numel() for x in model.parameters() if x.dim() > 1)
    prune_(model)
    for weight in weights:
        zeros = weight == 0
        whole = SPARSITY if weight[0].numel() % 4 == 0 else pytest.approx(SPARSITY, abs=0.03)
        assert float(zeros.float().mean()) == whole
        size = 1 if weight.shape[1] == 1 else 4 if len(weight) == 12 else 8
        groups = zeros.reshape(len(weight) // size, size, -1)
        assert bool((groups == groups[:, :1]).all()), "one choice a group"


def test_a_weight_with_two_names_is_cut_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert len(list(prunable_weights(model))) == 1


def test_no_norm_and_no_scale_is_left_at_its_constant() -> None:
    layer = nn.Linear(8, 8)
    nn.init.zeros_(layer.bias)
    model = randomise_(nn.Sequential(layer, nn.BatchNorm1d(8), nn.LayerNorm(8)))
    values = [x for x in [*model.parameters(), *model.buffers()] if x.dim()]
    assert all(bool((x != x[0]).any()) for x in values)


@pytest.mark.slow
def test_what_is_found_of_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.coverage_work.build", lambda _: small())
    found = coverage_work.Findings(tmp_path / "found.json")
    coverage_work.pack("small", found)
    assert (found.values["form"], found.values["why"], found.values["planned"]) == ("program", "", 1.0)
    assert found.values["peak_mb"] >= found.values["memory_mb"] > 0
    coverage_work.judge("small", coverage_work.Findings(tmp_path / "found.json"), ("onnxruntime",), 0.1)
    row = Covered("own:small", 1.0, **coverage_work.Findings(tmp_path / "found.json").values)
    assert row.failure == row.doing == ""
    assert row.saved_equal
    for error in (row.error, row.batch, row.size):
        assert isinstance(error, float)
        assert error < 1e-5
    assert row.times_ms.keys() == {"eager", "repacked", "onnxruntime"}, row.left_out
    assert row.native is not None
    assert sum(share for _, share in row.torch_steps.values()) == pytest.approx(1 - row.native)
    assert {name: count for name, (count, _) in row.torch_steps.items()} == {"aten.pow.Scalar": 1}


@pytest.mark.parametrize("stage", [coverage_work.pack, coverage_work.form])
def test_a_model_that_is_no_program_says_why(
    stage: Callable[[str, coverage_work.Findings], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            right: Tensor = self.layer(x if x.sum() > 0 else -x)
            return right

    subject = Subject(Branching().eval(), Arguments(torch.ones(1, 16)), None, None)
    monkeypatch.setattr("benchmarks.coverage_work.build", lambda _: subject)
    found = coverage_work.Findings(tmp_path / "found.json")
    stage("branching", found)
    assert found.values["form"] == "modules"
    assert found.values["why"]


def test_a_form_is_found_without_timing_a_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.coverage_work.build", lambda _: small())
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "cache"))
    found = coverage_work.Findings(tmp_path / "found.json")
    coverage_work.form("small", found)
    row = Covered("own:small", 1.0, **found.values)
    assert (row.form, row.why, row.failure, row.doing) == ("program", "", "", "")
    assert row.saved_equal
    for error in (row.error, row.batch, row.size):
        assert isinstance(error, float)
        assert error < 1e-5
    assert {name: count for name, (count, _) in row.torch_steps.items()} == {"aten.pow.Scalar": 1}
    assert row.over_eager is None
    assert not (tmp_path / "cache" / "tuning.json").exists()


def test_errors_are_shares_of_the_largest_output_and_refusals_are_words() -> None:
    class Model(nn.Module):
        def __init__(self, off: float) -> None:
            super().__init__()
            self.off = off

        def forward(self, x: Tensor) -> Classified:
            return Classified(logits=2 * x + self.off, chosen=x.argmax())

    class Refusing(nn.Module):
        def __init__(self, kind: type[Exception]) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, x: Tensor) -> Classified:
            raise self.kind("not this\none")

    x, exact, off = torch.tensor([1.0, 4.0]), Model(0.0), Model(0.04)
    assert coverage_work.compared(exact, exact, Arguments(x)) == 0.0
    assert coverage_work.compared(off, exact, Arguments(x)) == pytest.approx(0.005)
    assert coverage_work.compared(Model(math.nan), exact, Arguments(x)) == math.inf
    assert coverage_work.compared(Refusing(AutopruneError), exact, Arguments(x)) == "not this"
    assert coverage_work.compared(Refusing(ValueError), exact, Arguments(x)) == "ValueError: not this"
    assert coverage_work.compared(off, exact, None) is None
    assert coverage_work.compared(off, exact, Arguments("no tensor")) is None, "the model itself does not take it"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("pass", ""),
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("import time; time.sleep(60)", "not done after 0 s"),
    ],
)
def test_what_becomes_of_a_process(code: str, told: str) -> None:
    start = time.perf_counter()
    assert coverage.outcome([sys.executable, "-c", code], {}, 0.0 if "sleep" in code else 30.0) == told
    assert time.perf_counter() - start < 30.0


def test_a_crash_is_a_row_with_what_was_found_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = []

    def crashing(command: Sequence[str], environment: Mapping[str, str], patience_s: float) -> str:
        stages.append(command[3])
        assert Path(environment["AUTOPRUNE_CACHE"]).parent == Path(command[5]).parent, "no cache of the user's"
        if command[3] == "pack":
            write_json(Path(command[5]), {"form": "program", "cold_s": 1.0})
            return ""
        return "ended by SIGSEGV"

    monkeypatch.setattr("benchmarks.coverage.outcome", crashing)
    row = coverage.covered("tv:resnet18", ("onnxruntime",), 1.0, 60.0)
    assert stages == ["pack", "judge"]
    assert (row.form, row.cold_s, row.failure) == ("program", 1.0, "ended by SIGSEGV")


def test_a_model_of_a_package_that_is_missing_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(command: Sequence[str], environment: Mapping[str, str], patience_s: float) -> str:
        write_json(Path(command[5]), {"failure": "MissingExtra: tv:resnet18 needs torchvision"})
        return "MissingExtra"

    monkeypatch.setattr("benchmarks.coverage.outcome", missing)
    with pytest.raises(RuntimeError, match="coverage-models"):
        coverage.covered("tv:resnet18", (), 1.0, 60.0)


ROWS = (
    Covered(
        "tv:one", 9.0, form="program", planned=1.0, cold_s=3.0, cached_s=1.0, memory_mb=400.0, peak_mb=500.0,
        error=1e-6, saved_equal=True, native=0.8, torch_steps={"topk.default": (2, 0.15), "sort.default": (1, 0.05)},
        batch=1e-6, size="this program was made for (1, 3, 8, 8)",
        times_ms={"eager": 8.0, "repacked": 2.0, "openvino": 5.0}, best="openvino", over_eager=4.0, over_best=2.5,
    ),
    Covered(
        "tv:two", 9.0, form="modules", why="the value 'a_1' is no tensor", error=1e-3, saved_equal=False, over_best=1.5
    ),
    Covered(
        "hf:three", 9.0, form="modules", why="the value 'b' is no tensor", failure="ended by SIGSEGV",
        doing="timing it",
    ),
)  # fmt: skip


def test_the_page() -> None:
    here = Provenance("abc", {"cpu": "One"})
    text = report([(Covered("tv:two", 1.0), here), *((row, here) for row in ROWS)])
    lines = text.splitlines()
    summary = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for line in lines if (cells := line.split("|"))[1:]
    }
    assert summary["all"][:8] == ["3", "3", "1 of 3", "1 of 2", "1 of 2", "1 of 1", "0, 1", "4.00 (4.00-4.00)"]
    assert summary["all"][9:] == ["2.50 (2.50-2.50)", "1.50 (1.50-1.50)", "1 of 2"]
    assert summary["hf"][:3] == ["1", "1", "0 of 1"]
    assert summary["the value '...' is no tensor"] == ["2", "hf:three, tv:two"], "one reason, whatever the names"
    assert summary["topk.default"] == ["1", "2", "15%", "15%"]
    assert "- hf:three, timing it: ended by SIGSEGV" in lines
    assert "Machine: cpu One. Commit: abc." in lines
    names = [name for name, _ in COLUMNS]
    row = dict(zip([*names[:-1], "commit", names[-1]], summary["tv:one"], strict=True))
    assert row["commit"] == "abc"
    assert row["repack s"] == "3.0, 1.0"
    assert row["MB"] == "500 (+100)"
    assert row["other size"] == "refused"
    assert row["why no program, or what torch runs"] == "topk.default x2 (15%), sort.default x1 (5%)"


def test_the_page_of_forms_shows_what_needs_no_clock() -> None:
    here, later = Provenance("abc", {"cpu": "One"}), Provenance("def", {"cpu": "One"})
    text = forms([(ROWS[0], here), (ROWS[1], here), (ROWS[2], later)])
    lines = text.splitlines()
    tables = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert ["all", "3", "3", "1 of 3", "1 of 2", "1 of 2", "1 of 1", "0, 1", "0 of 1"] in tables
    assert ["topk.default", "1", "2"] in tables
    assert ["tv:one", "another size", "this program was made for (1, 3, 8, 8)"] in tables
    assert ["tv:two", "as in the example", "differs by 1e-03"] in tables
    assert ["tv:two", "loaded", "differs"] in tables
    steps = "topk.default x2, sort.default x1"
    assert ["tv:one", "program", "1e-06", "equal", "1e-06", "refused", "abc", steps] in tables
    assert not any("4.00" in line or "15%" in line for line in lines), "nothing of times"


def test_names_tell_the_family() -> None:
    assert len(MODELS) == sum(map(len, FAMILIES.values()))
    assert all(name.partition(":")[0] in FAMILIES for name in MODELS)
