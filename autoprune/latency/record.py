"""Measurements that are kept one by one, so that a stopped measurement goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autoprune.errors import FileError
from autoprune.files import append_line, read_lines


class MeasurementRecord:
    """What was measured so far, in a file of JSON lines: first what it holds for, then a measurement each.

    Args:
        path: of the file; None remembers in memory alone.
        about: JSON values; measurements that were made for others are dropped.

    Attributes:
        known: how many measurements an earlier process has made.

    Raises:
        FileError: the file is corrupt.
    """

    def __init__(self, path: Path | None = None, about: Mapping[str, Any] | None = None) -> None:
        self._path, self._about = path, json.loads(json.dumps(about))
        self._values: dict[str, Any] = {}
        lines = read_lines(path, "the record of measurements") if path is not None else []
        try:
            if lines and lines[0]["about"] == self._about:
                self._values = {str(line["key"]): line["value"] for line in lines[1:]}
            elif lines:
                self.clear()
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"the record of measurements is corrupt: {path} ({error!r}). Delete it.") from None
        self.known = len(self._values)

    def __call__(self, key: str, measure: Callable[[], Any]) -> Any:
        """The measurement of this name, made now if it is not there yet; JSON values. None is none, and not kept."""
        if key not in self._values:
            value = measure()
            if value is None:
                return None
            if self._path is not None:
                if not self._values:
                    self._path.unlink(missing_ok=True)
                    append_line(self._path, {"about": self._about})
                append_line(self._path, {"key": key, "value": value})
            self._values[key] = value
        return self._values[key]

    def clear(self) -> None:
        """Forgets everything."""
        self._values.clear()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
