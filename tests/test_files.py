"""Files: no half of one is left, all that they say is under a checksum, and text that is no plain data is refused."""

from __future__ import annotations

import json
import os
import random
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from autoprune.config import load_config, parse_config, parse_overrides
from autoprune.documents import DEPTH, parse_json, parse_toml
from autoprune.errors import ConfigError, FileError
from autoprune.files import (
    LARGEST_LOG,
    LARGEST_TEXT,
    append_line,
    given_path,
    keep_lines,
    read_json,
    read_lines,
    read_tensors,
    read_text,
    write_json,
    write_tensors,
)
from autoprune.repack import load

DATA: dict[str, Any] = {"b": [1, 2.5, None, "grün"], "a": {"deep": {"x": -0.0}}, "big": 2**100, "yes": True}
TENSORS = {
    "weight": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,
    "half": torch.linspace(-1, 1, 7, dtype=torch.bfloat16),
    "none": torch.empty(0, 3),
    "flag": torch.tensor(True),
    "long": torch.tensor([2**40, -1]),
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", DATA)
    assert read_json(tmp_path / "a.json", "it") == DATA
    write_tensors(tmp_path / "a.safetensors", TENSORS, DATA)
    tensors, about = read_tensors(tmp_path / "a.safetensors", "it")
    assert about == DATA
    assert tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype for name, value in TENSORS.items()
    )
    again = tmp_path / "b.safetensors"
    write_tensors(again, dict(reversed(tensors.items())), dict(reversed(about.items())))
    assert again.read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_every_bit_of_a_document_is_under_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, DATA)
    sound = path.read_bytes()
    for bit in range(8 * len(sound)):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            read = read_json(path, "it")
        except FileError:
            continue
        assert json.dumps(read, sort_keys=True) == json.dumps(DATA, sort_keys=True)  # a blank in place of another


def test_every_bit_of_a_tensor_file_is_under_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"w": TENSORS["half"]}, {"scale": 0.5})
    sound, read = path.read_bytes(), 0
    for bit in range(0, 8 * len(sound), 3):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            tensors, about = read_tensors(path, "it")
        except FileError:
            continue
        read += 1  # a blank behind the header in place of another
        assert about == {"scale": 0.5}
        assert torch.equal(tensors["w"], TENSORS["half"])
    assert read < 16


def test_an_edited_document_says_how_to_keep_the_edit(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_json(path, {"sparsity": 0.5})
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(FileError, match=r'checksum does not match.*delete its entry "checksum"'):
        read_json(path, "the plan", by_hand=True)
    with pytest.raises(FileError, match=r"corrupt: .*plan\.json.*Delete it or restore"):
        read_json(path, "the plan")
    path.write_text('{"sparsity": 0.6}')
    assert read_json(path, "the plan", by_hand=True) == {"sparsity": 0.6}
    with pytest.raises(FileError, match="no checksum: an earlier release"):
        read_json(path, "the plan")


def test_a_tensor_file_of_something_else_is_told(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors", {"format": "pt"})
    with pytest.raises(FileError, match="no checksum; a plain state dict is read with"):
        read_tensors(tmp_path / "other.safetensors", "the model")
    source = tmp_path / "model.py"
    source.write_text("from torch import nn")
    with pytest.raises(FileError, match="is no safetensors file") as told:
        read_tensors(source, "the model")
    assert "elete" not in str(told.value)


def log_of(path: Path, rows: int) -> list[dict[str, Any]]:
    data = [{"key": f"k{n}", "score": n / 7} for n in range(rows)]
    for each in data:
        append_line(path, each)
    return data


def test_lines_that_are_lost_doubled_or_in_another_order_are_told(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    data = log_of(path, 5)
    assert read_lines(path, "the log") == data
    lines = path.read_text().splitlines(keepends=True)
    wrong: list[list[str]] = [
        lines[1:],
        [*lines[:2], *lines[3:]],
        [*lines[:2], lines[1], *lines[2:]],
        [lines[0], lines[2], lines[1], *lines[3:]],
        [*lines, lines[-1]],
        [*lines[:2], "\n", *lines[2:]],
        [*lines[:2], lines[2].replace('"k2"', '"k3"'), *lines[3:]],
        [*lines, '{"key": "k9"}\n'],
    ]
    for each in wrong:
        path.write_text("".join(each))
        with pytest.raises(FileError, match="the log is corrupt"):
            read_lines(path, "the log")
    path.write_text("".join(lines[:3]))  # as a killed process leaves it: nothing can tell
    assert read_lines(path, "the log") == data[:3]


def test_a_torn_line_is_left_out_and_cut_off_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    data = log_of(path, 3)
    whole = path.read_bytes()
    for torn in (1, 30, len(whole) - whole.rfind(b"\n", 0, -1) - 2):
        path.write_bytes(whole[:-torn])
        assert read_lines(path, "the log") == data[:2]
    append_line(path, data[2])
    assert path.read_bytes() == whole
    path.write_bytes(whole[:9])
    assert read_lines(path, "the log") == []
    assert log_of(path, 3) == data == read_lines(path, "the log")
    append_line(path, {"long": "x" * 70_000})
    append_line(path, {})
    assert [len(str(row)) for row in read_lines(path, "the log")[3:]] == [70_012, 2]


def test_nothing_is_added_behind_a_corrupt_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("nonsense\n")
    with pytest.raises(FileError, match="its last line is corrupt"):
        append_line(path, {})
    assert path.read_text() == "nonsense\n"


def test_several_writers_keep_a_log_whole(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: append_line(path, {"n": n}), range(40)))
    assert sorted(row["n"] for row in read_lines(path, "the log")) == list(range(40))


TOO_MUCH = {
    "deep lists": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "just too deep": "[" * (DEPTH + 1) + "]" * (DEPTH + 1),
    "digits": "9" * 5000,
    "digits that Python would take": "-" + "9" * 4000,
    "exponent": "1e999",
    "NaN": "NaN",
    "infinity": "[-Infinity]",
    "a key twice": '{"a": 1, "b": {"c": 1, "c": 2}}',
    "half a character": '"\\ud800"',
    "no JSON": "[1,",
    "nothing": "",
}


@pytest.mark.parametrize("text", TOO_MUCH.values(), ids=TOO_MUCH)
def test_json_that_is_no_plain_data_is_a_file_error_in_every_reader(tmp_path: Path, text: str) -> None:
    with pytest.raises(FileError):
        parse_json(text)
    for path in (tmp_path / "a.json", tmp_path / "a.jsonl", tmp_path / "a.safetensors"):
        path.write_text(text + "\n")
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors", {"autoprune": text})
    with pytest.raises(FileError, match=r"a\.json"):
        read_json(tmp_path / "a.json", "it", by_hand=True)
    with pytest.raises(FileError, match=r"a\.jsonl"):
        read_lines(tmp_path / "a.jsonl", "it")
    with pytest.raises(FileError, match=r"a\.safetensors"):
        read_tensors(tmp_path / "a.safetensors", "it")


def test_json_that_is_unusual_is_read() -> None:
    for text in ("[" * DEPTH + "]" * DEPTH, '"\\ud83d\\ude00"', "9" * 40, "1e-999", '{"": [{}]}', " 7 "):
        assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        *("a = " + "[" * 30_000, "a = " + "{a=" * 20_000, "a." * 32_000 + "b = 1", "[" + "a . " * 16_000 + "b]"),
        *("a = " + "9" * 5000, "a = 0x" + "f" * 5000, "a = nan", "a = -inf", "a = 1e999", "a = 1\na = 2", "a"),
        "b = '" + "x" * 70_000 + "'",
    ],
    ids=lambda text: text[:12],
)
def test_toml_that_is_no_plain_data_is_a_config_error(tmp_path: Path, text: str) -> None:
    from autoprune.config import load_config

    with pytest.raises(FileError):
        parse_toml(text)
    (tmp_path / "a.toml").write_text(f'task = "digits"\n{text}')
    with pytest.raises(ConfigError, match=r"a\.toml"):
        load_config(tmp_path / "a.toml")


def test_random_data_survive(tmp_path: Path) -> None:
    rng = random.Random(0)

    def draw(depth: int) -> Any:
        plain = [rng.random() * 10 ** rng.randrange(-300, 300), rng.getrandbits(120), None, True, '\u00fc\n\\"', -1]
        kind = rng.randrange(len(plain) + (2 if depth else 0))
        if kind == len(plain):
            return [draw(depth - 1) for _ in range(3)]
        return plain[kind] if kind < len(plain) else {f"{n}{rng.random()}": draw(depth - 1) for n in "abc"}

    for n in range(30):
        data = {"data": draw(4)}
        write_json(tmp_path / f"{n}.json", data)
        assert read_json(tmp_path / f"{n}.json", "it") == data


@pytest.mark.skipif(sys.platform == "win32", reason="its file systems have no named pipes")
@pytest.mark.parametrize("name", ["pipe", "link", "folder"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    readers: list[Callable[[], object]] = [
        lambda: read_text(path, "it"),
        lambda: read_json(path, "it"),
        lambda: read_lines(path, "it"),
        lambda: read_tensors(path, "it"),
        lambda: keep_lines(path, 1),
    ]
    for reading in readers:
        with pytest.raises(FileError, match=r"cannot be read: .* is no file but a"):
            reading()
    with pytest.raises((ConfigError, FileError), match=r"is no file but|is a folder: give the config"):
        load_config(path)


@pytest.mark.skipif(sys.platform == "win32", reason="its files have no holes")
def test_a_log_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "log.jsonl").open("wb") as file:
        file.truncate(LARGEST_LOG + 1)
    tracemalloc.start()
    try:
        with pytest.raises(FileError, match="too large"):
            read_lines(tmp_path / "log.jsonl", "the log")
        assert tracemalloc.get_traced_memory()[1] < LARGEST_TEXT
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", [123, None, b"bytes.safetensors", "a\0b"], ids=repr)
def test_what_is_no_name_of_a_file_is_refused(name: Any) -> None:
    for naming in (given_path, load):
        with pytest.raises(FileError, match=r"a string or a pathlib\.Path|NUL"):
            naming(name)


def test_an_entry_of_many_parts_is_no_recursion() -> None:
    key = ".".join("a" * 2000)
    with pytest.raises(ConfigError, match="at most 64 parts, not of 2000"):
        parse_overrides([f"{key}=1"])
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(ConfigError, match="nested more than 64 deep"):
        parse_config({"task": "digits", "env": deep}, "test")


def test_the_directory_of_a_run_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder: give the config"):
        load_config(tmp_path)
    write_json(tmp_path / "config.json", {})
    with pytest.raises(ConfigError, match="is the directory of a run: give the config that it was made with"):
        load_config(tmp_path)
