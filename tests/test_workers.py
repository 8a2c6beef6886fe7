"""Worker processes: they end with their parent from their first import on, and take along what they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autoprune.processes.workers import Workers

MODULE = """
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def started(process: int) -> None:
    (HERE / f"{process}.pid").touch()


def begins(item: int) -> None:
    started(os.getpid())
    started(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)
    time.sleep(600)


if Path(sys.argv[0]).name == "worker_process.py" and (HERE / "slow").exists():
    started(os.getpid())
    time.sleep(600)
"""
SCRIPT = """
import os
import sys
import time
sys.path[:0] = sys.argv[1:]
import troubled
from autoprune.processes.workers import Workers, end_forks_with_this
if (troubled.HERE / "fork").exists():
    end_forks_with_this()
    troubled.started(os.getpid())
    if os.fork() == 0:
        troubled.started(os.getpid())
    time.sleep(600)
list(Workers(troubled.begins, 2).as_done([1, 2]))
"""  # with no guard around what starts processes: workers do not import it


@pytest.fixture
def caller(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts a process whose two workers work for ten minutes, each with a process of its own."""
    (tmp_path / "troubled.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    root = str(Path(__file__).resolve().parents[1])
    callers = []

    def started() -> subprocess.Popen[bytes]:
        command = [sys.executable, str(tmp_path / "script.py"), root, str(tmp_path)]
        callers.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        return callers[-1]

    yield started
    for each in callers:
        each.kill()
        each.wait()
    for process in processes(tmp_path):
        if alive(process):
            os.kill(process, signal.SIGKILL)


def processes(folder: Path) -> set[int]:
    return {int(path.stem) for path in folder.glob("*.pid")}


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def soon(done: Callable[[], bool], seconds: float = 100.0) -> bool:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.05)
    return done()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("what", "started"), [("slow", 2), ("work", 4), ("fork", 2)])
def test_workers_and_forks_end_with_a_parent_that_is_killed(
    what: str, started: int, caller: Callable[[], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    (tmp_path / what).touch()
    parent = caller()
    assert soon(lambda: len(processes(tmp_path)) == started)
    assert all(map(alive, processes(tmp_path)))
    parent.kill()
    parent.wait()
    assert soon(lambda: not any(map(alive, processes(tmp_path))))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_that_is_killed_takes_along_what_it_started(
    caller: Callable[[], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    caller()
    assert soon(lambda: len(processes(tmp_path)) == 4)
    before = processes(tmp_path)
    workers = {process for process in before if os.getpgid(process) == process}
    assert len(workers) == 2
    for process in workers:
        os.kill(process, signal.SIGKILL)
    assert soon(lambda: not any(map(alive, before)))
    assert soon(lambda: len(processes(tmp_path)) == 8)  # others have their items


def test_outcomes_and_what_was_raised_come_back() -> None:
    factor = 24  # a local function is sent by value
    workers: Workers[int, int] = Workers(lambda item: factor // item, 1)
    try:
        assert dict(workers.as_done([4, -6, 8])) == {0: 6, 1: -4, 2: 3}
        assert dict(workers.as_done([])) == {}
        with pytest.raises(RuntimeError, match=r"(?s)a worker failed:.*ZeroDivisionError"):
            dict(workers.as_done([1, 0]))
    finally:
        workers.close()
