"""What can be pruned is found by running the model; what cannot has a reason."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune import PruningHooks, prune_post_training
from autoprune.errors import AutopruneError, ConfigError
from autoprune.model.inventory import take_inventory


class Odd(nn.Module):
    """One layer of every kind the inventory has something to say about."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, dilation=1, groups=2)
        self.same = nn.Conv2d(16, 16, 3, padding="same")
        self.reflect = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
        self.tiny = nn.Conv2d(16, 2, 1)
        self.twice = nn.Linear(16, 16)
        self.behind = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.behind.weight
        self.unused = nn.Linear(16, 16)
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reflect(self.same(self.conv(x)))
        _ = self.tiny(x)
        x = self.twice(self.twice(x.mean((2, 3))))
        x = self.tied(F.linear(x, self.behind.weight, self.behind.bias))
        return cast("Tensor", self.fc(x))


def test_layers_and_reasons() -> None:
    model = Odd().train()
    inventory = take_inventory(model, torch.randn(2, 8, 8, 8), keep_dense=["f*"])
    assert model.training
    assert inventory.names == ["conv", "same", "twice", "behind"]
    conv = inventory["conv"]
    assert (conv.weight_shape, conv.conv_groups, conv.stride, conv.padding) == ((16, 4, 3, 3), 2, (2, 2), (1, 1))
    assert conv.positions == 2 * 4 * 4
    assert conv.macs == 16 * 4 * 9 * conv.positions
    assert inventory["same"].padding == (1, 1)
    assert inventory["twice"].calls == 2
    reasons = {row.name: row.reason for row in inventory.dense}
    assert "padding mode 'reflect'" in reasons["reflect"]
    assert "only 32 weights" in reasons["tiny"]
    assert inventory["behind"].calls == 2  # by its weight alone, and as another layer's
    assert inventory["behind"].biases == ("behind.bias", "tied.bias")
    assert "that of behind" in reasons["tied"]
    assert "does not read it" in reasons["unused"]
    assert "config" in reasons["fc"]


def test_a_fused_transformer_layer_offers_its_attention_and_its_linears() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    inventory = take_inventory(model, torch.randn(2, 5, 32))
    own = ["self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"]
    assert inventory.names == [f"layers.{layer}.{name}" for layer in (0, 1) for name in own]
    assert {layer.kind for layer in inventory.layers} == {"linear"}
    assert inventory["layers.0.self_attn.in_proj_weight"].biases == ("layers.0.self_attn.in_proj_bias",)
    assert inventory["layers.0.self_attn.in_proj_weight"].positions == 2 * 5
    assert {layer.input_shape[:2] for layer in inventory.layers} == {(2, 5)}


def test_inputs_of_a_wrong_shape_are_explained() -> None:
    with pytest.raises(AutopruneError, match=r"\(1, 5, 8, 8\).*batch included"):
        take_inventory(Odd(), torch.randn(1, 5, 8, 8))


def test_a_model_without_prunable_layers_is_refused() -> None:
    with pytest.raises(AutopruneError, match="no layer of this model can be pruned"):
        take_inventory(nn.Sequential(nn.ReLU()), torch.randn(1, 4))


class Normed(nn.Module):
    """Batch norms of every kind of neighbour."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("plain", "summed", "relued", "twice", "kept", "bare"):
            self.add_module(name, nn.Conv2d(8, 8, 3, padding=1))
            self.add_module(f"{name}_norm", nn.BatchNorm2d(8, affine=name != "bare"))
        self.fc, self.fc_norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.tokens, self.tokens_norm = nn.Linear(16, 8), nn.BatchNorm1d(8)

    def forward(self: Any, x: Tensor) -> Tensor:  # its parts are added by name
        first = self.plain(x)
        second = self.kept(x)
        x = self.plain_norm(first) + self.kept_norm(second) + second
        y = self.summed(x)
        y += x
        x = self.summed_norm(y)
        x = self.relued_norm(self.relued(x).relu())
        x = self.twice_norm(self.twice(self.twice_norm(x)))
        x = self.bare_norm(self.bare(x))
        x = self.fc_norm(self.fc(x.mean((2, 3))))
        y = self.tokens_norm(self.tokens(x.unflatten(1, (1, 16)).expand(-1, 8, -1)))
        assert y.shape[1:] == (8, 8)
        return cast("Tensor", y)


def test_the_norm_of_a_layer_reads_its_output_as_it_is() -> None:
    inventory = take_inventory(Normed(), torch.randn(2, 8, 6, 6))
    norms = {layer.name: layer.norm for layer in inventory.layers if layer.norm is not None}
    assert norms == {"plain": "plain_norm", "kept": "kept_norm", "fc": "fc_norm"}
    assert len(inventory.layers) == 8


def test_a_layer_that_runs_twice_has_no_norm() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return cast("Tensor", self.norm(self.conv(self.conv(x))))

    assert take_inventory(Twice(), torch.randn(1, 8, 6, 6))["conv"].norm is None


def test_the_callers_inference_mode_does_not_matter() -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 8)),
        torch.ones(1, 3, 4, 4),
    )
    with torch.inference_mode():
        inside = take_inventory(model, x, min_weights=1)
    assert inside == take_inventory(model, x, min_weights=1)
    assert inside["0"].norm == "1"


@pytest.mark.parametrize(
    ("kept", "said"),
    [(["fisrt"], r"no layer is called 'fisrt'. Did you mean 'first'"), ("first", r"such as \['first'\], not a string")],
)
def test_a_name_that_no_layer_has_is_not_kept_dense_in_silence(kept: Sequence[str], said: str) -> None:
    model = nn.Sequential(OrderedDict(first=nn.Linear(16, 16), last=nn.Linear(16, 16)))
    with pytest.raises(ConfigError, match=said):
        PruningHooks(model, torch.randn(2, 16), sparsity=0.5, keep_dense=kept)
    with pytest.raises(ConfigError, match=said):
        prune_post_training(model, [torch.randn(2, 16)], 0.5, keep_dense=kept)


def test_what_is_no_module_is_not_pruned() -> None:
    with pytest.raises(AutopruneError, match=r"the model is a dict: give the torch\.nn\.Module"):
        prune_post_training({}, [torch.randn(2, 16)], 0.5)  # type: ignore[arg-type]
