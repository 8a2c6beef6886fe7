"""What a directory's files were made of, so that none is ever taken for those of another model, other data or code.

A run's directory has an ``identity.json``: fingerprints of all that its stages depend on beside the config, by part and
piece. It is written once, when the task has proved to work, and compared at every start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from autoprune.errors import ConfigError, FileError
from autoprune.files import read_json, write_json
from autoprune.identity.digest import digest
from autoprune.identity.fingerprint import (
    fingerprint,
    function_fingerprints,
    model_fingerprints,
    value_fingerprints,
)
from autoprune.identity.reach import Reach
from autoprune.masks import Batches
from autoprune.tasks.base import Task
from autoprune.tasks.batches import first_batches

IDENTITY_VERSION = 2
VARIES = "varies"  # of a piece that changes while the same program runs: it tells nothing
BATCHES = 4  # of each split are read
_SHOWN = 3

Parts = Mapping[str, Mapping[str, str]]


def task_parts(task: Task) -> dict[str, Mapping[str, str]]:
    """The fingerprints of a task: its model, its data and its functions.

    Example inputs are known by type and shape: their values are often drawn anew by the program, and decide nothing.
    """
    splits = {"training": task.train, "validation": task.validation, "test": task.testing}
    reach = Reach(task.model, task.score, task.loss, *splits.values())  # `evaluate` may read an attribute of the model
    model = model_fingerprints(task.model, reach)
    examples = task.examples or ()
    return {
        "the model's weights": model["weights"],
        "the model's buffers": model["buffers"],
        "the model's architecture": model["architecture"],
        **{f"the {name} data": batches_fingerprints(split, reach) for name, split in splits.items()},
        "evaluate": function_fingerprints(task.score, reach),
        "the loss": function_fingerprints(task.loss, reach),
        "the metric": {"figure": fingerprint(task.metric)},
        "the example inputs": {f"number {i + 1}": f"{x.dtype} {tuple(x.shape)}" for i, x in enumerate(examples)},
    }


def batches_fingerprints(batches: Batches, reach: Reach) -> dict[str, str]:
    """Of a split: how many batches, the loader or the batches in memory, and the first batches as they are read.

    Those are read twice: what differs the second time, though all random numbers begin alike, tells nothing.
    """
    held = getattr(batches, "dataset", batches)
    found = {
        **value_fingerprints(batches, "content", reach),
        "size": _length(batches),
        "samples": _length(held),
    }
    if isinstance(batches, (list, tuple)):
        return found
    first, again = (first_batches(batches, BATCHES) for _ in range(2))
    for number, batch in enumerate(first):
        known = fingerprint(batch)
        same = number < len(again) and fingerprint(again[number]) == known
        found[f"batch {number + 1}"] = known if same else VARIES
    return found


def _length(value: Any) -> str:
    try:
        return str(len(value))
    except TypeError:  # of an iterable dataset nobody knows
        return "unknown"


class Claim:
    """The ``identity.json`` of a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._path = directory, directory / "identity.json"

    @property
    def key(self) -> str:
        """A text that is this directory's and its copies' alone."""
        return str(self._read()["key"])

    def check(self, parts: Parts) -> None:
        """Raises ConfigError where the directory was made of something else; parts it does not know are left alone."""
        if not self._path.exists():
            if (self.directory / "config.json").exists():
                raise ConfigError(
                    f"{self.directory} has a config.json and no {self._path.name}, so nobody knows what model and data "
                    "it was made with. Give another directory, or delete this one to start anew."
                )
            return
        made = self._read()["parts"]
        if differing := [
            told for name, now in parts.items() if name in made and (told := _told(name, made[name], now))
        ]:
            raise ConfigError(
                f"{self.directory} was made with something else: {'; '.join(differing)}. Nothing was changed. Give "
                "another directory, or delete this one to start anew; a value that every start of the program makes "
                "anew, such as a time, must not be read there."
            )

    def write(self, parts: Parts) -> None:
        """Claims the directory, if it is not yet."""
        if not self._path.exists():
            key = digest(*(text for name in sorted(parts) for text in (name, fingerprint(parts[name]))))
            write_json(self._path, {"version": IDENTITY_VERSION, "key": key, "parts": parts, "notes": {}})

    def first(self, name: str, text: str) -> str:
        """The text that was first noted under `name`: `text` itself, where none was.

        What the parts tell to be the same is called the same, whatever changed of itself since.
        """
        made = self._read()
        if name not in made["notes"]:
            made["notes"][name] = text
            write_json(self._path, made)
        return str(made["notes"][name])

    def loosen(self, before: Parts, now: Parts) -> None:
        """Notes which pieces changed while the program ran, such as a count of calls: they tell nothing from now on."""
        changed = {name: list(_differing(before[name], pieces)) for name, pieces in now.items()}
        if not any(changed.values()) or not self._path.exists():
            return
        made = self._read()
        for name, pieces in changed.items():
            come_or_gone = (piece for piece in pieces if (piece in before[name]) != (piece in now[name]))
            around = {f"{piece.rpartition('.')[0]}.*" for piece in come_or_gone if "." in piece}
            made["parts"][name] |= dict.fromkeys([*pieces, *sorted(around)], VARIES)
        write_json(self._path, made)

    def _read(self) -> dict[str, Any]:
        made = read_json(self._path, "the identity of the run")
        try:
            if made["version"] != IDENTITY_VERSION:
                raise ValueError(f"version {made['version']!r}, not {IDENTITY_VERSION}")
            parts = {str(name): {str(k): str(v) for k, v in pieces.items()} for name, pieces in made["parts"].items()}
            notes = {str(name): str(text) for name, text in made["notes"].items()}
            return {"version": IDENTITY_VERSION, "key": str(made["key"]), "parts": parts, "notes": notes}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileError(
                f"the identity of the run is corrupt: {self._path} ({error}). Delete {self.directory} to start anew."
            ) from None


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """The pieces that are not the same; one that came or went tells nothing where others did so of themselves."""
    for piece in sorted({*before, *now}):
        if VARIES in (before.get(piece), now.get(piece)) or before.get(piece) == now.get(piece):
            continue
        names = piece.split(".")
        around = (f"{'.'.join(names[:count])}.*" for count in range(1, len(names)))
        if (piece in before and piece in now) or not any(each in before for each in around):
            yield piece


def _told(name: str, before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """A part and its differing pieces for reading; empty where nothing tells them apart."""
    pieces: Sequence[str] = list(_differing(before, now))
    more = f" and {len(pieces) - _SHOWN} more" if len(pieces) > _SHOWN else ""
    return f"{name} ({', '.join(pieces[:_SHOWN])}{more})" if pieces else ""
