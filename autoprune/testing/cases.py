"""What members are checked on: small networks, random batches, random pruned layers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.model.inventory import Inventory, take_inventory
from autoprune.plan import LayerPlan, Plan
from autoprune.quantization import Grid, attach_
from autoprune.registry import Choice
from autoprune.training.base import Pruner

CONV_NET_INPUT = (4, 6, 6)
CONV_NET_CLASSES = 12
LOSS = nn.functional.cross_entropy
PATTERN_CHOICES = (
    Choice("unstructured"),
    Choice("group", {"size": 4}),
    Choice("n:m"),
    Choice("block", {"rows": 4, "columns": 4}),
    Choice("channel"),
    Choice("filter"),
)


def conv_net() -> nn.Sequential:
    """A convolution with a batch norm, a grouped convolution and a Linear: ``(N, 4, 6, 6)`` -> ``(N, 12)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(4, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, groups=4),
            nn.Flatten(),
            nn.Linear(64, 12),
        )


def fake_quantize_(model: nn.Module) -> None:
    """Makes a `conv_net` compute as in int8, on grids that fit its inputs and first values."""
    signed = dict.fromkeys(("0.int8_input", "5.int8_input"), Grid(0.03, 128))
    attach_(model, {**signed, "2.int8_output": Grid(0.02), "3.int8_input": Grid(0.02)})


def inventory_of_conv_net(model: nn.Module) -> Inventory:
    """The three layers of `conv_net`."""
    return take_inventory(model, torch.zeros(1, *CONV_NET_INPUT))


def random_batches(
    count: int = 4,
    samples: int = 8,
    shape: tuple[int, ...] = CONV_NET_INPUT,
    classes: int = CONV_NET_CLASSES,
    seed: int = 1,
) -> list[tuple[Tensor, Tensor]]:
    """`count` batches of normal inputs ``(samples, *shape)`` and random labels ``(samples,)`` below `classes`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, samples, *shape, generator=generator)
    y = torch.randint(0, classes, (count, samples), generator=generator)
    return list(zip(x, y, strict=True))


def conv_net_pruner(pattern: Choice, sparsities: Sequence[float], criterion: str = "magnitude") -> Pruner:
    """A new `conv_net` and a plan for its three layers, to train with."""
    model = conv_net()
    inventory = inventory_of_conv_net(model)
    layers = {
        name: LayerPlan(sparsity, pattern, Choice(criterion))
        for name, sparsity in zip(inventory.names, sparsities, strict=True)
    }
    return Pruner(model, inventory, Plan(layers), random_batches(1), LOSS)


def draw_weight(draws: random.Random) -> tuple[Tensor, int]:
    """Saliencies in [0, 1) in the shape of a random layer's weight, and its convolution groups."""
    groups = draws.choice((1, 1, 2, 3))
    window = draws.choice(((), (1, 1), (3, 3), (1, 5)))
    shape = (groups * draws.randint(1, 9), draws.randint(1, 9), *window)
    return torch.rand(shape, generator=torch.Generator().manual_seed(draws.getrandbits(20))), groups


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same names and, bit for bit, the same values."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a state dict that later changes of the model leave alone."""
    return {name: value.clone() for name, value in tensors.items()}
