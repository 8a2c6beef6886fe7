"""One thread, a cache folder of the tests' own, kernels compiled once, and properties that do not vary in CI."""

from __future__ import annotations

import gc
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
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
torch.set_num_threads(1)
settings.register_profile("dev", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's cache, whatever environment variables the shell has set."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOPRUNE_CACHE", str(folder))
        patch.setenv("AUTOPRUNE_VERIFY", "1")  # every intermediate form of every model of the tests
        yield folder


def pytest_collection_finish() -> None:
    """What importing has made stays; walking through it again and again takes up to 8% of a file's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


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
            return compile_now(module, target)
        file = folder / hashlib.sha256(f"{target} {text}".encode()).hexdigest()
        if file.exists():
            return file.read_bytes()
        code = compile_now(module, target)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(code)
        unfinished.replace(file)
        return code

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "object_code", object_code)
        yield
