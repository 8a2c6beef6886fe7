"""A short part of `python -m benchmarks fuzz`: some mutants of every kind of file, and what it calls wrong."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from autoprune.errors import FileError
from benchmarks import fuzz, fuzz_kinds

KINDS = 24
MUTANTS = 9  # of each kind: three of each way


@pytest.fixture(autouse=True)
def cache_of_each_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KINDS))
def test_mutants_are_refused_or_mean_the_same(tmp_path: Path, number: int) -> None:
    kind = fuzz_kinds.KINDS[number]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of what an edited graph asks it for
        sound = fuzz.sample(kind, tmp_path)
        expected = kind.read(tmp_path)
        assert repr(kind.read(tmp_path)) == repr(expected)
        found = [fuzz.outcome(kind, tmp_path, sound, expected, 1_000_000 + seed) for seed in range(MUTANTS)]
    assert not [each for each in found if each[0] in fuzz.BAD]
    assert "refused" in [each[0] for each in found]


def test_there_is_no_other_kind() -> None:
    assert len(fuzz_kinds.KINDS) == KINDS


def test_what_is_wrong_is_called_so(tmp_path: Path) -> None:
    def read(folder: Path) -> Any:
        return json.loads((folder / "a.json").read_text())

    def seen(read: Any, by_hand: bool = False) -> set[str]:
        kind = fuzz_kinds.Kind("a", "a.json", make, read, change, by_hand)
        sound = fuzz.sample(kind, tmp_path)
        return {fuzz.outcome(kind, tmp_path, sound, {"a": 1}, 3 * seed + 1)[0] for seed in range(3)}

    def make(folder: Path) -> None:
        (folder / "a.json").write_text('{"a": 1}')

    def change(path: Path, *_: Any) -> None:
        path.write_text('{"a": 2}')

    def raises(error: Exception) -> Any:
        def reader(_: Path) -> Any:
            raise error

        return reader

    assert seen(read) == {"accepted"}
    assert seen(read, by_hand=True) == {"another"}
    assert seen(lambda _: {"a": 1}) == {"the same"}
    assert seen(raises(FileError("no"))) == {"refused"}
    assert seen(raises(KeyError("no"))) == {"wrong error"}
    assert seen(raises(MemoryError())) == {"too much memory"}
