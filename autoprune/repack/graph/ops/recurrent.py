"""One direction of one layer of an LSTM or GRU, all its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from autoprune.errors import FileError
from autoprune.model.recurrent.cells import run_steps
from autoprune.model.recurrent.names import GATES, by_gate
from autoprune.quantization.grid import Grid
from autoprune.repack.graph.ops.attributes import LARGEST, Count, Flag, is_number, is_rising, one_of, optional
from autoprune.repack.graph.ops.base import Roles, Values
from autoprune.repack.graph.ops.layer import LayerOp


def _is_threshold(value: Any) -> bool:
    return is_number(value) and 0.0 <= value <= LARGEST


STATES = Grid.of_range(-1.0, 1.0)
"""The grid of the states that meet an int8 weight. No step leaves them beyond -1 and 1: it needs no data."""


@dataclass(frozen=True, kw_only=True)
class Recurrent(LayerOp):
    """The states of all steps (and cells, of an LSTM): ``(1 or 2, batch, steps, hidden)``, or steps before the batch.

    With a scale for each row its weight is int8, and the state that meets it is rounded to the grid `STATES`. The
    states that are returned, and those that a GRU carries on, are not.

    Attributes:
        inputs: the projected inputs, a gate's rows behind another's, and the states to begin with where they are given.
        cell: ``lstm`` or ``gru``.
        time_first: whether steps come before the batch.
        reverse: whether the last step is the first.
        threshold: states smaller than this are not read.
        keep: how many states are read at most; 0 for all.
        units: those that are computed, in order; the others are 0. None for all.
        interleaved: whether a unit's gates are neighbours, in the weight and in the projected inputs.
    """

    kind = "recurrent"
    operands = (1, 3)
    roles: ClassVar[Roles] = {"weight": (2, True), "bias": (1, False), "scale": (1, False)}

    cell: Annotated[str, one_of(GATES)]
    time_first: Flag
    reverse: Flag
    threshold: Annotated[float, _is_threshold]
    keep: Count
    units: Annotated[tuple[int, ...] | None, optional(is_rising)]
    interleaved: Flag

    def met(self, values: Values) -> Tensor:
        """The state before each step, shaped like those after it, ``(batch, steps, hidden)`` or steps first."""
        states, axis = values[self.output][0], 0 if self.time_first else 1
        first = values[self.inputs[1]] if len(self.inputs) > 1 else torch.zeros_like(states.select(axis, 0))
        start, count = first.unsqueeze(axis), states.shape[axis] - 1
        if self.reverse:
            return torch.cat([states.narrow(axis, 1, count), start], axis)
        return torch.cat([start, states.narrow(axis, 0, count)], axis)

    def positions(self, shape: Sequence[int]) -> int:
        return math.prod(shape[1:3])

    def check(self, constants: Mapping[str, Tensor]) -> None:
        super().check(constants)
        rows, hidden = constants[self.tensors["weight"]].shape
        live = hidden if self.units is None else len(self.units)
        if rows != GATES[self.cell] * live or (self.units is not None and self.units[-1] >= hidden):
            raise FileError(f"{self} has a weight of shape {(rows, hidden)} for {live} units of {hidden}.")
        if self.keep > hidden:
            raise FileError(f"{self} keeps {self.keep} of {hidden} units.")
        if len(self.inputs) not in (1, 3 if self.cell == "lstm" else 2):
            raise FileError(f"{self} has {len(self.inputs)} inputs.")
        if self.units is not None and (len(self.inputs) > 1 or not self.interleaved):
            raise FileError(f"{self} leaves units out, and has a state to begin with or another order of its gates.")

    def evaluate(self, x: list[Any], w: Mapping[str, Tensor], values: Values) -> Tensor:
        gates, units = GATES[self.cell], None if self.units is None else list(self.units)
        given, weight, bias = x[0], w["weight"], w.get("bias")
        hidden = weight.shape[1]
        lead = (2 if self.cell == "lstm" else 1, *given.shape[:2])
        if given.is_meta:
            return torch.empty((*lead, hidden), dtype=given.dtype, device=given.device)
        if self.interleaved:
            given = given.unflatten(-1, (-1, gates)).transpose(-1, -2).flatten(-2)
            weight, bias = by_gate(weight, gates), None if bias is None else by_gate(bias, gates)
        live = weight if units is None else weight[:, units]
        keep = 0 if units is not None and self.keep >= len(units) else self.keep

        def learn(state: Tensor) -> Tensor:
            return F.linear(STATES.rounded(state) if "scale" in w else state, live, bias)

        states = run_steps(
            given, learn, *[*x[1:], None, None][:2], cell=self.cell, time_first=self.time_first, reverse=self.reverse,
            threshold=self.threshold, keep=keep,
        )  # fmt: skip
        if units is None:
            return states
        whole: Tensor = states.new_zeros((*lead, hidden))
        whole[..., units] = states
        return whole
