"""Laws of every backend: a layer that it supports computes, packed, what the masked layer does."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from autoprune.patterns import PATTERNS
from autoprune.registry import Choice
from autoprune.repack.modules.backends.base import Backend, LayerForm
from autoprune.testing.cases import copied, same_tensors
from autoprune.testing.law import require

GROUP_SIZES = (1, 2, 3, 4, 8, 16)


def check_backend(backend: Backend, *, examples: int = 50, seed: int = 0) -> None:
    """Checks a backend on random pruned convolutions and Linears, batches of none, one and several.

    Args:
        backend: what is checked.
        examples: how many layers.
        seed: of the layers.

    Raises:
        BrokenLaw: the backend breaks a law; the message says which.
    """
    draws = random.Random(seed)
    for index in range(examples):
        module, x = _draw_conv(draws) if index % 2 else _draw_linear(draws)
        check_lowered(backend, LayerForm(module, relu=draws.random() < 0.5), x)
    for module, x in (
        (nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 6, 7)),
        (nn.Linear(7, 5), torch.randn(2, 7)),
        (nn.Conv2d(3, 5, 3, padding=1), torch.randn(0, 3, 6, 7)),
    ):
        nn.init.zeros_(module.weight)
        check_lowered(backend, LayerForm(module.eval()), x)


def check_lowered(backend: Backend, form: LayerForm, x: Tensor) -> None:
    """Checks a backend on one layer, where it supports that.

    Args:
        backend: what is checked.
        form: the layer.
        x: what the layer is called with, as a Conv2d or Linear takes it.

    Raises:
        BrokenLaw: the backend breaks a law.
    """
    case = f"for {form.module} of sparsity {form.sparsity:.2f} and an input of shape {tuple(x.shape)}"
    support = backend.supports(form)
    if not support.ok:
        require(bool(support.why), backend, f"says why it cannot lower a layer, {case}")
        return
    weights, given = copied(form.module.state_dict()), x.clone()
    with torch.inference_mode():
        wanted = form.module(x)
        wanted = wanted.relu() if form.relu else wanted
        got = backend.lower(form)(x)
    require(torch.equal(x, given), backend, f"leaves the input as it was, {case}")
    require(same_tensors(weights, form.module.state_dict()), backend, f"leaves the layer as it was, {case}")
    require(
        got.shape == wanted.shape and got.dtype == wanted.dtype, backend, f"gives the layer's shape and type, {case}"
    )
    if wanted.numel():
        close = bool((got - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-7)
        require(close, backend, f"computes what the layer does, ReLU {form.relu}, {case}")


def _prune_(module: nn.Conv2d | nn.Linear, draws: random.Random) -> None:
    """Prunes by magnitude, by a random pattern."""
    size = draws.choice(GROUP_SIZES)
    pattern = draws.choice(
        (
            Choice("unstructured"),
            Choice("group", {"size": size}),
            Choice("n:m"),
            Choice("block", {"rows": size, "columns": 2}),
            Choice("channel"),
            Choice("filter"),
        )
    )
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    mask = PATTERNS.create(pattern).mask(module.weight.abs(), draws.choice((0.0, 0.5, 0.9, 0.99)), groups)
    with torch.no_grad():
        module.weight.mul_(mask)


def _draw_conv(draws: random.Random) -> tuple[nn.Conv2d, Tensor]:
    """A pruned convolution and an input, at times without a batch dimension."""
    groups = draws.choice((1, 1, 1, 2, 3))
    channels, filters = groups * draws.randint(1, 6), groups * draws.randint(1, 20)
    kernel = draws.choice(((1, 1), (3, 3), (1, 5), (2, 3)))
    stride, dilation = ((draws.randint(1, 3), draws.randint(1, 3)) for _ in range(2))
    padding = (draws.randint(0, 3), draws.randint(0, 3))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    height, width = (extent + draws.randint(0, 24) for extent in least)
    batch = draws.choice(((), (1,), (2,), (3,)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draws.getrandbits(20))
        conv = nn.Conv2d(channels, filters, kernel, stride, padding, dilation, groups, bias=draws.random() < 0.5)
        _prune_(conv, draws)
        return conv.eval(), torch.randn(*batch, channels, height, width)


def _draw_linear(draws: random.Random) -> tuple[nn.Linear, Tensor]:
    """A pruned Linear and an input with up to two leading axes."""
    leading = draws.choice(((), (draws.randint(1, 40),), (draws.randint(1, 5), draws.randint(1, 8))))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draws.getrandbits(20))
        linear = nn.Linear(draws.randint(1, 70), draws.randint(1, 40), bias=draws.random() < 0.5)
        _prune_(linear, draws)
        return linear.eval(), torch.randn(*leading, linear.in_features)
