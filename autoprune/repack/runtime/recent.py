"""What is remembered as long as there is room for it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Values by key; where they take more room than there is, those go that were not asked for the longest.

    Threads may share it.

    Args:
        room: bytes of all of them together; the last to come stays even where it takes more.
        gone: told each value that goes.
    """

    def __init__(self, room: int, gone: Callable[[Value], object] = lambda _: None) -> None:
        self.room, self.taken = room, 0
        self._gone = gone
        self._held: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Key) -> Value | None:
        """The value, which is the most recent one now; None where it is not held."""
        try:
            self._held.move_to_end(key)
            return self._held[key][0]
        except KeyError:  # or another thread's value took its room just now
            return None

    def add(self, key: Key, value: Value, size: int) -> None:
        """Holds a value of `size` bytes, and makes room for it."""
        dropped = []
        with self._lock:
            _, before = self._held.pop(key, (value, 0))
            self._held[key] = (value, size)
            self.taken += size - before
            while self.taken > self.room and len(self._held) > 1:
                _, (old, freed) = self._held.popitem(last=False)
                self.taken -= freed
                dropped.append(old)
        for old in dropped:
            self._gone(old)
