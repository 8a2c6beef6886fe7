"""JSON and TOML text as plain data, refused before it costs anything where it is no such thing; and checksums.

Text comes from anywhere: what is nested without end, numbers of thousands of digits, infinities and keys that are there
twice are one FileError, and never reach the code that reads them.

Checksums find damage, not malice: whoever can write a file can write its checksum too. SHA-256 takes 64 ms for 100 MB.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from autoprune.errors import FileError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

CHECKSUM = "checksum"  # the entry of a document
LARGEST_TOML = 2**16  # characters: a config is a short list of differences
DEPTH = 64
DIGITS = 40  # of an integer: a random generator's state has 39
_LEAST = 10**DIGITS  # that has too many
_LONG_INTEGER = re.compile(rf"\d{{{DIGITS + 1}}}")
_NUMBERS = (int, float)
# A dotted key costs tomllib the square of its parts: 15 seconds where a file of 64 kB is one key.
_LONG_KEY = re.compile(rf"""(?<![\w-])(?:(?:"[^"\n]*"|'[^'\n]*'|[\w-]+)[ \t]*\.[ \t]*){{{DEPTH}}}""")


def parse_json(text: str) -> Any:
    """JSON as plain data; raises FileError that says what is wrong, in a few words."""
    try:
        long = _integer if _LONG_INTEGER.search(text) else None  # which takes its time with millions of short ones
        data = json.loads(text, parse_int=long, object_pairs_hook=_object)
        if "\\u" in text:
            json.dumps(data, ensure_ascii=False).encode()  # half a character is no text
    except RecursionError:
        raise FileError(f"it is nested more than {DEPTH} deep") from None
    except ValueError as error:
        raise FileError(f"it is not valid JSON: {error}") from None
    check_plain(data)
    return data


def parse_toml(text: str) -> dict[str, Any]:
    """TOML as plain data; raises FileError that says what is wrong, in a few words."""
    if len(text) > LARGEST_TOML:
        raise FileError(f"it has {len(text)} characters, more than {LARGEST_TOML}")
    if _LONG_KEY.search(text):
        raise FileError(f"it is nested more than {DEPTH} deep")
    try:
        data = tomllib.loads(text)
    except RecursionError:
        raise FileError(f"it is nested more than {DEPTH} deep") from None
    except ValueError as error:  # of a number of thousands of digits too
        raise FileError(f"it is not valid TOML: {error}") from None
    check_plain(data)
    return data


def check_plain(value: Any, depth: int = DEPTH) -> None:
    """Raises FileError where data are nested too deeply, or hold a number that is infinite or none."""
    if isinstance(value, (dict, list)):
        if depth == 0:
            raise FileError(f"it is nested more than {DEPTH} deep")
        for each in value.values() if isinstance(value, dict) else value:
            kind = type(each)  # a call for each of millions of numbers would take seconds
            if not (kind is str or (kind in _NUMBERS and -_LEAST < each < _LEAST)):
                check_plain(each, depth - 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise FileError(f"it holds the number {value}")
    elif isinstance(value, int) and abs(value) >= _LEAST:  # TOML's; hexadecimal ones may be of any length
        raise FileError(f"it holds an integer of more than {DIGITS} digits")


Parsed = TypeVar("Parsed")


def parsed(kind: type[Parsed], data: Any) -> Parsed:
    """Data as a dataclass, or a list of them; raises FileError, in a few words, where types do not fit."""
    from pydantic import TypeAdapter, ValidationError  # here: importing autoprune needs none

    try:
        return TypeAdapter(kind).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise FileError(f"its {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def checksum_of(data: Any, more: Iterable[ReadableBuffer] = ()) -> str:
    """Of data that JSON can tell, however they are laid out, and of the bytes that belong to them."""
    digest = hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=False).encode())
    for part in more:
        digest.update(part)
    return digest.hexdigest()[:32]


def with_checksum(data: Mapping[str, Any], checksum: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """Data as JSON gives them back, and their checksum."""
    plain = json.loads(json.dumps(data, allow_nan=False))
    return {**plain, CHECKSUM: checksum(plain)}


def without_checksum(document: Any, checksum: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """The data of a document; raises FileError, in a few words, unless its checksum is right."""
    if not isinstance(document, dict):
        raise FileError("it is no JSON object")
    if CHECKSUM not in document:
        raise FileError("it has no checksum: an earlier release wrote it, or something else did")
    data = {key: value for key, value in document.items() if key != CHECKSUM}
    if checksum(data) != document[CHECKSUM]:
        raise FileError("its checksum does not match: it was damaged or changed since it was written")
    return data


def _integer(digits: str) -> int:
    if len(digits) > DIGITS + 1:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} is there twice")
    return made
