"""Recurrent models: a classifier of padded sequences and a character language model, over torch's own LSTM and GRU.

Both are what `torch.export` captures: no packed sequences, no shape that depends on data.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autoprune.checks import check_flags, check_numbers
from autoprune.errors import ConfigError, did_you_mean
from autoprune.tasks.zoo.arguments import positive

CELLS: Mapping[str, type[nn.LSTM] | type[nn.GRU]] = {"lstm": nn.LSTM, "gru": nn.GRU}


class SequenceClassifier(nn.Module):
    """Reads sequences to their last real step, and backwards to their first when bidirectional, then decides.

    Each direction is a stack of its own, from its own zero state: were they mixed between layers, or run over the
    padding, the padding would show in the logits.
    """

    def __init__(
        self, cell: str, features: int, classes: int, hidden: int, layers: int, bidirectional: bool, dropout: float
    ) -> None:
        super().__init__()
        between = dropout if layers > 1 else 0.0
        self.forwards = CELLS[cell](features, hidden, layers, batch_first=True, dropout=between)
        self.backwards: nn.Module | None = None
        if bidirectional:
            self.backwards = CELLS[cell](features, hidden, layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden * (2 if bidirectional else 1), classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        last = lengths - 1
        read = _at_step(self.forwards(x)[0], last)  # (N, hidden)
        if self.backwards is not None:
            back = _at_step(self.backwards(_reversed(x, last))[0], last)
            read = torch.cat([read, back], dim=1)
        logits: Tensor = self.head(self.dropout(read))
        return logits


def _at_step(y: Tensor, step: Tensor) -> Tensor:
    """(N, T, hidden), (N,) -> (N, hidden)."""
    return y.gather(1, step.reshape(-1, 1, 1).expand(-1, 1, y.shape[2])).squeeze(1)


def _reversed(x: Tensor, last: Tensor) -> Tensor:
    """The steps up to the `last` in reverse order, then the first again and again. (N, T, F), (N,) -> (N, T, F)."""
    steps = (last[:, None] - torch.arange(x.shape[1])).clamp(min=0)  # (N, T)
    return x.gather(1, steps[:, :, None].expand(-1, -1, x.shape[2]))


def lstm_classifier(
    features: int,
    classes: int,
    hidden: int = 256,
    layers: int = 1,
    bidirectional: bool = False,
    cell: str = "lstm",
    dropout: float = 0.0,
) -> nn.Module:
    """One label for a sequence. ``(N, T, features)`` padded at the end, lengths ``(N,)`` int64 -> logits (N, classes).

    Lengths are from 1 to T; what stands behind them does not matter.

    Args:
        features: of a step.
        classes: labels.
        hidden: units of a layer and direction.
        layers: of a direction.
        bidirectional: a second stack reads each sequence from its end.
        cell: ``lstm`` or ``gru``.
        dropout: between the layers and before the last Linear, in [0, 1).

    Raises:
        ConfigError: an argument out of range.
    """
    positive("features, classes, hidden and layers", features, classes, hidden, layers)
    check_flags("a sequence classifier", {"bidirectional": bidirectional})
    if cell not in CELLS:
        raise ConfigError(f"unknown cell {cell!r}. {did_you_mean(str(cell), CELLS)}")
    check_numbers("a sequence classifier", {"dropout": dropout}, 0.0, 1.0, "[)")
    return SequenceClassifier(cell, features, classes, hidden, layers, bidirectional, dropout)


class CharacterModel(nn.Module):
    """Embedding, LSTM, Linear. Every sequence starts from the zero state."""

    def __init__(self, characters: int, hidden: int, layers: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, characters)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.lstm(self.embedding(x))[0]))
        return logits


def char_lstm(
    characters: int, hidden: int = 256, layers: int = 2, embedding: int = 64, dropout: float = 0.0
) -> nn.Module:
    """The next character at every step. int64 characters (N, T) -> logits (N, T, characters).

    Args:
        characters: of the alphabet.
        hidden: units of a layer.
        layers: of the LSTM.
        embedding: width of a character's vector.
        dropout: between the layers and before the last Linear, in [0, 1).

    Raises:
        ConfigError: an argument out of range.
    """
    positive("characters, hidden, layers and embedding", characters, hidden, layers, embedding)
    check_numbers("a character model", {"dropout": dropout}, 0.0, 1.0, "[)")
    return CharacterModel(characters, hidden, layers, embedding, dropout)
