"""Models that were built ahead of time compute what their programs do, to the last bit, and refuse what is wrong."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.cli import app
from autoprune.cli.building import build, completed_target
from autoprune.errors import AutopruneError, ConfigError, FileError
from autoprune.files import read_json
from autoprune.repack import ProgramModel
from autoprune.repack.aot import library, toolchain
from autoprune.repack.aot.build import compiled
from autoprune.repack.aot.targets import HOST, PLATFORMS
from autoprune.repack.kernels.compiler import object_code
from tests.repack.built import assert_same, built, needs_compiler, program, run, undefined, wrapper


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 7))


class Dictionaries(nn.Module):
    """Returns tensors in a structure, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, printf: Tensor) -> dict[str, Any]:
        hidden = self.body(x).relu() + printf
        logits = self.head(hidden)
        return {"int": logits, "parts": (hidden.transpose(0, 1), [logits, hidden[:, 1:3]]), "about": None}


class Words(nn.Module):
    """A table of words before a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 4)

    def forward(self, words: Tensor) -> Tensor:
        found: Tensor = self.head(self.table(words).mean(1))
        return found


ENCODER: Any = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "batch_first": True}
CASES: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "cnn": (cnn, (torch.randn(1, 2, 12, 10),)),
    "cnn, 4 samples": (cnn, (torch.randn(4, 2, 12, 10),)),
    "mlp": (mlp, (torch.randn(3, 12),)),
    "lstm": (lambda: nn.LSTM(5, 12, batch_first=True), (torch.randn(2, 7, 5),)),
    "encoder": (lambda: nn.TransformerEncoderLayer(**ENCODER), (torch.randn(2, 9, 16),)),
    "dictionaries": (Dictionaries, (torch.randn(5, 6), torch.randn(5, 8))),
    "words": (Words, (torch.randint(11, (2, 6)),)),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ProgramModel:
    """A program that takes (3, 12), in any batch."""
    return program(mlp(), torch.randn(3, 12), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ProgramModel:
    """A program that takes (1, 2, 12, 10), in any batch."""
    return program(cnn(), torch.randn(1, 2, 12, 10), tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> ProgramModel:
    """A program of two inputs and a structure of outputs."""
    return program(Dictionaries(), CASES["dictionaries"][1], tmp_path_factory.mktemp("nested"))


def arrays(inputs: tuple[Tensor, ...]) -> list[np.ndarray[Any, Any]]:
    return [x.numpy() for x in inputs]


@needs_compiler
@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("case", CASES)
def test_what_is_built_computes_what_the_program_does(case: str, threads: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made, inputs = CASES[case]
    fast = program(made(), inputs, tmp_path, threads)
    model = built(fast, tmp_path, threads=threads)
    with torch.inference_mode():
        assert_same(model(*arrays(inputs)), fast(*inputs))
        others = tuple(x.flip(0).contiguous() for x in inputs)
        assert_same(model(*arrays(others)), fast(*others))
        assert_same(model(*arrays(inputs)), fast(*inputs))  # nothing is left of another call


@pytest.mark.slow
@needs_compiler
def test_int8_is_built_to_the_last_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = cnn().eval(), [torch.randn(4, 2, 12, 10) for _ in range(3)]
    fast = autoprune.repack(model, batches[0], precision="int8", calibration=batches)
    with torch.inference_mode():
        assert_same(built(fast, tmp_path)(batches[0].numpy()), fast(batches[0]))  # type: ignore[arg-type]


@needs_compiler
def test_a_loaded_program_is_built_likewise(small: ProgramModel, tmp_path: Path) -> None:
    fast, x = small, torch.randn(3, 12)
    autoprune.save(fast, tmp_path / "fast.safetensors")
    loaded = autoprune.load(tmp_path / "fast.safetensors")
    with torch.inference_mode():
        assert_same(built(loaded, tmp_path / "built")(x.numpy()), loaded(x))  # type: ignore[arg-type]


# Several shapes -------------------------------------------------------------------------------------------------------


@needs_compiler
def test_the_shape_of_the_input_chooses_among_those_that_were_built(images: ProgramModel, tmp_path: Path) -> None:
    fast = images
    model = built(fast, tmp_path, [((1, 2, 12, 10),), ((4, 2, 12, 10),)])
    with torch.inference_mode():
        for count in (1, 4, 1):
            x = torch.randn(count, 2, 12, 10)
            assert_same(model(x.numpy()), fast(x))
    with pytest.raises(ValueError, match=r"shapes \(1, 2, 12, 10\) or \(4, 2, 12, 10\), not \(2, 2,"):
        model(np.zeros((2, 2, 12, 10), np.float32))


@needs_compiler
def test_a_workspace_of_another_shape_is_refused(images: ProgramModel, tmp_path: Path) -> None:
    """The borders of its maps lie elsewhere: padding would be read from what the other shape left."""
    built(images, tmp_path, [((1, 2, 12, 10),), ((4, 2, 12, 10),)])
    found = ctypes.CDLL(str(tmp_path / "libsmall.so"))
    about = read_json(tmp_path / "small.json", "the description")
    size = max(call["workspace_bytes"] for call in about["calls"])
    memory, x, y = np.zeros(size + 64, np.uint8), np.zeros((4, 2, 12, 10), np.float32), np.zeros((4, 5), np.float32)
    workspace = ctypes.c_void_p(memory.ctypes.data - memory.ctypes.data % -64)
    tensors = ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), workspace
    assert found.small_1x2x12x10_prepare(workspace) == 0
    assert found.small_4x2x12x10_run(*tensors) == 3
    assert found.small_4x2x12x10_prepare(workspace) == 0
    assert found.small_4x2x12x10_run(*tensors) == 0


# The wrapper ----------------------------------------------------------------------------------------------------------


@needs_compiler
def test_threads_call_the_wrapper_at_once(tmp_path: Path) -> None:
    fast = program(cnn(), torch.randn(1, 2, 12, 10), tmp_path, threads=2)
    model = built(fast, tmp_path, threads=2)
    inputs = [torch.randn(1, 2, 12, 10) for _ in range(24)]
    with torch.inference_mode(), ThreadPoolExecutor(3) as pool:
        for got, x in zip(pool.map(model, [x.numpy() for x in inputs]), inputs, strict=True):
            assert_same(got, fast(x))


@needs_compiler
def test_the_wrapper_takes_inputs_by_name_and_in_any_memory(nested: ProgramModel, tmp_path: Path) -> None:
    inputs, fast = CASES["dictionaries"][1], nested
    model = built(fast, tmp_path)
    x, y = arrays(inputs)
    with torch.inference_mode():
        assert_same(model(printf=np.asfortranarray(y), x=x), fast(*inputs))
        assert_same(model(x, printf=np.repeat(y, 2, 0)[::2]), fast(*inputs))


@needs_compiler
@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda model, x, y: model(x), TypeError, r"small takes x, printf; given were 1 in order and \[\] by name"),
        (lambda model, x, y: model(x, y, y), TypeError, "given were 3 in order"),
        (lambda model, x, y: model(x, z=y), TypeError, r"given were 1 in order and \['z'\] by name"),
        (lambda model, x, y: model(x.tolist(), y), TypeError, "x must be a numpy array, not list"),
        (lambda model, x, y: model(x, y.astype("f8")), TypeError, r"printf must be float32, not float64: .*'float32'"),
        (lambda model, x, y: model(x, y.byteswap().view(">f4")), TypeError, "printf must be float32, not >f4"),
        (lambda model, x, y: model(x[:4], y[:4]), ValueError, r"\(5, 6\) and \(5, 8\), not \(4, 6\) and \(4, 8\)"),
    ],
)  # fmt: skip
def test_the_wrapper_says_what_is_wrong(
    nested: ProgramModel, call: Any, kind: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=said):
        call(built(nested, tmp_path), *arrays(CASES["dictionaries"][1]))


@needs_compiler
def test_the_wrapper_says_that_a_number_is_no_row(tmp_path: Path) -> None:
    fast = program(Words(), torch.randint(11, (2, 6)), tmp_path)
    model, words = built(fast, tmp_path), np.full((2, 6), 10)
    for wrong in (11, -1, 2**40):
        words[1, 5] = wrong
        with pytest.raises(ValueError, match="no row of the table"):
            model(words)
    words[1, 5] = 0
    with torch.inference_mode():
        assert_same(model(words), fast(torch.from_numpy(words)))


@needs_compiler
def test_the_wrapper_refuses_the_library_of_another_build(small: ProgramModel, tmp_path: Path) -> None:
    built(small, tmp_path / "first")
    built(small, tmp_path / "second", shapes=[((4, 12),)])
    with pytest.raises(ValueError, match="not of one build"):
        wrapper(tmp_path / "first", "small", library=tmp_path / "second" / "libsmall.so")
    with pytest.raises(ValueError, match="threads must be 1 to 1, as small was built for, not 2"):
        wrapper(tmp_path / "first", "small", threads=2)


ALONE = """
import sys
sys.modules |= dict.fromkeys(["torch", "llvmlite", "autoprune", "safetensors"])
sys.path.insert(0, sys.argv[1])
import numpy, small
print(small.Model()(numpy.ones((3, 12), numpy.float32)).tolist())
"""


@needs_compiler
def test_the_wrapper_needs_numpy_alone(small: ProgramModel, tmp_path: Path) -> None:
    fast = small
    built(fast, tmp_path)
    printed = run(sys.executable, "-I", "-c", ALONE, tmp_path)
    with torch.inference_mode():
        assert_same(np.array(json.loads(printed), np.float32), fast(torch.ones(3, 12)))


# What is written ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("target", list(PLATFORMS))
def test_an_object_needs_nothing_but_memory_functions(target: str, images: ProgramModel, tmp_path: Path) -> None:
    """A 32-bit ARM divides 64-bit numbers by a function of the compiler's own library."""
    allowed = {"memset", "memcpy"} | ({"__aeabi_ldivmod", "__aeabi_uldivmod"} if target == "armv7" else set())
    for threads in (1, 2) if target != "wasm32" else (1,):
        autoprune.build(images, target, out=tmp_path, name="small", threads=threads)
        wanted = undefined((tmp_path / "small.o").read_bytes())
        assert wanted <= (allowed if target != "wasm32" else set())


def test_symbols_of_objects_are_read_right() -> None:
    """A module with a call to elsewhere tells it."""
    text = "declare void @elsewhere()\ndefine void @here() nounwind {\n call void @elsewhere()\n ret void\n}"
    for platform in PLATFORMS.values():
        assert undefined(object_code(text, platform.target)) == {"elsewhere"}


@needs_compiler
def test_a_folder_holds_what_the_report_says(small: ProgramModel, tmp_path: Path) -> None:
    fast = small
    told = autoprune.build(fast, out=tmp_path / "built", name="small", shapes=[((3, 12),), ((1, 12),)])
    assert sorted(told.files) == sorted(path.name for path in (tmp_path / "built").iterdir())
    assert {"small.o", "small.h", "libsmall.a", "libsmall.so", "small.py", "main.c", "small.json"} < set(told.files)
    assert told.shapes == ("3x12", "1x12")
    assert told.object_bytes == (tmp_path / "built" / "small.o").stat().st_size
    assert 0 < told.code_bytes < told.object_bytes
    weights = sum(each.numel() * 4 for each in mlp().parameters())
    assert weights // 2 < told.data_bytes < told.object_bytes - told.code_bytes
    about = read_json(tmp_path / "built" / "small.json", "the description")
    assert (about["target"], about["threads"], about["sizes"]["code"]) == ("host", 1, told.code_bytes)
    assert [call["workspace_bytes"] for call in about["calls"]] == list(told.workspace_bytes)
    for path in (tmp_path / "built").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


@pytest.mark.slow
def test_the_same_program_is_built_to_the_same_bytes(images: ProgramModel, tmp_path: Path) -> None:
    fast = images
    for folder in ("first", "second"):
        autoprune.build(fast, "aarch64", out=tmp_path / folder)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_without_a_linker_the_object_is_written_and_what_is_missing_said(
    small: ProgramModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = small
    (tmp_path / "libmodel.so").write_text("of an earlier build")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    told = autoprune.build(fast, "aarch64", out=tmp_path)
    texts = ("model.py", "main.c", "modelConfig.cmake", "CMakeLists.txt", "model.json")
    assert told.files == ("model.o", "model.h", *texts)
    assert not (tmp_path / "libmodel.so").exists()
    (note,) = told.notes
    assert 'pip install "autoprune[build]"' in note
    assert "gcc-aarch64-linux-gnu" in note
    told = autoprune.build(fast, "wasm32", out=tmp_path / "web")
    assert told.files == ("model.o", "model.h", "model.mjs", "model.json")
    assert "wasm-ld" in told.notes[0]


# Refusals -------------------------------------------------------------------------------------------------------------


class ByTorch(nn.Module):
    """Two operations that torch runs in a program."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumprod(torch.sort(x, -1)[0], -1)


def test_operations_of_torch_are_refused_together(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 24), ByTorch())
    fast = program(model, torch.randn(3, 12), tmp_path)
    with pytest.raises(AutopruneError, match=r"torch runs .*cumprod.*sort") as refused:
        autoprune.build(fast, out=tmp_path / "built")
    assert "3x12" in str(refused.value)
    assert not (tmp_path / "built").exists()


def test_what_is_no_program_is_refused(tmp_path: Path) -> None:
    swapped = autoprune.repack(mlp(), torch.randn(3, 12), form="modules")
    for model, said in ((swapped, "only whole programs can be built"), (mlp(), "a Sequential .*repack it first")):
        with pytest.raises(AutopruneError, match=said):
            autoprune.build(model, out=tmp_path / "built")  # type: ignore[arg-type]
    assert not (tmp_path / "built").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"target": "aarch65"}, "target: Did you mean 'aarch64'"),
        ({"target": "wasm32", "threads": 2}, "wasm32 is built for one thread, not for 2"),
        ({"threads": 0}, "threads must be an integer of 1 or more, not 0"),
        ({"shapes": [((3, 13),)]}, r"of shape \(3, 12\) .*, not \(3, 13\)"),
        ({"shapes": [((3, 12), (3, 12))]}, "takes 1 inputs, not 2"),
        ({"shapes": []}, "shapes"),
        ({"shapes": [(3, 12)]}, r"shapes must be a list of sets, .*, not \[\(3, 12\)\]"),
        ({"target": ["host", "wasm32"]}, r"target is one name, not \['host', 'wasm32'\]"),
        ({"shapes": [((3, 12),), ((3, 12),)]}, "twice"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_written(
    small: ProgramModel, arguments: dict[str, Any], said: str, tmp_path: Path
) -> None:
    fast = small
    with pytest.raises(AutopruneError, match=said):
        autoprune.build(fast, out=tmp_path / "built", **arguments)
    assert not (tmp_path / "built").exists()


def test_one_refused_target_stops_all(small: ProgramModel, tmp_path: Path) -> None:
    fast = small
    folders = {"aarch64": tmp_path / "one", "wasm32": tmp_path / "two"}
    with pytest.raises(AutopruneError, match="one thread"):
        library.build_all(fast, folders, threads=2)
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("name", ["main.c", "CMakeLists.txt", "model.h", "model.json"])
def test_files_of_a_user_are_never_replaced(small: ProgramModel, name: str, tmp_path: Path) -> None:
    fast = small
    (tmp_path / name).write_text("mine\n")
    with pytest.raises(FileError, match=f"{name} is there already, and of no earlier build"):
        autoprune.build(fast, out=tmp_path)
    assert (tmp_path / name).read_text() == "mine\n"
    assert not (tmp_path / "model.o").exists()


@needs_compiler
def test_a_folder_is_built_again(small: ProgramModel, tmp_path: Path) -> None:
    fast = small
    built(fast, tmp_path / "built")
    (tmp_path / "built" / "notes.txt").write_text("mine")
    autoprune.build(fast, shapes=[((1, 12),)], out=tmp_path / "built", name="small")
    assert (tmp_path / "built" / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="start Python anew"):  # which has the first one loaded
        wrapper(tmp_path / "built", "small")
    shutil.copytree(tmp_path / "built", tmp_path / "moved")
    assert wrapper(tmp_path / "moved", "small")(np.zeros((1, 12), np.float32)).shape == (1, 7)


def test_only_linux_builds_for_the_host(small: ProgramModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = small
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(AutopruneError, match="object files are for Linux, and this is darwin"):
        autoprune.build(fast, out=tmp_path / "built")


# The command ----------------------------------------------------------------------------------------------------------


@needs_compiler
def test_the_command_builds_a_file_for_several_targets(
    small: ProgramModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    autoprune.save(small, tmp_path / "my-model.safetensors")
    command = ["build", str(tmp_path / "my-model.safetensors"), "--out", str(tmp_path / "built")]
    app(
        [*command, "--target", "host", "--target", "aarch64", "--shape", "1,12", "--shape", "2,12"],
        standalone_mode=False,
    )
    printed, x = capsys.readouterr().out, torch.randn(2, 12)
    assert "| host    | 1x12, 2x12 |" in printed
    assert f"Written for aarch64 in {tmp_path / 'built' / 'aarch64'}: my_model.o, my_model.h" in printed
    with torch.inference_mode():
        assert_same(wrapper(tmp_path / "built" / "host", "my_model")(x.numpy()), small(x))
    with pytest.raises(ConfigError, match="--shape '1,a' is no shape"):
        app([*command, "--shape", "1,a"], standalone_mode=False)


@needs_compiler
def test_the_command_takes_a_run_directory(small: ProgramModel, tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    autoprune.save(small, tmp_path / "digits" / "repacked.safetensors")
    app(["build", str(tmp_path / "digits"), "--out", str(tmp_path / "built")], standalone_mode=False)
    x = torch.randn(3, 12)
    with torch.inference_mode():
        assert_same(wrapper(tmp_path / "built", "digits")(x.numpy()), small(x))


def test_the_shell_completes_the_targets_that_there_are() -> None:
    assert completed_target("") == [HOST, *PLATFORMS]


def test_cross_compilers_are_called_as_debian_calls_their_packages() -> None:
    assert PLATFORMS["x86-64-v3"].debian_package == "gcc-x86-64-linux-gnu"
    assert PLATFORMS["wasm32"].debian_package == ""


class Wave(nn.Module):
    """A Linear and a function of what it gives."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.function = nn.Linear(12, 24), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


def test_builds_that_differ_in_a_function_alone_have_other_marks(tmp_path: Path) -> None:
    models = [program(Wave(function), torch.ones(3, 12), tmp_path) for function in (torch.sin, torch.cos)]
    first, second = (compiled(model).marks for model in models)
    assert first != second


@pytest.mark.parametrize("target", [HOST, *PLATFORMS])
def test_the_pages_and_the_help_name_every_target(target: str) -> None:
    guide = Path(__file__).parents[2] / "docs" / "guide"
    assert f"`{target}`" in (guide / "build.md").read_text()
    option = get_type_hints(build, include_extras=True)["targets"].__metadata__[0]
    assert re.search(rf" {target}[,;]", option.help)


def test_the_command_says_what_it_takes(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"my.models:pruned. Give a file that autoprune repack --save wrote"):
        app(["build", "my.models:pruned", "--out", str(tmp_path)], standalone_mode=False)
