"""The identity of the machine that numbers were measured on, so that they are not used on another."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from llvmlite import binding

from autoprune.version import __version__

# What changes which kernel is fastest; the full list has a hundred names that never matter.
VECTOR_FEATURES = (
    "sse4.2",
    "avx",
    "f16c",
    "fma",
    "avx2",
    "avx512f",
    "avx512vnni",
    "avx512bf16",
    "amx-bf16",
    "neon",
    "sve",
)


@cache
def machine_identity() -> dict[str, Any]:
    """Returns CPU, cores, vector features, operating system and versions as plain JSON values.

    It does not hold what may change while the numbers stay good: host name, load, kernel release, clock speed.
    """
    return {
        "cpu": _cpu_model(Path("/proc/cpuinfo")),
        "cores": os.cpu_count() or 1,
        "vector": _vector_features(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "llvmlite": importlib.metadata.version("llvmlite"),
        "autoprune": __version__,
    }


def machine_text() -> str:
    """The identity on one line, for the foot of a report."""
    return ", ".join(f"{key} {value}" for key, value in machine_identity().items())


def differences(measured: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Lists what differs between two identities (or settings), one phrase each; empty when they are equal.

    Values are compared as JSON, so that a tuple equals the list it became in a file.
    """
    return [
        f"{key} was {_shown(measured, key)}, here it is {_shown(here, key)}"
        for key in sorted({*measured, *here})
        if _shown(measured, key) != _shown(here, key)
    ]


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(json.loads(json.dumps(values[key], sort_keys=True))) if key in values else "not recorded"


def _cpu_model(cpuinfo: Path) -> str:
    """The marketing name on Linux, else what the platform calls the processor."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            field, _, value = line.partition(":")
            if field.strip() == "model name":
                return value.strip()
    return platform.processor() or str(binding.get_host_cpu_name())


def _vector_features() -> str:
    host = binding.get_host_cpu_features()
    return " ".join(name for name in VECTOR_FEATURES if host.get(name))
