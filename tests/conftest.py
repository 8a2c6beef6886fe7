"""One thread, a cache folder of the tests' own, and properties that do not vary from run to run in CI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

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
