"""Models as libraries write them, of which no operator is left to torch: what is built ahead of time must be so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.repack import ProgramModel, repack
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.lowering.steps import TorchStep
from autoprune.repack.outputs import same_output
from autoprune.repack.runtime.program import Plan
from tests.laws.test_program import told

WIDTH, HEADS, WORDS = 16, 2, 30


class Attention(nn.Module):
    """Of several heads; with a cache, behind the keys and values of earlier tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(
        self, x: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (each(x).view(*x.shape[:-1], HEADS, -1).transpose(1, 2) for each in (self.q, self.k, self.v))
        if past is not None:
            k, v = torch.cat([past[0], k], -2), torch.cat([past[1], v], -2)
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out(y.transpose(1, 2).reshape(x.shape)), k, v


def new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))


class Encoder(nn.Module):
    """Words, places and types, and a mask that is looked up for each pair of places, as BERT has them."""

    places: Tensor
    types: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words, self.place, self.sort = nn.Embedding(WORDS, WIDTH), nn.Embedding(40, WIDTH), nn.Embedding(2, WIDTH)
        self.register_buffer("places", torch.arange(40)[None])
        self.register_buffer("types", torch.zeros(1, 40, dtype=torch.int64))
        self.norm, self.attention, self.head = nn.LayerNorm(WIDTH), Attention(), nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        batch, tokens = ids.shape
        places = self.places[:, :tokens]
        types = torch.gather(self.types.expand(places.shape[0], -1), 1, places).expand(batch, tokens)
        x = self.norm(self.words(ids) + self.sort(types) + self.place(places))
        rows = torch.arange(batch)[:, None, None, None]
        columns = torch.arange(tokens)[None, None, None, :]
        allowed = (columns >= 0).expand(batch, 1, tokens, tokens) & mask.bool()[rows, columns]
        y, *_ = self.attention(x, allowed)
        return self.head((x + y)[:, 0].tanh())  # type: ignore[no-any-return]


class Counted(nn.Module):
    """Places that are counted over what is no padding, a mask that is added, and a mean of what is no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.place, self.attention = nn.Embedding(WORDS, WIDTH), nn.Embedding(40, WIDTH), Attention()

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        mask = ids.ne(1)
        places = (torch.cumsum(mask.int(), 1).type_as(ids) * mask.long()) + 1
        x = self.words(ids) + self.place(places)
        added = (1.0 - mask[:, None, None, :].to(x.dtype)) * torch.finfo(torch.float32).min
        x = x + self.attention(x, added)[0]
        weights = mask[..., None].float()
        mean = (x * weights).sum(1) / torch.clamp(weights.sum(1), min=1e-9)
        return F.normalize(mean, p=2.0, dim=1), mean.argmax(-1)


class Decoder(nn.Module):
    """A step: new tokens behind a cache of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.place, self.attention = nn.Embedding(WORDS, WIDTH), nn.Embedding(40, WIDTH), Attention()
        self.wide, self.narrow, self.norm = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        past, new = keys.shape[-2], ids.shape[1]
        places = torch.arange(past, past + new)
        x = self.words(ids) + self.place(places)
        allowed = torch.arange(past + new)[None] <= places[:, None]
        y, keys, values = self.attention(self.norm(x), allowed[None, None], (keys, values))
        x = x + y
        x = x + self.narrow(new_gelu(self.wide(x)))
        return x @ self.words.weight.t(), keys, values


class Relative(nn.Module):
    """A bias by buckets of distances, and the root mean square as a norm, as T5 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.bias, self.scale = (
            nn.Embedding(WORDS, WIDTH),
            nn.Embedding(8, HEADS),
            nn.Parameter(torch.ones(WIDTH)),
        )
        self.attention = Attention()

    def buckets(self, tokens: int) -> Tensor:
        places = torch.arange(tokens)
        far = places[None] - places[:, None]
        near = far.abs()
        rare = 2 + (torch.log(near.float() / 2) / 1.2 * 2).to(torch.int64)
        rare = torch.min(rare, torch.full_like(rare, 3))
        return (far > 0).to(torch.int64) * 4 + torch.where(near < 2, near, rare)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        bias = self.bias(self.buckets(ids.shape[1])).permute(2, 0, 1)[None]
        bias = bias + (1.0 - mask[:, None, None].float()) * -1e9
        y: Tensor = x + self.attention(x, bias)[0]
        return y


class Patches(nn.Module):
    """A token for the class before those of the patches, as ViT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, WIDTH, 4, 4), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.place, self.attention = nn.Parameter(torch.randn(1, 10, WIDTH)), Attention()

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        y: Tensor = self.attention(x, None)[0]
        return y[:, 0]


class Windows(nn.Module):
    """Attention within windows that are shifted and padded, with a bias by relative places, as Swin has it."""

    relative: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.table = Attention(), nn.Parameter(torch.randn(25, HEADS))
        self.register_buffer("relative", torch.randint(0, 25, (9, 9)))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        x = F.pad(x, (0, 0, 0, -width % 3, 0, -height % 3))
        high, wide = x.shape[1:3]
        x = torch.roll(x, (-1, -1), (1, 2))
        windows = x.view(batch, high // 3, 3, wide // 3, 3, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, WIDTH)
        bias = self.table[self.relative.view(-1)].view(9, 9, HEADS).permute(2, 0, 1)[None]
        y = self.attention(windows, bias.expand(windows.shape[0], -1, -1, -1))[0]
        y = y.view(batch, high // 3, wide // 3, 3, 3, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
        return torch.roll(y, (1, 1), (1, 2))[:, :height, :width].contiguous()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(WORDS, WIDTH), nn.LSTM(WIDTH, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.lstm(self.words(ids))[0].max(1)[0]).log_softmax(-1)
        return y


def ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(2, WORDS, (batch, tokens))


def padded(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    mask[-1, -2:] = 0
    return ids(batch, tokens), mask


def ended(batch: int, tokens: int) -> tuple[Tensor]:
    given, mask = padded(batch, tokens)
    return (given.masked_fill(mask == 0, 1),)


def cached(batch: int, past: int) -> tuple[Tensor, Tensor, Tensor]:
    size = (batch, HEADS, past, WIDTH // HEADS)
    return ids(batch, 1), torch.randn(size), torch.randn(size)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], tuple[Tensor, ...]]]] = {
    "encoder": (Encoder, padded),
    "counted places": (Counted, ended),
    "decoder's step": (Decoder, cached),
    "relative places": (Relative, padded),
    "patches": (Patches, lambda batch, _: (torch.randn(batch, 3, 12, 12),)),
    "windows": (Windows, lambda batch, _: (torch.randn(batch, 7, 5, WIDTH),)),
    "recurrent": (Recurrent, lambda batch, tokens: (ids(batch, tokens),)),
}


@pytest.mark.parametrize("name", MODELS)
def test_torch_runs_nothing(name: str, tmp_path: Path) -> None:
    made, inputs = MODELS[name]
    torch.manual_seed(0)
    model = made().eval()
    fast = repack(model, inputs(1, 11), form="program", threads=1, cache=told(tmp_path, Tiling))
    assert isinstance(fast, ProgramModel)
    with torch.inference_mode():
        for given in (inputs(1, 11), inputs(3, 11), inputs(2, 8)):
            plan = fast.program.plan_for(given)
            assert isinstance(plan, Plan)
            assert [step.op.label for step in plan.lowered.steps if isinstance(step, TorchStep)] == []
            assert same_output(fast(*given), model(*given), tolerance=1e-5)
