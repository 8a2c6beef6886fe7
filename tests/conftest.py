"""One thread, a cache folder of the tests' own, kernels compiled once, and properties that do not vary in CI."""

from __future__ import annotations

import copy
import gc
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from functools import cache, wraps
from pathlib import Path
from typing import Any

import llvmlite
import pytest
import torch
from hypothesis import settings

from autoprune.repack.kernels import compiler

# Torch remembers what tracing an operator gave. That pays in deep networks; those of the tests are small, and traced in
# three quarters of the time without. Read when torch's compiler is loaded, here and in the processes that tests start.
os.environ["TORCH_FAKE_TENSOR_DISPATCH_CACHE"] = "0"
# Inductor would compile a file, and load it in a Python of its own, to ask whether g++ knows this CPU's vectors.
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"
torch.set_num_threads(1)
settings.register_profile("dev", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


MEMORY = Path("/dev/shm")
ROOM = 2**30  # bytes; a run leaves a tenth of them


def pytest_configure() -> None:
    """Files of tests lie in memory where there is room: those that are written safely wait for a disk."""
    if MEMORY.is_dir() and os.access(MEMORY, os.W_OK):
        room = os.statvfs(MEMORY)
        if room.f_bavail * room.f_frsize > ROOM and not room.f_flag & os.ST_NOEXEC:  # tests write commands and run them
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's cache, whatever environment variables the shell has set."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOPRUNE_CACHE", str(folder))
        patch.setenv("AUTOPRUNE_VERIFY", "1")  # every intermediate form of every model of the tests
        yield folder


def pytest_collection_finish() -> None:
    """What importing has made stays; walking through it again and again takes up to 8% of a file's time.

    Nor is what a tracing has made walked through before it is over.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)


@pytest.fixture(scope="module")
def short_tables() -> Iterator[None]:
    """Latency tables of few sparsities, for tests of what is done with one; `test_profile.py` measures whole ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autoprune.evaluation.profile.ANCHORS", (0.5, 0.9, 0.98))
        patch.setattr("autoprune.evaluation.profile.WHOLE_ANCHORS", (0.0, 0.8))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_seeds_for_devices_that_are_not_there() -> Iterator[None]:
    """Torch writes down its caller's whole stack, for each kind of device, whenever numbers are seeded."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (torch.cuda, torch.xpu, torch.mtia):
            if not kind.is_available():
                patch.setattr(kind, "manual_seed_all", lambda seed: None, raising=False)  # torch 2.9 has none of MTIA
        yield


@pytest.fixture(scope="session", autouse=True)
def onnx_functions_read_once() -> Iterator[None]:
    """Torch reads the source of all its ONNX functions for each export, in half the time of a small model's."""
    export = torch.onnx.export
    with pytest.MonkeyPatch.context() as patch:

        @cache
        def remember() -> None:
            from torch.onnx._internal.exporter import _registration  # here: it takes a second to load

            read = cache(_registration.ONNXRegistry.from_torchlib)

            def copied(**opset: int) -> Any:
                registry = copy.copy(read(**opset))
                registry.functions = {name: list(rows) for name, rows in registry.functions.items()}
                return registry

            patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(copied))

        @wraps(export)
        def exported(*args: Any, **kwargs: Any) -> Any:
            remember()
            return export(*args, **kwargs)

        patch.setattr(torch.onnx, "export", exported)
        yield


@pytest.fixture(scope="session", autouse=True)
def kernels_compiled_once(pytestconfig: pytest.Config) -> Iterator[None]:
    """A kernel that any process or run of the tests has compiled is read from pytest's cache.

    A file's name says all that the compiler is given, so what is tested is what would be compiled now. What other
    versions of the kernels left is removed.
    """
    if not pytestconfig.pluginmanager.has_plugin("cacheprovider"):
        yield
        return
    sources = [each.read_bytes() for each in sorted(Path(compiler.__file__).parent.glob("*.py"))]
    version = hashlib.sha256(b"".join([llvmlite.__version__.encode(), *sources])).hexdigest()[:16]
    compile_now, folder = compiler.object_code, pytestconfig.cache.mkdir(f"kernels-{version}")
    for other in folder.parent.glob("kernels-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)  # another process removes it, too

    def object_code(module: Any, target: compiler.Target) -> bytes:
        text = str(module)
        if re.search(r"inttoptr i64 \d", text):  # an address of this process
            return compile_now(text, target)
        file = folder / hashlib.sha256(f"{target} {text}".encode()).hexdigest()
        if file.exists():
            return file.read_bytes()
        code = compile_now(text, target)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(code)
        unfinished.replace(file)
        return code

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "object_code", object_code)
        yield
