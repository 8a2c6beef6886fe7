"""Transformers whose layers are called, against what torch's fused path gives."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.model.copies import copy_for_inference

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

BATCH, LENGTH, WIDTH, HEADS = 3, 6, 32, 4


def layer(**settings: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True, **settings)


class Attention(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(WIDTH, HEADS, batch_first=True)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
    "attention of a subclass": Attention,
    "layer": layer,
    "layer, norm first": lambda: layer(norm_first=True),
    "encoder": lambda: nn.TransformerEncoder(layer(), 2),
    "encoder with a norm": lambda: nn.TransformerEncoder(layer(), 2, norm=nn.LayerNorm(WIDTH)),
    "encoder, not nested": lambda: nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False),
    "encoder without a look at the mask": lambda: nn.TransformerEncoder(layer(), 2, mask_check=False),
    "encoder that torch does not fuse": lambda: nn.TransformerEncoder(
        layer(activation=torch.tanh), 2, enable_nested_tensor=False
    ),
    "encoder, batch second": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, HEADS, 64), 2, enable_nested_tensor=False
    ),
}


def padding(*ends: int, first: int = LENGTH) -> Tensor:
    """True from each sample's end on; in the second sample up to `first` alone."""
    padded = torch.arange(LENGTH) >= torch.tensor(ends)[:, None]
    padded[1] = (torch.arange(LENGTH) < first) if first < LENGTH else padded[1]
    return padded


CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
SHORT, EMPTY, LEFT = padding(6, 4, 6), padding(6, 4, 0), padding(6, 6, 6, first=2)
MASKS: dict[str, tuple[Tensor | None, Tensor | None]] = {
    "none": (None, None),
    "padding": (None, SHORT),
    "a sample of padding alone": (None, EMPTY),
    "padding at the left": (None, LEFT),
    "padding in the middle": (None, SHORT | (torch.arange(LENGTH) == 2)),
    "a position that sees nothing": ((torch.arange(LENGTH) == 2)[:, None].expand(LENGTH, LENGTH), None),
    "causal": (CAUSAL, None),
    "causal and left": (CAUSAL, LEFT),
    "a mask a head": (torch.arange(BATCH * HEADS * LENGTH * LENGTH).view(-1, LENGTH, LENGTH) % 3 == 0, SHORT),
    "numbers": (None, SHORT * -1.0),
    "large numbers": (torch.where(CAUSAL, -1e9, 0.0), SHORT * -1e9),
}


def run(model: nn.Module, masks: tuple[Tensor | None, Tensor | None]) -> Tensor:
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    if isinstance(model, nn.MultiheadAttention):
        out: Tensor = model(x, x, x, attn_mask=masks[0], key_padding_mask=masks[1], need_weights=False)[0]
        return out
    first = isinstance(model, nn.TransformerEncoder) and not model.layers[0].self_attn.batch_first
    out = model(x.transpose(0, 1) if first else x, *masks)
    return out


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("gradients", [False, True])
def test_an_unfused_transformer_gives_what_the_fused_one_gives(name: str, mask: str, gradients: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    unfused = pickle.loads(pickle.dumps(copy_for_inference(copy_for_inference(model))))  # noqa: S301 - ours
    with torch.set_grad_enabled(gradients):
        expected, got = run(model, MASKS[mask]), run(unfused, MASKS[mask])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4, equal_nan=True)


def test_without_the_fused_path_there_is_nothing_to_imitate() -> None:
    model = MODELS["encoder"]().eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            expected, got = run(model, MASKS["padding"]), run(copy_for_inference(model), MASKS["padding"])
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(got, expected)
    assert got[1, 4:].abs().min() > 0


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.TransformerEncoder(layer(), 1), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(x, src_key_padding_mask=padded).mean(1))
        return y


@pytest.mark.parametrize("form", ["program", "modules"])
def test_a_repacked_encoder_pads_with_zeros_as_its_user_sees(form: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Classifier().eval(), torch.randn(BATCH, LENGTH, WIDTH)
    fast = autoprune.repack(model, (x, SHORT), form=form, choose=(lambda *_: "jit") if form == "modules" else None)
    autoprune.save(fast, tmp_path / "fast.safetensors")
    loaded = autoprune.load(tmp_path / "fast.safetensors", copy.deepcopy(model) if form == "modules" else None)
    for padded in (SHORT, EMPTY, LEFT, padding(6, 6, 6)):
        with torch.no_grad():
            expected = model(x, padded)
            for each in (fast, loaded):
                torch.testing.assert_close(each(x, padded), expected, atol=1e-4, rtol=1e-4)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        decoder = nn.TransformerDecoderLayer(WIDTH, HEADS, 64, batch_first=True)
        self.encoder, self.decoder = nn.TransformerEncoder(layer(), 1), nn.TransformerDecoder(decoder, 1)
        self.register_buffer("causal", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(self.encoder(x, mask=self.causal), x, tgt_mask=self.causal)
        return y


def test_causal_masks_do_not_keep_a_model_from_being_a_program() -> None:
    torch.manual_seed(0)
    model, x = Decoder().eval(), torch.randn(BATCH, LENGTH, WIDTH)
    fast = autoprune.repack(model, x, form="program")
    other = torch.randn(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(fast(other), model(other), atol=1e-4, rtol=1e-4)
