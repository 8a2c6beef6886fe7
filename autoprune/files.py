"""Reading and writing files so that a killed process never leaves half of one, and no load runs code.

Every file carries a checksum of all it says, which reading compares: of a safetensors file over names, types, shapes,
bytes and metadata, of a JSON document over its data, of each JSON line over its data and the checksum of the line
before. No checksum tells that the last lines of a log are missing: that is what a killed process leaves.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
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


def cache_folder() -> Path:
    """``$AUTOPRUNE_CACHE``, or ``autoprune`` in the user's cache directory."""
    if folder := os.environ.get("AUTOPRUNE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoprune"


def _replace(path: Path, write: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        write(aside)
        with aside.open("rb") as handle:
            os.fsync(handle.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


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
    try:
        if path.stat().st_size > LARGEST_TEXT:
            raise FileError(f"{what} is too large: {path} has more than {LARGEST_TEXT} bytes.")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError(f"{what} not found: {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{what} cannot be read: {path} ({error}).") from None


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
    if not path.exists():
        return []
    if path.stat().st_size > LARGEST_LOG:
        raise FileError(f"{what} is too large: {path} has more than {LARGEST_LOG} bytes.")
    raw = path.read_bytes()
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
    if not path.is_file():
        raise FileError(f"{what} not found: {path}.")
    try:
        with path.open("rb") as start:
            if int.from_bytes(start.read(8), "little") > LARGEST_TEXT:
                raise FileError("it is no safetensors file")
        with safe_open(str(path), framework="pt") as handle:
            tensors, said = {name: handle.get_tensor(name) for name in handle.keys()}, dict(handle.metadata() or {})  # noqa: SIM118
        if set(said) != {_ABOUT}:
            raise FileError("it has no checksum: an earlier release wrote it, or something else did")
        about = without_checksum(parse_json(said[_ABOUT]), partial(_checksum, tensors))
    except (SafetensorError, OSError, ValueError, RuntimeError, FileError) as error:
        raise FileError(f"{what} is corrupt: {path}: {error}. {_RESTORE}") from None
    return tensors, about


def _checksum(tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> str:
    names = sorted(tensors)
    described = {name: [str(tensors[name].dtype), list(tensors[name].shape)] for name in names}
    parts = (tensors[name].flatten().view(torch.uint8).numpy().data for name in names)
    return checksum_of([described, about], parts)
