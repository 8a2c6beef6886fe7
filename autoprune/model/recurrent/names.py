"""Names of a recurrent module's weights, and the layers they are pruned as."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import cast

from torch import Tensor, nn

GATES: Mapping[str, int] = {"lstm": 4, "gru": 3}


_WEIGHT = re.compile(r"weight_([ih])h_l\d+(_reverse)?")


LinearCall = Callable[[str, Tensor], Tensor]


def cell_of(module: nn.Module) -> str | None:
    """``lstm`` or ``gru``; None for any other module, and for an LSTM with projections, which nothing here runs."""
    if isinstance(module, nn.LSTM):
        return "lstm" if module.proj_size == 0 else None
    return "gru" if isinstance(module, nn.GRU) else None


def split_name(name: str) -> tuple[str, str] | None:
    """``encoder.weight_hh_l0`` -> (``encoder``, ``weight_hh_l0``); None for what names no recurrent weight."""
    head, _, tail = name.rpartition(".")
    return (head, tail) if _WEIGHT.fullmatch(tail) else None


def partner_of(name: str) -> str | None:
    """The other weight of the same units: ``weight_hh_l0`` for ``weight_ih_l0``; None for other layers."""
    place = split_name(name)
    if place is None:
        return None
    other = place[1].replace("weight_i", "weight_h") if place[1][7] == "i" else place[1].replace("weight_h", "weight_i")
    return f"{place[0]}.{other}".lstrip(".")


def layers_of(module: nn.Module) -> dict[str, nn.Linear]:
    """The weights of a recurrent module as Linear layers that share its parameters, by name in the module."""
    return {name: as_linear(module, name) for name, _ in module.named_parameters() if _WEIGHT.fullmatch(name)}


def as_linear(module: nn.Module, name: str) -> nn.Linear:
    """A Linear that shares a parameter of `module`, ``(out, in)``, and the bias that is called alike."""
    weight = cast("nn.Parameter", getattr(module, name))
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = weight
    beside = name.replace("weight", "bias")
    linear.register_parameter("bias", getattr(module, beside, None) if beside != name else None)
    return linear


def by_unit(values: Tensor, gates: int) -> Tensor:
    """Rows ``(gates * units, ...)``, a gate's units together as torch has them -> a unit's gates together."""
    return values if gates == 1 else values.unflatten(0, (gates, -1)).transpose(0, 1).flatten(0, 1)


def by_gate(values: Tensor, gates: int) -> Tensor:
    """The opposite of `by_unit`."""
    return values if gates == 1 else values.unflatten(0, (-1, gates)).transpose(0, 1).flatten(0, 1)
