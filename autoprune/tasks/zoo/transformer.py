"""Transformers of plain Linear layers: ViT-small for images and a BERT-mini-like encoder for text."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.errors import ConfigError
from autoprune.tasks.zoo.arguments import positive

WORDS = 30522  # of BERT's vocabulary


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) without a mask. (N, T, width) -> (N, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        heads = F.scaled_dot_product_attention(q, k, v)  # (N, heads, T, width / heads)
        out: Tensor = self.proj(heads.transpose(1, 2).reshape(n, t, d))
        return out


class Mlp(nn.Module):
    """Linear, GELU, Linear. (N, T, width) -> (N, T, width)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention and an MLP, each with a shortcut; the norm stands before them, or after the sum."""

    def __init__(self, width: int, heads: int, hidden: int, *, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.attention(self.norm1(x))
            out: Tensor = x + self.mlp(self.norm2(x))
        else:
            x = self.norm1(x + self.attention(x))
            out = self.norm2(x + self.mlp(x))
        return out


class VisionTransformer(nn.Module):
    """Pieces of an image as tokens, and a class token that is read at the end (Dosovitskiy et al. 2021)."""

    def __init__(
        self, in_channels: int, classes: int, width: int, blocks: int, heads: int, patch: int, size: int
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, 4 * width, norm_first=True) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)  # (N, T, width)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], dim=1) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


class TextEncoder(nn.Module):
    """Words and their places as tokens, norms after the sums, the first token read at the end (Devlin et al. 2019)."""

    def __init__(self, classes: int, words: int, tokens: int, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(Block(width, heads, 4 * width, norm_first=False) for _ in range(blocks)))
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        tokens = self.norm(self.words(ids) + self.position)  # (N, T, width)
        logits: Tensor = self.head(self.blocks(tokens)[:, 0])
        return logits


def vit_small(
    in_channels: int = 3,
    classes: int = 1000,
    width: int = 384,
    blocks: int = 12,
    heads: int = 6,
    patch: int = 16,
    size: int = 224,
) -> nn.Module:
    """ViT-small. (N, in_channels, size, size) -> logits (N, classes)."""
    positive("width, blocks, heads, patch and size", width, blocks, heads, patch, size)
    if width % heads or size % patch:
        raise ConfigError(
            f"vit_small: heads must divide width and patch must divide the image's side, "
            f"not heads={heads}, width={width}, patch={patch}, side={size}."
        )
    return VisionTransformer(in_channels, classes, width, blocks, heads, patch, size)


def bert_mini(
    classes: int = 2, words: int = WORDS, tokens: int = 128, width: int = 256, blocks: int = 4, heads: int = 4
) -> nn.Module:
    """A BERT-mini-like encoder without padding mask and pooler.

    int64 word numbers (N, tokens) -> logits (N, classes).
    """
    positive("words, tokens, width, blocks and heads", words, tokens, width, blocks, heads)
    if width % heads:
        raise ConfigError(f"bert_mini: heads must divide width, not heads={heads}, width={width}.")
    return TextEncoder(classes, words, tokens, width, blocks, heads)
