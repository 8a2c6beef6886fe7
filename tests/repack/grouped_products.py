"""The operator by which transformers computes mixtures of experts, registered here where transformers did not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "transformers::grouped_mm_fallback"


def _product(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    parts = [rows @ matrix for rows, matrix in zip(input.tensor_split(offs.long()), weight, strict=False)]
    left = len(input) - sum(map(len, parts))
    return torch.cat([*parts, input.new_zeros(left, weight.shape[2])])


def grouped_product() -> Any:
    """The operator: rows ``(rows, in)``, weights ``(experts, in, out)``, where each expert's rows end."""
    if not hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        made = torch.library.custom_op(NAME, _product, mutates_args=())
        made.register_fake(lambda input, weight, offs: input.new_empty(input.shape[0], weight.shape[2]))
    return torch.ops.transformers.grouped_mm_fallback


class Mixture(nn.Module):
    """Tokens by the experts that a router gives them, as transformers writes it; weights turned, or not."""

    def __init__(self, experts: int = 4, width: int = 16, inner: int = 24, each: int = 2) -> None:
        super().__init__()
        self.experts, self.each = experts, each
        self.router, self.out = nn.Linear(width, experts), nn.Linear(width, width)
        self.up = nn.Parameter(torch.randn(experts, inner, width))
        self.down = nn.Parameter(torch.randn(experts, inner, width))

    def forward(self, x: Tensor) -> Tensor:
        product = grouped_product()
        tokens = self.out(x).reshape(-1, x.shape[-1])
        share, chosen = self.router(tokens).softmax(-1).topk(self.each, -1)
        of_expert, order = torch.sort(chosen.reshape(-1))
        count = torch.histc(of_expert.float(), bins=self.experts, min=0, max=self.experts - 1)
        ends = torch.cumsum(count, 0, dtype=torch.int32)
        y = product(tokens[order // self.each], self.up.transpose(-2, -1), offs=ends).relu()
        y = product(y, self.down, offs=ends) * share.reshape(-1)[order].unsqueeze(-1)
        z: Tensor = y[torch.argsort(order)].view(-1, self.each, x.shape[-1]).sum(1).view(x.shape)
        return z
