"""What is written for C: headers that any compiler takes, every status, examples that run, CMake and WebAssembly."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.repack import ProgramModel
from autoprune.repack.aot.call import Status
from autoprune.repack.aot.description import MEANINGS
from autoprune.repack.aot.interface import c_name
from autoprune.repack.aot.toolchain import linker
from tests.repack.built import STRICT, assert_same, needs_compiler, program, run

pytestmark = needs_compiler


class TwoInputs(nn.Module):
    """Numbers of rows and floats in, two tensors out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(11, 4), nn.Conv1d(4, 6, 3, padding=1)

    def forward(self, words: Tensor, scale: Tensor) -> dict[str, Tensor]:
        mixed = self.mix(self.table(words).transpose(1, 2)).relu() * scale
        return {"mixed": mixed, "average": mixed.mean(2)}


SHAPES = [((1, 9), (1, 6, 9)), ((2, 5), (2, 6, 5))]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> ProgramModel:
    """A program of two inputs that takes several shapes."""
    torch.manual_seed(0)
    inputs = torch.randint(11, (1, 9)), torch.randn(1, 6, 9)
    return program(TwoInputs(), inputs, tmp_path_factory.mktemp("two"), threads=2)


@pytest.fixture(scope="module")
def folder(two: ProgramModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, built for two threads and two shapes."""
    found = tmp_path_factory.mktemp("built")
    autoprune.build(two, shapes=SHAPES, out=found, name="two", threads=2)
    return found


# Statuses -------------------------------------------------------------------------------------------------------------

SHIM = """
#include "two.h"
int32_t call(const two_tensor *i, int32_t in, const two_tensor *o, int32_t on, void *w, size_t n)
{ return two_call(i, in, o, on, w, n); }
const char *text(int32_t status) { return two_status_text(status); }
"""


class CTensor(ctypes.Structure):
    """`two_tensor`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
    )


TYPES = ["float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]


def tensor(x: np.ndarray[Any, Any]) -> CTensor:
    shape = (ctypes.c_int64 * x.ndim)(*x.shape)
    return CTensor(x.ctypes.data, x.nbytes, TYPES.index(str(x.dtype)), x.ndim, shape)


@dataclass
class Given:
    """What `two_call` is given, and the library that has it."""

    library: ctypes.CDLL
    words: CTensor
    scale: CTensor
    mixed: CTensor
    average: CTensor
    workspace: int
    workspace_bytes: int
    counts: tuple[int, int] = (2, 2)

    def status(self) -> Status:
        inputs, outputs = (CTensor * 2)(self.words, self.scale), (CTensor * 2)(self.mixed, self.average)
        found = self.library.call(
            inputs, self.counts[0], outputs, self.counts[1],
            ctypes.c_void_p(self.workspace or None), ctypes.c_size_t(self.workspace_bytes),
        )  # fmt: skip
        return Status(found)


@pytest.fixture(scope="module")
def shim(folder: Path) -> ctypes.CDLL:
    (folder / "shim.c").write_text(SHIM)
    run("cc", *STRICT, "-fPIC", "-shared", folder / "shim.c", folder / "two.o", "-o", folder / "shim.so")
    found = ctypes.CDLL(str(folder / "shim.so"))
    found.text.restype = ctypes.c_char_p
    return found


HELD: list[np.ndarray[Any, Any]] = []  # memory that C is given


def aligned(size: int) -> int:
    """The address of memory that is a multiple of 64; it is never freed."""
    HELD.append(np.zeros(size + 64, np.uint8))
    return int(HELD[-1].ctypes.data) + -int(HELD[-1].ctypes.data) % 64


@pytest.fixture
def right(shim: ctypes.CDLL, folder: Path) -> Given:
    """A call that is right, of the first shapes."""
    size = json.loads((folder / "two.json").read_text())["calls"][0]["workspace_bytes"]
    memory = aligned(size)
    assert shim.two_1x9_1x6x9_prepare(ctypes.c_void_p(memory)) == Status.OK
    words = np.ones((1, 9), np.int64)
    scale, mixed, average = (np.ones(shape, np.float32) for shape in ((1, 6, 9), (1, 6, 9), (1, 6)))
    HELD.extend([words, scale, mixed, average])
    return Given(shim, tensor(words), tensor(scale), tensor(mixed), tensor(average), memory, size)


def change(name: str, **fields: Any) -> Callable[[Given], None]:
    def changed(given: Given) -> None:
        for key, value in fields.items():
            setattr(getattr(given, name), key, value)

    return changed


def extents(name: str, *shape: int) -> Callable[[Given], None]:
    return change(name, shape=(ctypes.c_int64 * len(shape))(*shape))


def put_word(number: int) -> Callable[[Given], None]:
    def changed(given: Given) -> None:
        ctypes.cast(given.words.data, ctypes.POINTER(ctypes.c_int64))[8] = number

    return changed


def give(**fields: Any) -> Callable[[Given], None]:
    def changed(given: Given) -> None:
        for key, value in fields.items():
            setattr(given, key, value(given) if callable(value) else value)

    return changed


def null(name: str) -> Callable[[Given], None]:
    return change(name, data=None)


def shifted(name: str, by: int) -> Callable[[Given], None]:
    def changed(given: Given) -> None:
        held = getattr(given, name)
        held.data = held.data + by

    return changed


WRONG: list[tuple[str, Callable[[Given], None], Status]] = [
    ("nothing", lambda given: None, Status.OK),
    ("an input is null", null("words"), Status.NULL_POINTER),
    ("an output is null", null("average"), Status.NULL_POINTER),
    ("a shape is null", change("scale", shape=None), Status.NULL_POINTER),
    ("the workspace is null", give(workspace=0), Status.NULL_POINTER),
    ("an input is misaligned", shifted("scale", 2), Status.MISALIGNED),
    ("an output is misaligned", shifted("mixed", 1), Status.MISALIGNED),
    ("the workspace is misaligned", give(workspace=lambda given: given.workspace + 32), Status.MISALIGNED),
    ("the workspace is not prepared", give(workspace=lambda given: aligned(1 << 16)), Status.NOT_PREPARED),
    ("a word is too large", put_word(11), Status.OUT_OF_RANGE),
    ("a word is negative", put_word(-1), Status.OUT_OF_RANGE),
    ("an input too few", give(counts=(1, 2)), Status.WRONG_COUNT),
    ("an output too many", give(counts=(2, 3)), Status.WRONG_COUNT),
    ("an input of another type", change("words", type=TYPES.index("int32")), Status.WRONG_TYPE),
    ("an output of another type", change("mixed", type=TYPES.index("float64")), Status.WRONG_TYPE),
    ("an input of another rank", change("words", rank=1), Status.WRONG_RANK),
    ("an output of another rank", change("average", rank=3), Status.WRONG_RANK),
    ("an input of another shape", extents("words", 1, 8), Status.WRONG_SHAPE),
    ("inputs of shapes that do not go together", extents("words", 2, 5), Status.WRONG_SHAPE),
    ("an output of another shape", extents("average", 1, 7), Status.WRONG_SHAPE),
    ("a small input", change("scale", bytes=215), Status.TOO_SMALL),
    ("a small output", change("average", bytes=23), Status.TOO_SMALL),
    ("a small workspace", give(workspace_bytes=lambda given: given.workspace_bytes - 1), Status.TOO_SMALL),
]


@pytest.mark.parametrize(("wrong", "status"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_a_checked_call_tells_what_is_wrong(right: Given, wrong: Callable[[Given], None], status: Status) -> None:
    assert right.status() is Status.OK
    wrong(right)
    assert right.status() is status


def test_every_status_is_met_and_has_a_text(shim: ctypes.CDLL) -> None:
    assert {row[2] for row in WRONG} | {Status.WRONG_PART} == set(Status)  # that one: the test of parts
    assert [shim.text(int(status)).decode() for status in Status] == [MEANINGS[status] for status in Status]
    assert shim.text(99).decode() == "no status of two"


def test_parts_of_a_call_run_on_threads_of_the_caller(two: ProgramModel, right: Given) -> None:
    words, scale = torch.randint(11, (1, 9)), torch.randn(1, 6, 9)
    mixed, average = np.zeros((1, 6, 9), np.float32), np.zeros((1, 6), np.float32)
    tensors = [x.ctypes.data for x in (words.numpy(), scale.numpy(), mixed, average)]
    idle = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p)
    given = [*map(ctypes.c_void_p, (*tensors, right.workspace))]
    run_part = right.library.two_1x9_1x6x9_run_part

    def run_one(number: int, count: int, statuses: list[int]) -> None:
        statuses.append(run_part(*given, number, count, idle))

    for count in (2, 1, 2):
        mixed[:], average[:] = 0, 0
        statuses: list[int] = []
        parts = [Thread(target=run_one, args=(number, count, statuses)) for number in range(count)]
        for part in parts:
            part.start()
        for part in parts:
            part.join()
        assert statuses == [0] * count
        with torch.inference_mode():
            assert_same({"mixed": mixed, "average": average}, two(words, scale))
    for number, count in ((2, 2), (-1, 2), (0, 3), (0, 0)):
        assert run_part(*given, number, count, idle) == Status.WRONG_PART


# Compilers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ("cc", *STRICT),
        ("cc", *STRICT, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        ("c++", "-Wall", "-Wextra", "-pedantic", "-Werror", "-x", "c++"),
    ],
    ids=["c99", "sanitized", "c++"],
)
def test_the_example_computes_what_the_program_does(
    command: tuple[str, ...], folder: Path, two: ProgramModel, tmp_path: Path
) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]}")
    run(*command, folder / "main.c", "-x", "none", folder / "two.o", "-o", tmp_path / "example")
    words, scale = torch.randint(11, (1, 9)), torch.randn(1, 6, 9)
    words.numpy().tofile(tmp_path / "words")
    scale.numpy().tofile(tmp_path / "scale")
    printed = run(tmp_path / "example", tmp_path / "words", tmp_path / "scale")
    with torch.inference_mode():
        wanted = two(words, scale)
    flat = np.concatenate([wanted["mixed"].numpy().ravel(), wanted["average"].numpy().ravel()])
    assert np.array_equal(np.array(printed.split(), np.float32), flat)
    assert len(run(tmp_path / "example").split()) == flat.size  # on zeros


@pytest.mark.parametrize("size", [71, 73, 144])
def test_the_example_refuses_a_file_of_another_size(size: int, folder: Path, tmp_path: Path) -> None:
    run("cc", *STRICT, folder / "main.c", folder / "two.o", "-o", tmp_path / "example")
    (tmp_path / "words").write_bytes(bytes(size))
    with pytest.raises(AssertionError, match="not a file of 72 bytes"):
        run(tmp_path / "example", tmp_path / "words")


@pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no CMake")
def test_cmake_finds_the_model_and_builds_the_example(folder: Path, tmp_path: Path) -> None:
    run("cmake", "-S", folder, "-B", tmp_path)
    run("cmake", "--build", tmp_path)
    assert len(run(tmp_path / "two_example").split()) == 6 * 9 + 6


def test_libraries_link(folder: Path, tmp_path: Path) -> None:
    for flags in (["-static-libgcc", folder / "libtwo.a"], [f"-L{folder}", "-ltwo", f"-Wl,-rpath,{folder}"]):
        run("cc", *STRICT, folder / "main.c", *flags, "-o", tmp_path / "example")
        assert len(run(tmp_path / "example").split()) == 6 * 9 + 6


def test_the_server_of_the_guide_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "guide" / "build-cpp-server.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```cpp\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "server.cpp").write_text(code)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 10))
    shapes = [((1, 3, 32, 32),), ((8, 3, 32, 32),)]
    autoprune.build(program(model, torch.randn(1, 3, 32, 32), tmp_path), shapes=shapes, out=tmp_path, name="digits")
    flags = ("-std=c++17", "-Wall", "-Wextra", "-pthread", "-fsanitize=address,undefined")
    run("c++", *flags, tmp_path / "server.cpp", tmp_path / "digits.o", "-o", tmp_path / "server")
    printed = run(tmp_path / "server").splitlines()
    assert sorted(line.partition(":")[0] for line in printed[:4]) == ["batch 1", "batch 1", "batch 8", "batch 8"]
    assert printed[4:] == ["batch 2: a tensor has other extents"]


class Awkward(nn.Module):
    """Parameters and outputs that C has other uses for."""

    def forward(self, argv: Tensor, register: Tensor, stdin: Tensor, I: Tensor) -> dict[str, Tensor]:  # noqa: E741
        total = argv + register + stdin + I
        return {
            "class": total,
            "printf": total * 2,
            "Class": -total,
            "größe": total * 4,
            "1st": total * 5,
            "i": I * 6,
        }


def test_names_are_ones_that_c_takes(tmp_path: Path) -> None:
    fast = program(Awkward(), tuple(torch.randn(2, 3) for _ in range(4)), tmp_path)
    autoprune.build(fast, out=tmp_path, name="int")
    run("cc", *STRICT, tmp_path / "main.c", tmp_path / "int_.o", "-o", tmp_path / "example")
    run(
        "c++",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-x",
        "c++",
        tmp_path / "main.c",
        "-x",
        "none",
        tmp_path / "int_.o",
        "-o",
        tmp_path / "a",
    )
    assert len(run(tmp_path / "example").split()) == 6 * 6
    assert [c_name(text) for text in ("x.y", "2d", "int", "é", "__a__")] == ["x_y", "x_2d", "int_", "x", "a"]


# WebAssembly ----------------------------------------------------------------------------------------------------------

SCRIPT = """
import { Model } from "./two.mjs";
import { Model as Stale } from "./stale.mjs";
const [model, stale] = [await Model.load(), await Stale.load().catch((error) => error.message)];
const words = (n) => BigInt64Array.from({ length: n }, (_, i) => BigInt(i % 11));
const scale = (n) => Float32Array.from({ length: n }, (_, i) => i / 7);
const told = (run) => { try { run(); return "none"; } catch (error) { return `${error.name}: ${error.message}`; } };
const bad = words(9); bad[8] = 11n;
console.log(JSON.stringify({
  first: [...model.run(words(9), scale(54)).mixed],
  second: [...model.run(words(10), { data: scale(60), shape: [2, 6, 5] }).average],
  again: [...model.run(words(9), scale(54)).mixed],
  count: told(() => model.run(words(9))),
  type: told(() => model.run(scale(9), scale(54))),
  shape: told(() => model.run(words(9), scale(60))),
  stale,
  row: told(() => model.run(bad, scale(54))),
}));
"""


@pytest.mark.skipif(linker() is None, reason="there is no wasm-ld")
@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node")
def test_node_runs_the_model(two: ProgramModel, tmp_path: Path) -> None:
    autoprune.build(two, "wasm32", shapes=SHAPES, out=tmp_path, name="two")
    (tmp_path / "script.mjs").write_text(SCRIPT)
    stale = (tmp_path / "two.mjs").read_text().replace('"mark": "', '"mark": "f')
    (tmp_path / "stale.mjs").write_text(stale)
    printed = json.loads(run("node", tmp_path / "script.mjs"))

    def wanted(batch: int, length: int) -> Any:
        words = (torch.arange(batch * length) % 11).reshape(batch, length)
        scale = torch.tensor([number / 7 for number in range(batch * 6 * length)]).reshape(batch, 6, length)
        with torch.inference_mode():
            return two(words, scale)

    close: Any = {"rtol": 1e-5, "atol": 1e-6}  # wasm32 has no fused multiply-add
    assert np.allclose(printed["first"], wanted(1, 9)["mixed"].numpy().ravel(), **close)
    assert np.allclose(printed["second"], wanted(2, 5)["average"].numpy().ravel(), **close)
    assert printed["again"] == printed["first"]
    assert "are not of one build" in printed["stale"]
    assert printed["count"] == "TypeError: two takes 2 inputs, not 1."
    assert printed["type"].startswith("TypeError: words must be a BigInt64Array")
    assert "two was built for shapes [1,9] and [1,6,9] or [2,5] and [2,6,5], not 9 entries and 60" in printed["shape"]
    assert printed["row"].startswith("RangeError: two: a number, of an input or computed on the way, is no row")
