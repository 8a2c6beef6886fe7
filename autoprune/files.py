"""Reading and writing files so that a killed process never leaves half of one, and no load runs code."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from autoprune.errors import FileError


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


def write_json(path: Path, data: Any) -> None:
    """Writes `data` as indented JSON, to the side and renamed into place."""
    write_text(path, json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_text(path: Path, what: str) -> str:
    """Reads a text file; `what` names it in the FileError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError(f"{what} not found: {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{what} cannot be read: {path} ({error}).") from None


def read_json(path: Path, what: str) -> Any:
    """Reads a JSON file; raises FileError naming the place where it is corrupt."""
    try:
        return json.loads(read_text(path, what))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FileError(
            f"{what} is corrupt: {path} is not valid JSON ({error}). Delete it or restore a copy."
        ) from None


def append_line(path: Path, data: Any) -> None:
    """Appends one JSON line and flushes it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(data, sort_keys=True, allow_nan=False) + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def read_lines(path: Path, what: str) -> list[Any]:
    """Reads JSON lines. A torn last line (the process was killed while appending) is cut off the file."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) != len(raw):
        with path.open("r+b") as handle:
            handle.truncate(len(whole))
    try:
        return [json.loads(line) for line in whole.decode("utf-8").splitlines() if line]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileError(f"{what} is corrupt: {path} ({error}). Delete it or restore a copy.") from None


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, to the side and renamed into place. Tensors are cloned to be contiguous."""
    whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    _replace(path, lambda aside: save_file(whole, str(aside), dict(metadata or {})))


def read_tensors(path: Path, what: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads a safetensors file as (tensors, metadata); raises FileError when it is missing or corrupt."""
    if not path.is_file():
        raise FileError(f"{what} not found: {path}.")
    try:
        with safe_open(str(path), framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, dict(handle.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise FileError(
            f"{what} is corrupt: {path} is not a valid safetensors file ({error}). Delete it or restore a copy."
        ) from None
