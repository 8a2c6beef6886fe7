"""A process held to an instruction set."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from autoprune.errors import AutopruneError
from benchmarks.lib import isa

ROOT = Path(__file__).resolve().parents[2]
LINUX = sys.platform == "linux" and platform.machine() == "x86_64"


def run(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != isa.VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not LINUX, reason="Linux on x86-64 alone")
def test_tiles_are_refused_to_the_process_and_to_those_it_starts() -> None:
    again = "import os, sys; from benchmarks.lib.isa import *; print(tiles_allowed(), os.environ[VARIABLE])"
    code = f"from benchmarks.lib.isa import *; hold_to('vnni', ['-c', {again!r}])"
    assert run(code) == "False AVX512_CORE_VNNI"


@pytest.mark.skipif(not LINUX, reason="Linux on x86-64 alone")
def test_a_process_that_is_held_already_goes_on() -> None:
    code = (
        "import os; from benchmarks.lib.isa import *; os.environ[VARIABLE] = ISAS['vnni']; "
        "hold_to('vnni', ['-c', 'print(0)']); print(tiles_allowed())"
    )
    assert run(code) == "False"


def test_elsewhere_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(AutopruneError, match="leave --isa out"):
        isa.hold_to("vnni", [])
