"""How long a search may take, counted over all processes that it is done in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autoprune.errors import FileError
from autoprune.files import read_json, write_json
from autoprune.latency.timer import Clock
from autoprune.metric import number

NOTED_EVERY_S = 1.0  # a killed search forgets no more of the time it took


class TimeLimit:
    """Counts from when it is made.

    Args:
        path: of the file that remembers the limit and the time that was spent.
        minutes: of the whole search, above 0; None takes the limit of the file, and where there is none sets none.
        clock: seconds, monotonic.

    Attributes:
        minutes: the limit; None where there is none.

    Raises:
        FileError: the file is corrupt.
    """

    def __init__(self, path: Path, minutes: float | None, clock: Clock) -> None:
        known_minutes, self._spent_s = _read(path) if path.exists() else (None, 0.0)
        self.minutes = known_minutes if minutes is None else minutes
        self._path, self._clock, self._read_s = path, clock, clock()
        self._noted_s = self._spent_s

    def over(self) -> bool:
        """Whether the time is over; asked after every piece of work."""
        if self.minutes is None:
            return False
        now_s = self._clock()
        self._spent_s += now_s - self._read_s
        self._read_s = now_s
        over = self._spent_s >= 60.0 * self.minutes
        if self._spent_s - self._noted_s >= NOTED_EVERY_S or (over and self._spent_s > self._noted_s):
            write_json(self._path, {"minutes": self.minutes, "spent_s": self._spent_s})
            self._noted_s = self._spent_s
        return over


def _read(path: Path) -> tuple[float, float]:
    data: dict[str, Any] = read_json(path, "the time of the search")
    minutes, spent_s = number(data.get("minutes")), number(data.get("spent_s"))
    if minutes is None or spent_s is None:
        raise FileError(f"the time of the search is corrupt: {path}. Delete it, and give --minutes again.")
    return minutes, spent_s
