"""Building models in tests, and running what was built."""

from __future__ import annotations

import importlib.util
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.repack import ProgramModel, repack
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.runtime.program import Shapes
from tests.laws.test_program import prune, told

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
STRICT = ("-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror")


def program(model: nn.Module, inputs: Any, folder: Path, threads: int = 1, sparsity: float = 0.5) -> ProgramModel:
    """A pruned model, repacked without timing anything."""
    prune(model.eval(), "group", sparsity)
    fast = repack(model, inputs, form="program", threads=threads, cache=told(folder, Tiling))
    assert isinstance(fast, ProgramModel)
    return fast


def wrapper(folder: Path, name: str, **arguments: Any) -> Any:
    """The model of a built folder, by its Python wrapper."""
    spec = importlib.util.spec_from_file_location(f"built_{name}", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Model(**arguments)


def built(fast: ProgramModel, folder: Path, shapes: Sequence[Shapes] | None = None, **arguments: Any) -> Any:
    """A program built for this machine, by its Python wrapper."""
    autoprune.build(fast, shapes=shapes, out=folder, name="small", **arguments)
    return wrapper(folder, "small")


def assert_same(got: Any, wanted: Any) -> None:
    """The same structure, and arrays with the bits of the tensors."""
    if isinstance(wanted, Tensor):
        assert isinstance(got, np.ndarray)
        assert got.shape == tuple(wanted.shape)
        assert torch.equal(torch.from_numpy(got), wanted)
    elif isinstance(wanted, (tuple, list)):
        assert type(got) is type(wanted)
        assert len(got) == len(wanted)
        for ours, theirs in zip(got, wanted, strict=True):
            assert_same(ours, theirs)
    elif hasattr(wanted, "keys"):
        assert list(got) == list(wanted.keys())
        for key in wanted.keys():  # noqa: SIM118  a record has keys, and is no mapping
            assert_same(got[key], wanted[key])
    else:
        assert got == wanted


def run(*command: Path | str, cwd: Path | None = None) -> str:
    """What a command prints; a failure fails the test with what it says."""
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def undefined(code: bytes) -> set[str]:
    """The symbols that an object file wants from elsewhere; of WebAssembly, its functions."""
    return _imported_functions(code) if code.startswith(b"\0asm") else _undefined_in_elf(code)


def _undefined_in_elf(code: bytes) -> set[str]:
    wide = code[4] == 2
    start, size, count = struct.unpack_from("<Q10xHH" if wide else "<I10xHH", code, 40 if wide else 32)
    header = "<IIQQQQIIQQ" if wide else "<IIIIIIIIII"
    sections = [struct.unpack_from(header, code, start + number * size) for number in range(count)]
    found = set()
    for _, kind, _, _, place, length, link, _, _, entry in sections:
        if kind == 2:  # SHT_SYMTAB; its link is the table of names
            for at in range(place + entry, place + length, entry):  # the first one is none
                name, section = struct.unpack_from("<I2xH" if wide else "<I10xH", code, at)
                text = code[sections[link][4] + name :].split(b"\0", 1)[0]
                if section == 0 and text:
                    found.add(text.decode())
    return found


def _imported_functions(code: bytes) -> set[str]:
    place, found = 8, set[str]()

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = code[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def text() -> str:
        nonlocal place
        length = number()
        place += length
        return code[place - length : place].decode()

    while place < len(code):
        section, end = number(), number()
        end += place
        for _ in range(number() if section == 2 else 0):
            _, name, kind = text(), text(), number()
            if kind == 0:
                found.add(name)
                number()
            elif kind == 3:  # a global: its type, whether it may change
                place += 2
            else:
                place += kind == 1  # a table's type
                limits = number()
                number()
                if limits & 1:
                    number()
        place = end
    return found
