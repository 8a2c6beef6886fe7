"""Mutants of files: damage to bytes, and changes to what a file says, under its own checksum or a new one."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from autoprune.documents import CHECKSUM
from autoprune.errors import FileError
from autoprune.files import append_line, read_tensors, write_json, write_tensors

HUGE = [2**31 - 1, 2**31, 2**40, 2**63, 10**30, 10**39, 4096, 65_536, 10**6, 10**8]
NESTED: Any = 0
for _ in range(200):
    NESTED = [NESTED]
WILD: list[Any] = [
    *(-1, 0, 1, 2, 3, 4, 7, 8, 16, *HUGE, *HUGE, 10**400, 0.5, -0.0, 1e308, -1e308, 1e-320),
    *(float("inf"), float("nan"), True, False, None, "", "0", "8", "jit", "torch", "__class__", "..", "/", "x" * 5000),
    *("x", "relu", "float32", "aten.add.Tensor", "aten.unbind.int", [], [3], [1, 1], [2, 3], {}, {"0": 1}, [0] * 3000),
    *({"ref": "x"}, {"name": "group", "args": {"size": 2**40}}, {"dtype": "float64"}, {"float": "nan"}),
    NESTED,
]
TOKENS = ["9" * 5000, "1e999", "NaN", "nan", "inf", "-1", "0", "[" * 2000, "1" + "0" * 20, "null", '"x"', "true", "{}"]
_DAMAGE = ["flip", "flip", "flip", "byte", "cut", "insert", "lose", "double", "swap", "digits", "token", "line"]
_NUMBER = re.compile(rb"-?\d+(\.\d+)?")


def damaged(sound: bytes, rng: random.Random) -> bytes:
    """The bytes of a file with some of them flipped, changed, lost, added, doubled or moved."""
    data = bytearray(sound)
    at, other = rng.randrange(len(data)), rng.randrange(len(data))
    low, high = min(at, other), max(at, other)
    action = rng.choice(
        ["flip", "flip", "flip", "byte", "cut", "insert", "lose", "double", "swap", "digits", "token", "line"]
    )
    if action == "flip":
        for _ in range(rng.choice([1, 1, 1, 4])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif action == "byte":
        data[at] = rng.choice(b'\0\n {}[]",:0123456789.-eE\xff')
    elif action == "cut":
        del data[at:]
    elif action == "insert":
        data[at:at] = rng.randbytes(rng.choice([1, 3, 64]))
    elif action == "lose":
        del data[low : low + rng.choice([1, 8, high - low])]
    elif action == "double":
        data[other:other] = data[low:high]
    elif action == "swap":
        size = rng.choice([1, 4, 64])
        data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
    elif action == "line":
        lines = sound.splitlines(keepends=True)
        one, two = rng.randrange(len(lines)), rng.randrange(len(lines))
        lines[one], lines[two] = lines[two], lines[one]
        data = bytearray(b"".join(lines if rng.random() < 0.5 else [*lines[:one], *lines[one + 1 :]]))
    elif found := list(_NUMBER.finditer(sound[:100_000])):
        number = rng.choice(found)
        given = (
            rng.choice(TOKENS).encode() if action == "token" else number[0][::-1] + rng.choice([b"", b"0", b"000000"])
        )
        data[number.start() : number.end()] = given
    return bytes(data)


def changed(value: Any, rng: random.Random) -> Any:
    """JSON data with one thing replaced, removed, renamed, doubled or moved."""
    if not (places := list(_places(value))):
        return rng.choice(WILD)
    *above, last = rng.choice(places)
    holder = functools.reduce(lambda inner, key: inner[key], above, value)
    action = rng.choice(["replace", "replace", "replace", "number", "number", "remove", "rename", "double", "swap"])
    numbers = [place for place in places if type(functools.reduce(lambda x, key: x[key], place, value)) in (int, float)]
    if action == "number" and numbers:
        *above, last = rng.choice(numbers)
        functools.reduce(lambda inner, key: inner[key], above, value)[last] = rng.choice([*HUGE, -1, 0, 1, 2, 3, 0.5])
    elif action == "remove":
        del holder[last]
    elif action == "rename" and isinstance(holder, dict):
        holder[str(rng.choice(WILD))[:100]] = holder.pop(last)
    elif action == "double" and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder)), holder[last])
    elif action == "swap":
        other = rng.choice(list(range(len(holder)) if isinstance(holder, list) else holder))
        holder[last], holder[other] = holder[other], holder[last]
    else:
        holder[last] = rng.choice(WILD)
    return value


def _places(value: Any, here: tuple[Any, ...] = ()) -> Any:
    inside: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield (*here, key)
        yield from _places(each, (*here, key))


def changed_json(path: Path, rng: random.Random, right: bool) -> None:
    """Changes a JSON document; `right`: with a right checksum."""
    data = json.loads(path.read_text())
    if right:
        data.pop(CHECKSUM, None)
    _write(lambda each: write_json(path, each), changed(data, rng), right, path)


def changed_lines(path: Path, rng: random.Random, right: bool) -> None:
    """Changes a line of JSON lines, or their order."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if right:
        for row in rows:
            row.pop(CHECKSUM)
    rows = changed(rows, rng)
    path.write_text("")
    for row in rows if isinstance(rows, list) else [rows]:
        _write(lambda each: append_line(path, each), row, right, path)


def changed_toml(path: Path, rng: random.Random, right: bool) -> None:
    """Puts another value behind a key of a TOML file."""
    lines = path.read_text().splitlines()
    at = rng.choice([number for number, line in enumerate(lines) if "=" in line])
    key = lines[at].partition("=")[0]
    value = rng.choice([*(json.dumps(each) for each in WILD[:-1]), *TOKENS])
    lines[at] = f"{key}= {value}" if rng.random() < 0.8 else f"{key.strip()}.{'a.' * rng.choice([1, 70, 5000])}b = 1"
    path.write_text("\n".join(lines))


def changed_tensors(path: Path, rng: random.Random, right: bool) -> None:
    """Changes what a safetensors file says, or one of its tensors."""
    tensors, about = read_tensors(path, "the sample")
    tensors = {name: value.clone() for name, value in tensors.items()}
    if about and rng.random() < 0.7:
        about = changed(about, rng)
    else:
        _change_tensor(tensors, rng)
    if right and isinstance(about, dict):
        try:
            return write_tensors(path, tensors, about)
        except ValueError:  # JSON knows no infinity
            pass
    said = {"autoprune": json.dumps(about if not isinstance(about, dict) else {**about, CHECKSUM: "0" * 32})}
    path.write_bytes(save({name: value.contiguous() for name, value in tensors.items()}, said))
    return None


def _change_tensor(tensors: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(list(tensors))
    value = tensors[name]
    action = rng.choice(["element", "element", "shape", "dtype", "empty", "swap", "drop", "more", "scale"])
    if action == "element" and value.numel():
        flat = value.flatten()
        flat[rng.randrange(len(flat))] = (
            rng.choice([0, 1, 2, 100]) if value.dtype == torch.uint8 else rng.choice([-1, 0, 127])
        )
        tensors[name] = flat.view(value.shape)
    elif action == "shape":
        tensors[name] = rng.choice(
            [value.flatten(), value[None], value.flatten()[:-1], torch.cat([value[None], value[None]])]
        )
    elif action == "dtype":
        tensors[name] = value.to(rng.choice([torch.int64, torch.float64, torch.bool, torch.float16, torch.int32]))
    elif action == "empty":
        tensors[name] = value.flatten()[:0]
    elif action == "swap":
        other = rng.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], value
    elif action == "drop":
        del tensors[name]
    elif action == "more":
        tensors[rng.choice(["x", "layer|x|values", f"{name}|bias"])] = value.clone()
    else:
        tensors[name] = value * rng.choice([-1, 0, 3]) if value.dtype != torch.bool else ~value


def _write(write: Callable[[Any], None], data: Any, right: bool, path: Path) -> None:
    if right and isinstance(data, dict):
        try:
            return write(data)
        except (ValueError, FileError):  # JSON knows no infinity; nothing follows a broken line
            pass
    with path.open("a" if path.suffix == ".jsonl" else "w") as file:
        file.write(json.dumps(data) + "\n")
    return None
