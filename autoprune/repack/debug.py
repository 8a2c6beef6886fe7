"""Looking at a model on its way to a program.

``AUTOPRUNE_DUMP=DIR`` writes every intermediate form into a file of its own, in order; ``AUTOPRUNE_VERIFY=1`` checks
each one: a graph after every pass that changed it, a lowered program when its memory is planned.
"""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

from autoprune.files import write_text

_numbers = count(1)


def dump(stage: str, form: object) -> None:
    """Writes ``str(form)`` to ``NNN-STAGE.txt`` in the folder that AUTOPRUNE_DUMP names; nothing where it is unset."""
    if folder := os.environ.get("AUTOPRUNE_DUMP"):
        write_text(Path(folder) / f"{next(_numbers):03d}-{stage}.txt", f"{form}\n")


def dumping() -> bool:
    return bool(os.environ.get("AUTOPRUNE_DUMP"))


def verifying() -> bool:
    return os.environ.get("AUTOPRUNE_VERIFY", "0") not in ("", "0")
