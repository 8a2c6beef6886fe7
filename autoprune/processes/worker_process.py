"""A worker process, from its first instruction on: it ends with its parent, and whatever it started ends with it.

Run as a script, by its path: as a module of the package it would first import the package, and a parent that was killed
meanwhile would leave it behind. `autoprune.processes.workers` is the other side of the pipe.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from typing import Any

if sys.platform == "win32":
    from multiprocessing.connection import PipeConnection as Channel
else:
    from multiprocessing.connection import Connection as Channel

LOOK_S = 0.5  # between two looks at who the parent is: its end of the pipe may be held open by what it forked


def main() -> None:
    """A worker's life: a function comes, then items; what it makes of each, or what was raised, goes back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it ends us
    channel: Channel[bytes, bytes] = Channel(int(sys.argv[1]))
    received: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(channel, int(sys.argv[2]), received), daemon=True).start()
    sys.path[:] = pickle.loads(received.get())  # noqa: S301 - all of it is the parent's memory, not a file
    function = received.get()
    while True:
        channel.send_bytes(_outcome(function, received.get()))


def _receive(channel: Channel[bytes, bytes], parent: int, received: queue.SimpleQueue[bytes]) -> None:
    """Takes in what the parent sends, until there is no parent."""
    try:
        while os.getppid() == parent:
            if channel.poll(LOOK_S):
                received.put(channel.recv_bytes())
    except (EOFError, OSError):
        pass
    if sys.platform != "win32":
        os.killpg(0, signal.SIGKILL)  # the group is our own: a DataLoader's workers end too
    os._exit(1)


_loaded: dict[bytes, Any] = {}


def _outcome(function: bytes, item: bytes) -> bytes:
    """What goes back: whether it went well, and the result or what was raised."""
    try:
        if function not in _loaded:
            _loaded[function] = pickle.loads(function)  # noqa: S301
        return pickle.dumps((True, _loaded[function](pickle.loads(item))))  # noqa: S301
    except Exception as error:
        from autoprune.errors import AutopruneError

        if isinstance(error, AutopruneError):
            return pickle.dumps((False, error))
        # The error itself may not be picklable.
        return pickle.dumps((False, RuntimeError(f"a worker failed:\n{traceback.format_exc()}")))


if __name__ == "__main__":
    main()
