"""Channel gating: the input decides which output channels of a convolution are computed.

A small predictor looks at a convolution's input, the mean size of each channel, and gives every group of neighbouring
output channels a factor; most are zero, and what they belong to is zero as well. The factors are trained with the model
(Gao et al. 2019, "Dynamic channel pruning: feature boosting and suppression"). A repacked model computes the groups
that live, from the input channels that live.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from autoprune.checks import check_counts, check_flags, check_numbers
from autoprune.errors import AutopruneError, ConfigError, did_you_mean
from autoprune.model.arguments import call_with
from autoprune.model.inventory import eval_mode, take_inventory

MOMENTUM = 0.05  # of the running threshold: what a training batch adds to it


@dataclass(frozen=True)
class Gating:
    """How a convolution is gated.

    Attributes:
        group_size: neighbouring output channels that live or die together; it divides their number.
        keep: share of the groups that live, in (0, 1].
        adaptive: whether `keep` is the share over all inputs, so that one input may keep more than another: a threshold
            is found in training. Else each input keeps as many, those with the largest factors.
        ramp: training batches over which the share falls from 1 to `keep`; 0: at once.
    """

    group_size: int = 8
    keep: float = 0.5
    adaptive: bool = False
    ramp: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError naming the argument, its value and what is allowed."""
        check_counts("a gate", {"group_size": self.group_size})
        check_counts("a gate", {"ramp": self.ramp}, least=0)
        check_numbers("a gate", {"keep": self.keep}, 0.0, 1.0, "(]")
        check_flags("a gate", {"adaptive": self.adaptive})


# What a gate computes -------------------------------------------------------------------------------------------------


def saliency(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """How much each group matters for each input, >= 0.

    Args:
        x: the convolution's input, ``(batch, channels, height, width)``.
        weight: ``(groups, channels)``.
        bias: ``(groups,)``.

    Returns:
        ``(batch, groups)``.
    """
    return torch.relu(nn.functional.linear(x.abs().mean((2, 3)), weight, bias))


def winners(scores: Tensor, threshold: Tensor | float, keep: int) -> Tensor:
    """`scores` ``(batch, groups)``, zero where they do not win.

    Args:
        scores: >= 0.
        threshold: the least that wins.
        keep: the largest of each row win, and those as large as the last of them; 0: all.
    """
    lost = ~(scores >= threshold)
    if keep:
        lost = lost | ~(scores >= scores.topk(keep, dim=1).values[:, -1:])
    return scores.masked_fill(lost, 0.0)


def scaled(y: Tensor, factors: Tensor) -> Tensor:
    """`y` ``(batch, channels, height, width)`` times `factors` ``(batch, groups)``, one a group of channels."""
    if factors.shape[1] < 1 or y.shape[1] % factors.shape[1]:
        raise ValueError(f"{y.shape[1]} channels do not fall into {factors.shape[1]} groups")
    return y * factors.repeat_interleave(y.shape[1] // factors.shape[1], dim=1)[:, :, None, None]


@torch.library.custom_op("autoprune::channel_gate", mutates_args=())
def channel_gate(x: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor, keep: int) -> Tensor:
    """`winners` of the `saliency` as one operator, which a captured model keeps whole."""
    return winners(saliency(x, weight.detach(), bias.detach()), threshold, keep)


@channel_gate.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor, keep: int) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.custom_op("autoprune::scale_channels", mutates_args=())
def scale_channels(y: Tensor, factors: Tensor) -> Tensor:
    """`scaled` as one operator."""
    return scaled(y, factors)


@scale_channels.register_fake
def _(y: Tensor, factors: Tensor) -> Tensor:
    return torch.empty_like(y)


# Modules --------------------------------------------------------------------------------------------------------------


class ChannelGate(nn.Module):
    """The predictor of one convolution: its input -> a factor for each group of its output channels.

    Args:
        in_channels: of the convolution.
        out_channels: of the convolution.
        gating: how they are gated.

    Raises:
        ConfigError: the group size does not divide the output channels.
    """

    threshold: Tensor
    seen: Tensor

    def __init__(self, in_channels: int, out_channels: int, gating: Gating) -> None:
        super().__init__()
        if out_channels % gating.group_size:
            fitting = [size for size in range(1, out_channels + 1) if out_channels % size == 0]
            raise ConfigError(
                f"{out_channels} channels do not fall into groups of {gating.group_size}: choose one of {fitting}."
            )
        self.gating = gating
        groups = out_channels // gating.group_size
        self.weight = nn.Parameter(torch.randn(groups, in_channels) * (0.5 / in_channels**0.5))
        self.bias = nn.Parameter(torch.ones(groups))
        self.register_buffer("threshold", torch.zeros(1))  # the least factor that lives, where the gate is adaptive
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))  # training batches
        self.whole: int | None = None  # groups each input keeps, while the gate is captured as one operator
        self._saliency: Tensor | None = None

    @property
    def share(self) -> float:
        """Of the groups, how many live by now: `keep` once the ramp is over."""
        ramp = self.gating.ramp
        done = 1.0 if ramp == 0 else min(1.0, int(self.seen) / ramp)
        return 1.0 - (1.0 - self.gating.keep) * done

    @property
    def kept(self) -> int:
        """Groups that each input keeps; 0 where a threshold decides."""
        return 0 if self.gating.adaptive else max(1, round(self.share * len(self.bias)))

    def forward(self, x: Tensor) -> Tensor:
        if self.whole is not None:
            factors: Tensor = channel_gate(x, self.weight, self.bias, self.threshold, self.whole)
            return factors
        scores = saliency(x, self.weight, self.bias)
        if not self.training:
            return winners(scores, self.threshold, self.kept)
        self._saliency = scores
        hard = self._learn(scores.detach())
        self.seen += 1
        return scores + (hard - scores.detach())  # the gradient tells the losers too what they would have been worth

    def _learn(self, scores: Tensor) -> Tensor:
        """The winners of a training batch; moves the running threshold towards the batch's own."""
        if not self.gating.adaptive:
            return winners(scores, 0.0, self.kept)
        share = self.share
        if share >= 1.0:
            return scores
        least = scores.flatten().quantile(1.0 - share)
        moved = MOMENTUM if bool(self.threshold > 0.0) else 1.0
        self.threshold += moved * (least - self.threshold)
        return winners(scores, least, 0)

    def penalty(self) -> Tensor:
        """The mean saliency of the last training batch."""
        if self._saliency is None:
            raise AutopruneError("a gate has a penalty after a forward pass in training mode; none has been made.")
        return self._saliency.mean()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_saliency": None}  # what was computed cannot be copied

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {len(self.bias)} groups of {self.gating.group_size}, {self.gating}"


class GatedConv2d(nn.Module):
    """A convolution and its norm, whose output channels a gate scales or silences.

    Args:
        conv: without groups.
        norm: what follows it; nn.Identity where nothing does.
        gate: made for the convolution.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, gate: ChannelGate) -> None:
        super().__init__()
        self.conv, self.norm, self.gate = conv, norm, gate

    def forward(self, x: Tensor) -> Tensor:
        factors = self.gate(x)
        y: Tensor = self.norm(self.conv(x))
        if self.gate.whole is not None:
            captured: Tensor = scale_channels(y, factors)
            return captured
        return scaled(y, factors)


def gate_channels_(
    model: nn.Module, example_inputs: Any, layers: Sequence[str] | None = None, gating: Gating | None = None
) -> dict[str, GatedConv2d]:
    """Puts gates on convolutions, in place: each becomes a `GatedConv2d` that took in the batch norm behind it.

    The names of what moved change: the weight of ``conv1`` is ``conv1.conv.weight``. Gate first, then prune.

    Args:
        model: any module.
        example_inputs: a tensor or a tuple of them, as the model is called.
        layers: names of convolutions; when None, all that a batch norm follows but the first of the model.
        gating: of each; the default's when None.

    Returns:
        The gated convolutions by name.

    Raises:
        ConfigError: a name that is no convolution that can be gated, or a group size that does not fit.
    """
    gating = gating or Gating()
    inventory = take_inventory(model, example_inputs, min_weights=1)
    able = {
        layer.name: layer.norm for layer in inventory.layers
        if layer.kind == "conv2d" and layer.conv_groups == 1 and layer.calls == 1
    }  # fmt: skip
    first = inventory.names[0]
    wanted = [name for name, norm in able.items() if norm and name != first] if layers is None else list(layers)
    for name in wanted:
        if name not in able:
            raise ConfigError(
                f"{name!r} cannot be gated: it is no convolution without groups that runs once. "
                f"{did_you_mean(name, list(able))}"
            )
    gates = {}
    for name in wanted:
        conv = cast("nn.Conv2d", model.get_submodule(name))
        gates[name] = ChannelGate(conv.in_channels, conv.out_channels, gating)
    made = {}
    for name in wanted:
        conv, behind = cast("nn.Conv2d", model.get_submodule(name)), able[name]
        norm = nn.Identity() if behind is None else model.get_submodule(behind)
        if behind is not None:
            model.set_submodule(behind, nn.Identity())
        made[name] = GatedConv2d(conv, norm, gates[name]).train(conv.training)
        model.set_submodule(name, made[name])
    return made


def gates(model: nn.Module) -> dict[str, ChannelGate]:
    """The model's gates, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ChannelGate)}


def with_gate_penalty(
    model: nn.Module, loss: Callable[[Any, Any], Tensor], strength: float
) -> Callable[[Any, Any], Tensor]:
    """`loss` plus `strength` times the mean saliency of all gates, where the model is in training mode.

    The penalty pushes factors towards zero that the loss does not need.
    """
    found = list(gates(model).values())
    if not found:
        raise AutopruneError("the model has no gates: call gate_channels_ first.")

    def penalised(output: Any, target: Any) -> Tensor:
        value = loss(output, target)
        if not model.training:
            return value
        return value + strength * torch.stack([gate.penalty() for gate in found]).mean()

    return penalised


def live_shares(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Which share of its groups each gate keeps for each input, ``(batch,)``; by the gate's name."""
    shares: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _given, factors: shares.__setitem__(name, (factors != 0).float().mean(dim=1))

    handles = [gate.register_forward_hook(remember(name)) for name, gate in gates(model).items()]
    try:
        with eval_mode(model), torch.inference_mode():
            call_with(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return shares
