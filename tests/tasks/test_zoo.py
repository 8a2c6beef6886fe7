"""Laws of every model of the zoo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import ConfigError
from autoprune.model.inventory import take_inventory
from autoprune.tasks.zoo import MODELS, build_model, build_sequence_model, build_text_model
from autoprune.tasks.zoo.initialise import randomise_norms_
from autoprune.tasks.zoo.small import residual_cnn
from autoprune.tasks.zoo.standard import STANDARD, standard_input, standard_model
from autoprune.tasks.zoo.transformer import Attention, bert_mini

SEQUENCES, TEXT = ("lstm_classifier",), ("char_lstm",)


def build(name: str, seed: int = 0, **args: Any) -> nn.Module:
    if name in SEQUENCES:
        return build_sequence_model(name, args, features=3, classes=7, seed=seed)
    if name in TEXT:
        return build_text_model(name, args, characters=7, seed=seed)
    return build_model(name, args, in_channels=3, size=16, classes=7, seed=seed)


def inputs_of(name: str) -> tuple[Tensor, ...]:
    if name in SEQUENCES:
        return torch.randn(2, 5, 3), torch.tensor([5, 2])
    return (torch.randint(7, (2, 5)),) if name in TEXT else (torch.randn(2, 3, 16, 16),)


@pytest.mark.parametrize("name", list(MODELS))
def test_gives_logits_trains_and_can_be_pruned(name: str) -> None:
    model, inputs = build(name), inputs_of(name)
    logits = model(*inputs)
    assert logits.shape == ((2, 5, 7) if name in TEXT else (2, 7))
    logits.square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    inventory = take_inventory(model, inputs)
    unprunable = {row.name: row.reason for row in inventory.dense if "weights" not in row.reason}
    assert len(inventory.layers) >= 2
    # embeddings and learned positions, which nothing multiplies by
    assert all(reason.startswith("nothing multiplies by it as it is") for reason in unprunable.values())
    assert set(unprunable) <= {"token", "position", "embedding"}


@pytest.mark.parametrize("name", list(MODELS))
def test_weights_come_from_the_seed_alone(name: str) -> None:
    before = torch.get_rng_state()
    a, b, c = build(name), build(name), build(name, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(a.parameters(), b.parameters(), c.parameters(), strict=True))
    assert all(torch.equal(x, y) for x, y, _ in pairs)
    assert any(not torch.equal(x, z) for x, _, z in pairs)


def test_residual_cnn_has_a_norm_and_a_relu_a_convolution() -> None:
    model = residual_cnn(1, 10, widths=(8, 12), blocks=2)
    kinds = [type(module) for module in model.modules()]
    shortcuts = 1
    assert kinds.count(nn.Conv2d) == kinds.count(nn.BatchNorm2d) == 1 + 2 * 4 + shortcuts
    assert kinds.count(nn.ReLU) == 1 + 2 * 4
    assert not any(module.inplace for module in model.modules() if isinstance(module, nn.ReLU))
    assert model[:-3](torch.zeros(1, 1, 32, 32)).shape == (1, 12, 16, 16)


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("residual_cn", {}, "unknown model 'residual_cn'. Did you mean 'residual_cnn'?"),
        ("mlp", {"blocks": 2}, "model 'mlp' has no argument 'blocks'. Allowed: classes, in_channels, size, widths."),
        ("residual_cnn", {"widths": [8, 0]}, "each of widths must be a positive integer, not 0"),
        ("residual_cnn", {"widths": []}, "widths must be a list of positive integers such as [16, 32, 64], not []"),
        ("plain_cnn", {"widths": "16"}, "widths must be a list of positive integers"),
        ("residual_cnn", {"blocks": True}, "blocks must be a positive integer, not True"),
        ("tiny_transformer", {"heads": 5}, "heads must divide width"),
        ("tiny_transformer", {"patch": 5}, "patch must divide the image's side"),
        ("vit_small", {"heads": 5}, "heads must divide width"),
        ("vit_small", {"blocks": 0}, "must be a positive integer, not 0"),
        ("vit_small", {"patch": 5}, "patch must divide the image's side"),
        ("lstm_classifier", {"layers": 0}, "features, classes, hidden and layers must be a positive integer, not 0"),
        ("lstm_classifier", {"cell": "rnn"}, "unknown cell 'rnn'"),
        ("lstm_classifier", {"size": 16}, "model 'lstm_classifier' has no argument 'size'"),
        ("char_lstm", {"embedding": 0}, "characters, hidden, layers and embedding must be a positive integer, not 0"),
        ("char_lstm", {"dropout": -0.1}, "dropout must be a number in [0, 1), not -0.1"),
    ],
)
def test_refuses(name: str, args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(name, **args)
    assert said in str(caught.value)


# Of the papers' models, as every implementation of them counts.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet20": 272_474,  # projection shortcuts; the paper's own have no weights
    "resnet50": 25_557_032,
    "mobilenet_v2": 3_504_872,
    "vit_small": 22_050_664,
    "bert_mini": 11_006_466,  # without token types and pooler
}


@pytest.mark.parametrize("name", list(STANDARD))
def test_a_standard_model_has_the_published_size_and_finite_outputs(name: str) -> None:
    model, x = standard_model(name), standard_input(name, 2)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert not model.training
    with torch.inference_mode():
        logits = model(x)
    assert logits.shape == (2, 2 if name == "bert_mini" else 10 if name == "resnet20" else 1000)
    assert bool(torch.isfinite(logits).all())
    assert not torch.allclose(logits[0], logits[1]), "the input must matter"
    assert all(row.weights >= 64 for row in take_inventory(model, x).layers)


@pytest.mark.parametrize("name", list(STANDARD))
def test_a_standard_model_comes_from_its_seed(name: str) -> None:
    before = torch.get_rng_state()
    a, b = standard_model(name).state_dict(), standard_model(name).state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(standard_input(name, 1), standard_input(name, 1))
    assert not torch.equal(standard_input(name, 1), standard_input(name, 1, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    other = standard_model(name, seed=1).state_dict()
    assert all(not torch.equal(a[key], other[key]) for key in a if "norm" in key and key.endswith("weight"))


def test_randomised_norms_are_far_from_the_identity() -> None:
    norm = randomise_norms_(nn.BatchNorm2d(64), 0).eval()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    for values, new in ((norm.running_mean, 0), (norm.running_var, 1), (norm.weight, 1), (norm.bias, 0)):
        assert (values - new).abs().median() > 0.02
    assert float(norm.running_var.min()) >= 0.5


def test_an_unknown_standard_model_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown standard model 'resnet19'\. Did you mean 'resnet18'"):
        standard_model("resnet19")
    with pytest.raises(ConfigError, match="heads must divide width"):
        bert_mini(heads=3)


def test_attention_is_what_torch_computes() -> None:
    """Against torch's own multi-head attention with the same weights."""
    torch.manual_seed(0)
    attention, other = Attention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        other.in_proj_weight.copy_(attention.qkv.weight)
        other.in_proj_bias.copy_(attention.qkv.bias)
        other.out_proj.load_state_dict(attention.proj.state_dict())
        x = torch.randn(2, 5, 16)
        assert torch.allclose(attention(x), other(x, x, x, need_weights=False)[0], atol=1e-6)
