"""A directory has one writer; what a killed process held or left half written is in nobody's way."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from autoprune.config import parse_config
from autoprune.errors import InUse
from autoprune.pipeline.run import Run
from autoprune.processes.locks import FolderLock, turn
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.tuning.tuning import TuningCache

ROOT = Path(__file__).resolve().parents[1]
HOLDER = """
import os
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from autoprune.processes.locks import FolderLock
held = FolderLock(Path(sys.argv[2]))
held.take()
if os.fork() == 0:  # as a DataLoader's worker does, it holds what its parent held
    print("forked", flush=True)
    sys.stdin.readline()
    os._exit(0)
os.wait()
"""


def taken(folder: Path) -> FolderLock:
    lock = FolderLock(folder)
    lock.take()
    return lock


def in_a_thread(work: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_a_thread_may_take_a_folder_again_and_others_may_when_it_is_given_back(tmp_path: Path) -> None:
    outer, inner = taken(tmp_path / "run"), taken(tmp_path / "run")
    inner.close()
    inner.close()  # once is enough
    with pytest.raises(InUse, match=r"run is in use by another thread of this process \(MainThread\)"):
        in_a_thread(lambda: taken(tmp_path / "run"))
    outer.close()
    in_a_thread(lambda: taken(tmp_path / "run").close())
    outer.take()
    with pytest.raises(InUse):
        in_a_thread(lambda: taken(tmp_path / "else" / ".." / "run"))
    del outer  # whoever lets go of it gives it back
    in_a_thread(lambda: taken(tmp_path / "run").close())


def test_a_thread_that_has_ended_is_in_nobodys_way(tmp_path: Path) -> None:
    kept = []
    thread = threading.Thread(target=lambda: kept.append(taken(tmp_path)))
    thread.start()
    thread.join()
    taken(tmp_path).close()
    assert len(kept) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_another_process_is_named_and_waited_for_when_it_was_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(ROOT), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as holder:  # type: ignore[call-overload]
        assert holder.stdout.readline() == "forked\n"
        with pytest.raises(InUse, match=rf"in use by process {holder.pid} on {platform.node()}.*--run-dir"):
            taken(tmp_path)
        run = Run(parse_config({"task": "digits", "target": {"speedup": 2}}, "test"), tmp_path)
        with pytest.raises(InUse, match=f"process {holder.pid} "):
            run.lock.take()
        (tmp_path / "config.json").write_text('{"seed": 1}')
        with pytest.raises(InUse, match=f"process {holder.pid} "):  # not that the config is another one
            Run(parse_config({"task": "digits"}, "test"), tmp_path)
        (tmp_path / "config.json").unlink()
        unfinished = tmp_path / f".plan.json.{holder.pid}-140000.part"
        unfinished.touch()
        holder.kill()
        holder.wait()
        threading.Timer(0.3, holder.stdin.close).start()  # its child ends a little later
        run.lock.take()
        assert not unfinished.exists()


def test_what_is_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    gone = (".plan.json.7-140.part", "search/.agent.json.7-140.part")
    kept = (f".plan.json.{os.getpid()}-140.part", "video.mp4.part", ".notes.part", "plan.json")
    for name in (*gone, *kept):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    taken(tmp_path).close()
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*") if path.name != ".lock"} == set(kept)


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_needs_no_lock(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "open", refused)
    first = taken(tmp_path)
    in_a_thread(lambda: taken(tmp_path).close())
    first.close()
    with turn(tmp_path / "file"):
        pass


def test_what_several_make_is_made_in_turn(tmp_path: Path) -> None:
    path, said, order = tmp_path / "table.json", [], []
    (tmp_path / ".table.json.7-140.part").touch()
    begun, waiting = threading.Event(), threading.Event()

    def first() -> None:
        with turn(path):
            begun.set()
            assert waiting.wait(60)
            order.append("first")

    def told(text: str) -> None:
        said.append(text)
        waiting.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(60)
    with turn(path, told):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    assert said == [f"waiting for process {os.getpid()} on {platform.node()}, which is making {path}"]
    assert list(tmp_path.iterdir()) == []


def test_tunings_found_beside_each_other_are_all_kept(tmp_path: Path) -> None:
    caches = [TuningCache(tmp_path / "tuning.json") for _ in range(2)]
    for index, cache in enumerate(caches):
        cache.found[f"layer {index}"] = Tiling(8, 4 + index)
        cache.changed = True
        cache.save()
    assert set(TuningCache(tmp_path / "tuning.json").found) == {"layer 0", "layer 1"}
