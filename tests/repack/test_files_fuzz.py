"""Damaged and hostile packed files: an error that names the file, or a model that runs; nothing else."""

from __future__ import annotations

import functools
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import FileError
from autoprune.files import read_tensors, write_tensors
from autoprune.patterns import PATTERNS
from autoprune.registry import Choice
from autoprune.repack import RepackedModel, load, repack, save
from autoprune.repack.files import _checksum

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BACKENDS_IN_TURN = {"0": "jit", "3": "torch", "6": "dense", "10": "jit"}
ROUNDS = range(100)


def build() -> nn.Sequential:
    """The architecture, freshly initialised."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


@functools.cache
def repacked() -> RepackedModel:
    torch.manual_seed(0)
    model = build().eval()
    pattern = PATTERNS.create(Choice("group", {"size": 4}))
    with torch.no_grad():
        for module in model:
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.mul_(pattern.mask(module.weight.abs(), 0.6))
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    done = repack(model, X, choose=lambda name, _: BACKENDS_IN_TURN[name])
    assert {row.name: row.backend for row in done.report} == BACKENDS_IN_TURN
    return done


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save(repacked(), path)
    return path


def outcome(path: Path) -> str:
    """Loads and runs; any exception but FileError fails the test."""
    try:
        loaded = load(path, build())
    except FileError:
        return "refused"
    with torch.inference_mode():
        assert loaded(X).shape == (2, 10)
    return "ran"


def test_a_round_trip_is_equal_bit_for_bit(saved: Path, tmp_path: Path) -> None:
    loaded = load(saved, build())
    with torch.inference_mode():
        assert torch.equal(loaded(X), repacked()(X))
    assert loaded.report == repacked().report
    again = tmp_path / "again.safetensors"
    save(loaded, again)
    assert again.read_bytes() == saved.read_bytes()


def narrower() -> nn.Module:
    model = build()
    model[10] = nn.Linear(32, 9)
    return model


def without_norm() -> nn.Module:
    model = build()
    model[1] = nn.Identity()
    return model


def longer() -> nn.Module:
    return nn.Sequential(*build(), nn.Linear(10, 10))


def strided() -> nn.Module:
    model = build()
    model[3] = nn.Conv2d(8, 16, (1, 9))
    return model


@pytest.mark.parametrize(
    "other", [narrower, without_norm, longer, strided, lambda: nn.Linear(3, 3), nn.Sequential, nn.ReLU]
)
def test_another_architecture_is_refused(saved: Path, other: Callable[[], nn.Module]) -> None:
    with pytest.raises(FileError, match=r"model\.safetensors"):
        load(saved, other())


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="not found"):
        load(tmp_path / "none.safetensors", build())


def test_a_safetensors_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    write_tensors(path, build().state_dict())
    assert outcome(path) == "refused"


def flip(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice([1, 1, 4])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def cut(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data))]


def insert(data: bytearray, rng: random.Random) -> bytearray:
    where = rng.randrange(len(data))
    data[where:where] = rng.randbytes(rng.choice([1, 3, 64]))
    return data


def repeat(data: bytearray, rng: random.Random) -> bytearray:
    low, high = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    where = rng.randrange(len(data))
    data[where : where + high - low] = data[low:high]
    return data


@pytest.mark.parametrize("mutate", [flip, cut, insert, repeat], ids=lambda mutate: mutate.__name__)
def test_damaged_bytes_are_refused_or_harmless(saved: Path, mutate: Callable[..., bytearray]) -> None:
    sound = saved.read_bytes()
    results = []
    for seed in ROUNDS:
        damaged = bytes(mutate(bytearray(sound), random.Random(seed)))
        if damaged != sound:
            saved.write_bytes(damaged)
            results.append(outcome(saved))
    assert results.count("refused") > 0.9 * len(results)


WILD: list[Any] = [
    *(-1, 0, 1, 2, 3, 7, 16, 2**31 - 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *(True, False, None, "", "0", "3", "8", "jit", "torch", "dense", "__class__", "..", [], [3], {}, {"0": 1}),
]


def paths_of(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value inside a JSON value."""
    inside: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for key, each in inside for place in paths_of(each, (*here, key)))]


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one thing replaced, removed or renamed."""
    places = paths_of(value)[1:]
    *above, last = rng.choice(places)
    holder = functools.reduce(lambda inner, key: inner[key], above, value)
    action = rng.choice(["replace", "replace", "replace", "remove", "move"])
    if action == "replace":
        holder[last] = rng.choice(WILD)
    elif action == "remove" or isinstance(holder, list):
        del holder[last]
    else:
        holder[str(rng.choice(WILD))] = holder.pop(last)
    return value


def test_a_changed_description_is_refused_or_harmless(saved: Path) -> None:
    tensors, metadata = read_tensors(saved, "file")
    results = []
    for seed in range(150):
        about = changed(json.loads(metadata["autoprune"]), random.Random(seed))
        write_tensors(saved, tensors, {"autoprune": json.dumps(about)})
        results.append(outcome(saved))
    assert {"refused", "ran"} == set(results)  # a changed timing is harmless


NUMBERS = [("version",)] + [
    ("layers", layer, *field)
    for layer, field in [("0", ("shape", 0)), ("3", ("conv_groups",)), ("10", ("group_size",)), ("0", ("relu",))]
]


@pytest.mark.parametrize("place", NUMBERS, ids=str)
def test_a_wild_number_is_refused_or_harmless(saved: Path, place: tuple[Any, ...]) -> None:
    tensors, metadata = read_tensors(saved, "file")
    *above, last = place
    for wild in WILD:
        about = json.loads(metadata["autoprune"])
        functools.reduce(lambda inner, key: inner[key], above, about)[last] = wild
        write_tensors(saved, tensors, {"autoprune": json.dumps(about)})
        outcome(saved)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "7", '"x"', "{", "[" * 100_000, "{}", '{"version": 1}', '{"version": 1e999}']
)
def test_any_description_is_refused(saved: Path, text: str) -> None:
    tensors, _ = read_tensors(saved, "file")
    write_tensors(saved, tensors, {"autoprune": text})
    assert outcome(saved) == "refused"


def test_a_changed_header_is_refused_or_harmless(saved: Path) -> None:
    sound = saved.read_bytes()
    (length,) = struct.unpack("<Q", sound[:8])
    types = [
        "F32",
        "F64",
        "F16",
        "BF16",
        "I64",
        "I32",
        "I16",
        "I8",
        "U8",
        "U16",
        "U32",
        "U64",
        "BOOL",
        "F8_E4M3",
        "F4",
        "C64",
    ]
    for seed in range(200):
        rng = random.Random(seed)
        header = json.loads(sound[8 : 8 + length])
        if seed % 2:
            header[rng.choice([key for key in header if key != "__metadata__"])]["dtype"] = rng.choice(types)
        else:
            header = changed(header, rng)
        text = json.dumps(header).encode()
        saved.write_bytes(struct.pack("<Q", len(text)) + text + sound[8 + length :])
        outcome(saved)


INTEGERS = [-(2**31), -2, -1, 0, 1, 2, 255, 2**15 - 1, 2**31 - 1]


def hostile(tensors: dict[str, Tensor], rng: random.Random) -> str:
    """Changes one tensor in place of the dict, and returns its name."""
    name = rng.choice([key for key in tensors if "|" in key or rng.random() < 0.2] or list(tensors))
    value = tensors[name].clone()
    action = rng.choice(["element", "element", "element", "many", "wrap", "shape", "dtype", "empty", "swap", "drop"])
    if action in ("element", "many") and value.numel():
        flat = value.flatten() if value.is_floating_point() else value.flatten().to(torch.int32)
        for _ in range(1 if action == "element" else 20):
            flat[rng.randrange(len(flat))] = rng.choice(INTEGERS)
        tensors[name] = flat.view(value.shape)
    elif action == "wrap":  # int32 differences of these are all positive
        tensors[name] = torch.tensor([0, 2**31 - 1, -(2**31), -1, *value.flatten().tolist()[-1:]]).to(torch.int32)
    elif action == "shape":
        tensors[name] = rng.choice([value.flatten(), value[None], value.flatten()[:-1], torch.cat([value, value])])
    elif action == "dtype":
        tensors[name] = value.to(rng.choice([torch.int64, torch.float64, torch.bool, torch.float16, torch.int32]))
    elif action == "empty":
        tensors[name] = value.flatten()[:0]
    elif action == "swap":
        other = rng.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], value
    else:
        del tensors[name]
    return name


def test_hostile_arrays_with_right_checksums_are_refused_or_harmless(saved: Path) -> None:
    sound, metadata = read_tensors(saved, "file")
    results: dict[str, set[str]] = {}
    for seed in range(250):
        tensors = dict(sound)
        name = hostile(tensors, random.Random(seed))
        about = json.loads(metadata["autoprune"])
        about["checksums"] = {key: _checksum(value) for key, value in tensors.items()}
        write_tensors(saved, tensors, {"autoprune": json.dumps(about)})
        results.setdefault(name.partition("|")[2], set()).add(outcome(saved))
    assert all("refused" in results[field] for field in ("group_pointer", "index", "out_index", "values", "bias"))


def test_a_loaded_file_leaves_the_given_model_as_it_is(saved: Path) -> None:
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load(saved, model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = saved.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("autoprune.files.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save(repacked(), saved)
    assert saved.read_bytes() == sound
    assert [each.name for each in saved.parent.iterdir()] == [saved.name]
