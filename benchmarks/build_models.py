"""The models that are built natively to be compared and measured: pruned in groups, without training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.model.inventory import take_inventory
from autoprune.precision import Precision
from autoprune.registry import Choice
from autoprune.repack import ProgramModel, repack
from autoprune.repack.tuning.tuning import TuningCache
from autoprune.tasks.zoo.initialise import randomise_norms_
from autoprune.tasks.zoo.mobilenet import mobilenet_v2
from autoprune.tasks.zoo.resnet import resnet20
from autoprune.tasks.zoo.small import residual_cnn
from autoprune.tasks.zoo.transformer import bert_mini
from benchmarks.lib.pruning import prune_

PATTERN = Choice("group", {"size": 16})
CALIBRATION = 4  # batches
WORDS, WIDTH, HEADS = 500, 64, 4


class Steps(nn.Module):
    """An LSTM over a sequence and a Linear. (N, steps, 40) -> (N, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(40, 96, 2, batch_first=True), nn.Linear(96, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.lstm(x)[0][:, -1])
        return y


class Block(nn.Module):
    """Attention under a mask, and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.inner(self.before(x)).unflatten(2, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        z: Tensor = x + self.narrow(functional.gelu(self.wide(self.after(x))))
        return z


class Encoder(nn.Module):
    """Word numbers (N, tokens) and a mask (N, tokens), 1 for words and 0 for padding -> (N, 5)."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Parameter(torch.randn(tokens, WIDTH))
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids) + self.places
        added = ((mask - 1.0) * 1e9)[:, None, None]
        for block in self.blocks:
            x = block(x, added)
        share = mask / mask.sum(1, keepdim=True)
        y: Tensor = self.out((self.norm(x) * share[:, :, None]).sum(1))
        return y


def _words(tokens: int) -> Tensor:
    return torch.randint(WORDS, (1, tokens))


@dataclass(frozen=True)
class Subject:
    """A model, what it is given, and how it is repacked."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    sparsity: float = 0.75
    precision: Precision = "float32"

    def model(self, sparsity: float | None = None) -> nn.Module:
        """In eval mode, with norms that do something, pruned to `sparsity`, or to its own."""
        torch.manual_seed(0)
        model = randomise_norms_(self.build(), 0).eval()
        return prune_(
            model, take_inventory(model, self.given()).layers, PATTERN, self.sparsity if sparsity is None else sparsity
        )

    def given(self, seed: int = 1) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        return self.inputs()

    def repacked(self, sparsity: float | None = None, cache: TuningCache | None = None) -> ProgramModel:
        """As a program for one thread; `cache` as of `repack`."""
        batches = [self.given(seed) for seed in range(2, 2 + CALIBRATION)] if self.precision != "float32" else None
        made = repack(
            self.model(sparsity), self.given(), form="program", threads=1, precision=self.precision,
            calibration=batches, cache=cache,
        )  # fmt: skip
        assert isinstance(made, ProgramModel)
        return made


def _digits() -> nn.Module:
    return residual_cnn(1, 10, (16, 32, 64))


def _image(channels: int, size: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(1, channels, size, size),)


def _mask(tokens: int) -> Tensor:
    return (torch.arange(tokens) < math.ceil(tokens * 0.7)).float()[None]


SUBJECTS: Mapping[str, Subject] = {
    "digits": Subject(_digits, _image(1, 32)),
    "digits-90": Subject(_digits, _image(1, 32), 0.9),
    "digits-int8": Subject(_digits, _image(1, 32), precision="int8"),
    "digits-90-int8": Subject(_digits, _image(1, 32), 0.9, "int8"),
    "resnet20": Subject(resnet20, _image(3, 32)),
    "resnet20-int8": Subject(resnet20, _image(3, 32), precision="int8"),
    "mobilenet_v2": Subject(mobilenet_v2, _image(3, 96)),
    "lstm": Subject(Steps, lambda: (torch.randn(1, 20, 40),)),
    "encoder": Subject(lambda: Encoder(24), lambda: (_words(24), _mask(24))),
    "bert_mini": Subject(lambda: bert_mini(tokens=32), lambda: (torch.randint(1000, (1, 32)),)),
}
