"""Reading and writing files so that a killed process never leaves half of one, and no load runs code.

Every file carries a checksum of all it says, which reading compares: of a safetensors file over names, types, shapes,
bytes and metadata, of a JSON document over its data, of each JSON line over its data and the checksum of the line
before. No checksum tells that the last lines of a log are missing: that is what a killed process leaves.
"""

from __future__ import annotations

import glob
import json
import os
import re
import stat
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from autoprune.documents import CHECKSUM, checksum_of, parse_json, with_checksum, without_checksum
from autoprune.errors import FileError

if sys.platform != "win32":
    import fcntl

LARGEST_TEXT = 2**25  # bytes, of a document, of one JSON line, and of what a safetensors file says of its tensors
LARGEST_LOG = 2**30  # bytes of JSON lines
_ABOUT = "autoprune"  # the one entry of a safetensors file's metadata, a JSON document
_RESTORE = "Delete it or restore a copy."
_UNFINISHED = re.compile(r"\.(\d+)-\d+\.part$")  # as `_replace` names it: the process, the thread


def cache_folder() -> Path:
    """``$AUTOPRUNE_CACHE``, or ``autoprune`` in the user's cache directory.

    Raises:
        FileError: the user has no home directory.
    """
    if folder := os.environ.get("AUTOPRUNE_CACHE"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoprune"
    except RuntimeError:
        raise FileError(
            "there is no place for a cache: the user has neither HOME nor an entry in passwd. Set AUTOPRUNE_CACHE to a "
            "folder that can be written."
        ) from None


def check_cache() -> None:
    """Raises FileError where nothing can be kept in the cache: before work that would be lost."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = f"{folder}, the cache, cannot be written: {error.strerror}"
        raise FileError(f"{reason}. Set AUTOPRUNE_CACHE to a folder that can.") from error


def given_path(given: Path | str) -> Path:
    """The file that a user names; ``~`` is his home directory.

    Raises:
        FileError: it names a folder, or can be no name.
    """
    path = as_path(given)
    if str(given).endswith(("/", os.sep)):
        raise FileError(f"{given} names a folder: give the name of a file in it.")
    return path


def as_path(given: Path | str) -> Path:
    """The file or the folder that a user names; likewise.

    Raises:
        FileError: it is no text, is no UTF-8, holds a NUL, or begins with the home directory of nobody.
    """
    if not isinstance(given, (str, Path)):
        raise FileError(f"a file's name is a string or a pathlib.Path, not {given!r:.60}.")
    if "\0" in str(given):
        raise FileError(f"{str(given)!r} holds a NUL, which no file's name can: give another one.")
    try:
        os.fspath(given).encode()
        return Path(given).expanduser()
    except UnicodeEncodeError:
        raise FileError(f"{os.fsencode(given)!r} is no UTF-8: give the file another name.") from None
    except RuntimeError:
        raise FileError(f"{given} cannot be found: there is no such user, or he has no home directory.") from None


@contextmanager
def on_disk(path: Path, done: str = "written") -> Iterator[None]:
    """Says in one FileError what the system has against reading or writing a file."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter where safetensors cannot write
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        kept = "What was there before is whole, and the same command goes on once that is mended."
        told = kept if done == "written" else "Mend that, or give another file."
        raise FileError(f"{path} cannot be {done}: {reason}. {told}") from error


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is gone after the block; FileError where there is no place for one."""
    with on_disk(Path("a temporary file")):
        # A file that is still mapped cannot be deleted on Windows.
        made = TemporaryDirectory(prefix="autoprune-", ignore_cleanup_errors=True)
    with made as folder:
        yield Path(folder)


def place_for(path: Path) -> Path:
    """Where a file of that name is to be put: a link stays one. Makes its folder.

    Raises:
        FileError: something else than a file has the name.
    """
    place = Path(os.path.realpath(path))
    place.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        place.stat()  # raises for a link to itself
    if _stands_for_open_file(path) or (place.exists() and not place.is_file()):
        kind = "a folder" if place.is_dir() else "a device, a pipe or a socket"
        raise FileError(f"{path} is {kind}, which a file cannot replace: give the name of a file.")
    return place


def _stands_for_open_file(path: Path) -> bool:
    """Whether a name, such as /dev/stdout, is that of something this process has open: it must stay what it is."""
    while path.is_symlink():
        if os.path.realpath(path.parent).startswith("/proc/"):
            return True
        path = path.parent / path.readlink()
    return False


def _replace(path: Path, write: Any) -> None:
    with on_disk(path):
        place = place_for(path)
        aside = place.with_name(f".{place.name}.{os.getpid()}-{threading.get_ident()}.part")
        try:
            with aside.open("wb") as handle:
                mode = os.fstat(handle.fileno()).st_mode  # what the user's umask leaves
            write(aside)
            with aside.open("rb") as handle:
                os.fsync(handle.fileno())
            with suppress(PermissionError):  # of a file system without modes
                # safetensors lets nobody else read
                aside.chmod(stat.S_IMODE(place.stat().st_mode if place.exists() else mode))
            aside.replace(place)
        finally:
            aside.unlink(missing_ok=True)


def remove_unfinished(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes left half written in a folder and those in it; for who alone writes there.

    Args:
        folder: that of a run, or of files that are made in turn.
        name: of the one file whose leftovers are removed, in the folder itself.
    """
    found = (
        folder.glob(f".{glob.escape(name)}.*.part") if name else chain(folder.glob(".*.part"), folder.glob("*/.*.part"))
    )
    for path in found:
        writer = _UNFINISHED.search(path.name)
        if writer is not None and int(writer[1]) != os.getpid():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes `text` to the side and renames it into place."""
    _replace(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to the side and renames it into place."""
    _replace(path, lambda aside: aside.write_bytes(data))


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes `data` and their checksum as indented JSON, to the side and renamed into place."""
    write_text(path, json.dumps(with_checksum(data, checksum_of), indent=2, sort_keys=True) + "\n")


def read_text(path: Path, what: str) -> str:
    """Reads a text file; `what` names it in the FileError when it cannot be read."""
    raw = _read(path, what, LARGEST_TEXT)
    if raw is None:
        raise FileError(f"{what} not found: {path}.")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise FileError(f"{what} cannot be read: {path} is no text ({error}).") from None


def _read(path: Path, what: str, most: int) -> bytes | None:
    """All of a file; None where there is none."""
    with on_disk(path, "read"):
        try:
            with _opened(path, what) as handle:
                size = os.fstat(handle.fileno()).st_size
                raw = handle.read(most + 1) if size <= most else b""
        except FileNotFoundError:
            return None
    if size > most or len(raw) > most:  # it may have grown
        raise FileError(f"{what} is too large: {path} has more than {most} bytes.")
    return raw


def _opened(path: Path, what: str) -> IO[bytes]:
    """A file to read; FileError for what is none, such as a pipe, whose other end may never be written."""
    # without waiting, where the system knows that: for a pipe's other end already the opening waits
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(file).st_mode
    if not stat.S_ISREG(mode):
        os.close(file)
        kind = "a folder" if stat.S_ISDIR(mode) else "a device, a pipe or a socket"
        raise FileError(f"{what} cannot be read: {path} is no file but {kind}. Give the name of a file.")
    return os.fdopen(file, "rb")


def read_json(path: Path, what: str, *, by_hand: bool = False) -> dict[str, Any]:
    """Reads what `write_json` wrote; raises FileError that says what is wrong with it.

    Args:
        path: of the file.
        what: names it in the error.
        by_hand: people write and change such files, too: one without a checksum is taken as it is. The caller checks
            every key of it, so that no damage to the word "checksum" goes unseen.
    """
    text = read_text(path, what)
    try:
        document = parse_json(text)
        if by_hand and isinstance(document, dict) and CHECKSUM not in document:
            return document
        return without_checksum(document, checksum_of)
    except FileError as error:
        hint = f'If you changed it on purpose, delete its entry "{CHECKSUM}". Else delete' if by_hand else "Delete"
        raise FileError(f"{what} is corrupt: {path}: {error}. {hint} it or restore a copy.") from None


def append_line(path: Path, data: Mapping[str, Any]) -> None:
    """Appends one JSON line and flushes it to the disk. What a killed process left of a line is cut off before."""
    with on_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as handle, _alone(handle):
            last = _last_line(handle, path)
            line = with_checksum(data, partial(_chained, last))
            handle.write(json.dumps(line, sort_keys=True).encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())


def _last_line(handle: IO[bytes], path: Path) -> str:
    """The checksum of the last whole line of a log, "" when there is none; anything behind it is cut off."""
    size, block = handle.seek(0, os.SEEK_END), 2**12
    while True:
        block *= 4
        handle.seek(max(0, size - block))
        tail = handle.read()
        end = tail.rfind(b"\n") + 1
        start = tail.rfind(b"\n", 0, max(0, end - 1)) + 1
        if start or block >= size:
            break
    handle.truncate(size - len(tail) + end)
    if not end:
        return ""
    try:
        return str(parse_json(tail[start:end].decode())[CHECKSUM])
    except (FileError, UnicodeDecodeError, LookupError, TypeError):
        raise FileError(f"nothing can be added to {path}: its last line is corrupt. {_RESTORE}") from None


def _chained(before: str, data: Any) -> str:
    return checksum_of(data, [before.encode()])


@contextmanager
def _alone(handle: IO[bytes]) -> Iterator[None]:
    """No other process adds to the file meanwhile; where there are no such locks, nobody may."""
    if sys.platform != "win32":
        fcntl.flock(handle, fcntl.LOCK_EX)  # ends when the file is closed
    yield


def read_lines(path: Path, what: str) -> list[dict[str, Any]]:
    """Reads what `append_line` wrote. A torn last line (the process was killed while appending) is left out."""
    raw = _read(path, what, LARGEST_LOG) or b""
    rows, before = [], ""
    for number, line in enumerate(raw[: raw.rfind(b"\n") + 1].split(b"\n")[:-1], 1):
        try:
            document = parse_json(line.decode())
            rows.append(without_checksum(document, partial(_chained, before)))
        except (FileError, UnicodeDecodeError) as error:
            where = f"{path}, line {number}" + (" (or the one before is missing)" if number > 1 else "")
            raise FileError(f"{what} is corrupt: {where}: {error}. {_RESTORE}") from None
        before = document[CHECKSUM]
    return rows


def keep_lines(path: Path, count: int) -> None:
    """Drops the lines after the first `count`."""
    lines = (_read(path, "the log", LARGEST_LOG) or b"").splitlines(keepends=True)
    if len(lines) > count:
        write_bytes(path, b"".join(lines[:count]))


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any] | None = None) -> None:
    """Writes a safetensors file, to the side and renamed into place. Tensors are cloned to be contiguous.

    Args:
        path: of the file.
        tensors: likewise.
        about: what else it says, as JSON values.
    """
    whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    said = json.dumps(with_checksum(about or {}, partial(_checksum, whole)), sort_keys=True)
    _replace(path, lambda aside: save_file(whole, str(aside), {_ABOUT: said}))


def read_tensors(path: Path, what: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads a file of `write_tensors` as (tensors, about); raises FileError that says what is wrong with it."""
    tensors, said = _read_safetensors(path, what)
    return tensors, _checked_about(path, what, tensors, said)


def read_state(path: Path, what: str) -> dict[str, torch.Tensor]:
    """Reads a state dict that `write_tensors` or any other program wrote as a safetensors file; raises FileError.

    Where there is a checksum, it is checked.
    """
    tensors, said = _read_safetensors(path, what)
    if _ABOUT in said:
        _checked_about(path, what, tensors, said)
    return tensors


def _checked_about(path: Path, what: str, tensors: Mapping[str, torch.Tensor], said: Mapping[str, str]) -> Any:
    if set(said) != {_ABOUT}:  # perhaps somebody's weights, named by mistake: nothing to delete
        reason = f"{path} holds tensors but nothing that autoprune says of a file, and no checksum"
        plain = "a plain state dict is read with safetensors.torch.load_file"
        raise FileError(f"{what} cannot be read: {reason}; {plain}. Name another, or restore a copy.")
    try:
        return without_checksum(parse_json(said[_ABOUT]), partial(_checksum, tensors))
    except (ValueError, FileError) as error:
        raise _corrupt(path, what, error) from None


def _read_safetensors(path: Path, what: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with on_disk(path, "read"):
        if not path.exists():
            raise FileError(f"{what} not found: {path}.")
        with _opened(path, what) as start:
            header = int.from_bytes(start.read(8), "little")
        if header > LARGEST_TEXT:  # perhaps a file of something else, named by mistake: nothing to delete
            raise FileError(f"{what} cannot be read: {path} is no safetensors file. Name another, or restore a copy.")
        try:
            with safe_open(str(path), framework="pt") as handle:
                names, said = handle.keys(), dict(handle.metadata() or {})
                return {name: handle.get_tensor(name) for name in names}, said
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise _corrupt(path, what, error) from None


def _corrupt(path: Path, what: str, error: Exception) -> FileError:
    return FileError(f"{what} is corrupt: {path}: {error}. {_RESTORE}")


def _checksum(tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> str:
    names = sorted(tensors)
    described = {name: [str(tensors[name].dtype), list(tensors[name].shape)] for name in names}
    parts = (tensors[name].flatten().view(torch.uint8).numpy().data for name in names)
    return checksum_of([described, about], parts)
