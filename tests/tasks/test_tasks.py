"""The built-in tasks: fixed disjoint splits, their metric, their batches, and their errors."""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.errors import AutopruneError, ConfigError, FileError
from autoprune.registry import Choice
from autoprune.tasks import TASKS, ShiftFlip, Task, TensorBatches, accuracy
from autoprune.tasks.fashion_mnist import fashion_mnist
from autoprune.tasks.idx import IdxTask, read_idx
from autoprune.tasks.mnist import mnist
from autoprune.training import train_


def digits(**args: object) -> Task:
    return TASKS.create(Choice("digits", {"widths": [4, 8], **args}))


def splits_of(task: Task) -> list[TensorBatches[Tensor]]:
    """What it trains, validates and tests with."""
    splits = [task.train, task.validation, task.testing]
    tensors = [split for split in splits if isinstance(split, TensorBatches)]
    assert len(tensors) == len(splits)
    return tensors


def rows(x: Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in x]


def test_digits_are_split_evenly_and_always_alike() -> None:
    task, again = digits(), digits(seed=1)
    splits = splits_of(task)
    assert [len(split.y) for split in splits] == [1078, 360, 359]
    assert sum(len(split.y) for split in splits) == 1797
    for split, other in zip(splits, splits_of(again), strict=True):
        assert torch.equal(split.x, other.x)
        assert torch.equal(split.y, other.y)
        share = split.y.bincount(minlength=10) / len(split.y)
        assert share.min() > 0.08
        assert share.max() < 0.12
    train, validation, testing = splits
    assert not set(rows(train.x)) & set(rows(validation.x) + rows(testing.x))
    assert train.x.mean().abs() < 1e-4
    assert train.x.std() == pytest.approx(1.0, abs=1e-4)
    assert not torch.equal(next(task.model.parameters()), next(again.model.parameters()))


def test_calibration_is_fixed_and_plain() -> None:
    task = digits()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(task.calibration, digits().calibration, strict=True))
    assert torch.equal(torch.cat([x for x, _ in task.calibration]), splits_of(task)[0].x[:128])
    (x,) = task.example_inputs(300)
    assert x.shape == (300, 1, 32, 32)
    assert task.example_inputs()[0].shape == (1, 1, 32, 32)
    with pytest.raises(AutopruneError, match="at least one sample"):
        task.example_inputs(0)


def test_digits_learn_something_in_one_epoch() -> None:
    task = digits(model="mlp", widths=[64], augment=False)
    before = task.evaluate(task.model)
    assert task.dense_training is not None
    train_(task.model, task.train, task.loss, task.dense_training, seed=0)
    assert task.evaluate(task.model) > max(0.9, before)
    assert task.test(task.model) > 0.9


def test_accuracy_is_the_fraction_right_and_restores_the_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Identity())
    model[1].eval()
    x = torch.eye(4)
    assert accuracy(model, [(x, torch.tensor([0, 1, 2, 0])), (x[:1], torch.tensor([0]))]) == 4 / 5
    assert [model.training, model[0].training, model[1].training] == [True, True, False]
    with pytest.raises(AutopruneError, match="no data to evaluate on"):
        accuracy(model, [])


@given(count=st.integers(1, 40), size=st.integers(1, 17), seed=st.integers(0, 9))
def test_shuffled_batches_hold_every_sample_once(count: int, size: int, seed: int) -> None:
    batches = TensorBatches(torch.arange(count).float(), torch.arange(count), size, shuffle=True)
    torch.manual_seed(seed)
    first, second = list(batches), list(batches)
    assert len(first) == len(second) == len(batches)
    for epoch in (first, second):
        assert sorted(torch.cat([y for _, y in epoch]).tolist()) == list(range(count))
        assert all(torch.equal(x, y.float()) for x, y in epoch)
    torch.manual_seed(seed)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, batches, strict=True))


def test_batches_refuse() -> None:
    with pytest.raises(AutopruneError, match="as many, not 3 and 2"):
        TensorBatches(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ConfigError, match="batch_size must be a positive integer, not 0"):
        digits(batch_size=0)


@settings(max_examples=20)
@given(pixels=st.integers(0, 3), flip=st.booleans(), seed=st.integers(0, 99))
def test_every_augmented_image_is_a_shift_or_a_mirrored_one(pixels: int, flip: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.rand(4, 2, 5, 7) + 1.0
    dark = x.min()
    padded = torch.full((4, 2, 5 + 2 * pixels, 7 + 2 * pixels), float(dark))
    padded[:, :, pixels : pixels + 5, pixels : pixels + 7] = x
    out = ShiftFlip(pixels, flip)(x)
    reach = 2 * pixels + 1
    for i in range(4):
        windows = [padded[i, :, a : a + 5, b : b + 7] for a in range(reach) for b in range(reach)]
        windows += [window.flip(-1) for window in windows] if flip else []
        assert any(torch.equal(out[i], window) for window in windows)


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb") as handle:
        handle.write(header + values.astype(np.uint8).tobytes())


@pytest.mark.parametrize("name", ["a.gz", "a"])
def test_idx_files_are_read_as_written(tmp_path: Path, name: str) -> None:
    values = np.arange(24).reshape(2, 3, 4)
    write_idx(tmp_path / name, values)
    assert read_idx(tmp_path / name, (2, 3, 4), "get it").tolist() == values.tolist()


def damaged(raw: bytes) -> dict[str, bytes]:
    plain = gzip.decompress(raw)
    return {
        "not gzip": plain,
        "cut": raw[:-12],
        "short": gzip.compress(plain[:-1]),
        "long": gzip.compress(plain + b"\0"),
        "magic": gzip.compress(b"\0\0\x0d" + plain[3:]),
        "extent": gzip.compress(plain[:7] + b"\x03" + plain[8:]),
        "empty": b"",
    }


@pytest.mark.parametrize("damage", ["not gzip", "cut", "short", "long", "magic", "extent", "empty"])
def test_a_damaged_idx_file_is_an_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.gz"
    write_idx(path, np.arange(24).reshape(2, 3, 4))
    path.write_bytes(damaged(path.read_bytes())[damage])
    with pytest.raises(FileError, match=r"install it again: get it$"):
        read_idx(path, (2, 3, 4), "get it")


IDX_SOURCES = [fashion_mnist, mnist]


@pytest.mark.parametrize("source", IDX_SOURCES, ids=lambda source: source.name)
def test_missing_idx_files_say_how_to_install_them(tmp_path: Path, source: IdxTask) -> None:
    with pytest.raises(FileError, match=rf"not found; install it: {re.escape(source.install)}$"):
        TASKS.create(Choice(source.name, {"folder": str(tmp_path)}))


@pytest.mark.parametrize("source", IDX_SOURCES, ids=lambda source: source.name)
def test_a_task_of_idx_files_holds_out_the_last_of_the_train_split(tmp_path: Path, source: IdxTask) -> None:
    draws = np.random.default_rng(0)
    labels = {}
    for name, count in (("train", 60_000), ("t10k", 10_000)):
        labels[name] = draws.integers(0, 10, count)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte{source.suffix}", labels[name])
        images = np.broadcast_to(labels[name][:, None, None], (count, 28, 28))  # each is as bright as its label
        write_idx(tmp_path / f"{name}-images-idx3-ubyte{source.suffix}", images)
    sizes = {"train_samples": 40, "validation_samples": 30, "batch_size": 8}
    task = TASKS.create(Choice(source.name, {"folder": str(tmp_path), "widths": [4, 8, 16], **sizes}))
    train, validation, testing = splits_of(task)
    assert train.y.tolist() == labels["train"][:40].tolist()
    assert validation.y.tolist() == labels["train"][-30:].tolist()
    assert testing.y.tolist() == labels["t10k"].tolist()
    brightness = testing.x[:, 0, 0, 0]
    for label in range(10):
        assert len(brightness[testing.y == label].unique()) == 1
    assert task.model(next(iter(task.train))[0]).shape == (8, 10)
    write_idx(tmp_path / f"t10k-labels-idx1-ubyte{source.suffix}", np.full(10_000, 10))
    with pytest.raises(FileError, match=r"t10k-labels.* is corrupt: it holds the label 10"):
        TASKS.create(Choice(source.name, {"folder": str(tmp_path)}))
    with pytest.raises(ConfigError, match=rf"{source.name} has 55,000 images to train on.*not 55,001"):
        TASKS.create(Choice(source.name, {"folder": str(tmp_path), "train_samples": 55_001}))


@pytest.mark.skipif(not Path(fashion_mnist.folder).is_dir(), reason=fashion_mnist.install)
def test_fashion_mnist_has_the_official_test_split() -> None:
    task = TASKS.create(Choice("fashion_mnist", {"widths": [4, 8]}))
    train, validation, testing = splits_of(task)
    assert [len(split.y) for split in (train, validation, testing)] == [55_000, 5_000, 10_000]
    assert testing.y.bincount().tolist() == [1000] * 10
    assert (train.y.bincount() + validation.y.bincount()).tolist() == [6000] * 10
    assert task.model(next(iter(task.train))[0]).shape == (128, 10)
