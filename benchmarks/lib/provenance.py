"""Where a figure comes from: the commit, the machine, and the versions of what computed it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from autoprune.latency.machine import machine_identity

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Provenance:
    """What is kept with every row and said on every page.

    Attributes:
        commit: the revision that was measured, short; empty outside a checkout.
        machine: of `identity`.
    """

    commit: str
    machine: Mapping[str, Any]

    @classmethod
    def here(cls) -> Provenance:
        return cls(commit(), identity())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def machine_text(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.machine.items())

    def __str__(self) -> str:
        return f"Commit {self.commit or 'unknown'}. {self.machine_text}."


@cache
def commit() -> str:
    """The revision that runs, as it was when it was first asked for; empty outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def identity() -> dict[str, Any]:
    """The machine, and the versions of Python, torch, autoprune and the engines that are installed."""
    found = {}
    for name in ("onnxruntime", "openvino"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {**machine_identity(), **found}


def machine_key() -> str:
    """A file name that differs where figures cannot be compared."""
    here = identity()
    digest = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:8]
    return f"{re.sub('[^a-z0-9]+', '-', here['cpu'].lower()).strip('-')}-{here['cores']}-{digest}"


class Machines:
    """Which machine each row of a page was measured on: a last column, where they are several.

    Args:
        rows: of all rows of the page; None where a row does not say.

    Attributes:
        header: of the column; empty where all rows are of one machine.
    """

    def __init__(self, rows: Iterable[Provenance | None]) -> None:
        texts = sorted({_machine_of(each) for each in rows}, key=lambda text: (text == NOT_RECORDED, text))
        self._letters = {text: chr(ord("A") + at) for at, text in enumerate(texts)}
        self.header = ("machine",) if len(texts) > 1 else ()

    def cell(self, rows: Iterable[Provenance | None]) -> tuple[str, ...]:
        """The column's cell for what was measured in these rows; empty where there is no column."""
        found = sorted({self._letters[_machine_of(each)] for each in rows})
        return (", ".join(found),) if self.header else ()

    def legend(self) -> str:
        """Names the machines, for the foot of the page."""
        if self.header:
            return "\n".join(f"- Machine {letter}: {text}." for text, letter in self._letters.items())
        return "".join(f"Machine: {text}." for text in self._letters)


def _machine_of(row: Provenance | None) -> str:
    return NOT_RECORDED if row is None else row.machine_text
