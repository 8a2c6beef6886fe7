"""LSTM and GRU as Linear layers around a cell: what is pruned of them, watched, trained with sparse states and packed.

torch runs a recurrent module as one operator, its weights out of sight. Here a module can be run as what it is: one
Linear a direction and layer over the whole sequence (``weight_ih``), one a step (``weight_hh``), and the cell between
them. States may be cut at every step, so that a packed model skips the columns of ``weight_hh`` they would have met
(Ardakani et al. 2018, "Learning to skip ineffectual recurrent computations in LSTMs").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from autoprune.checks import check_numbers
from autoprune.errors import ConfigError
from autoprune.model.recurrent.names import GATES, cell_of

"""Rows of a recurrent weight a unit: input, forget, cell, output; reset, update, new."""


"""(name of a weight in its module, input) -> input times the weight, plus its bias."""


# Order of the gates --------------------------------------------------------------------------------------------------


# Cells and states ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateCut:
    """Which entries of a state become zero at every step.

    Attributes:
        threshold: those smaller than it in size; >= 0.
        keep: all but this share of them, the largest in size, in (0, 1]; those as large as the last one stay too.
    """

    threshold: float = 0.0
    keep: float = 1.0

    def __post_init__(self) -> None:
        check_numbers("a cut of states", {"threshold": self.threshold}, 0.0)
        check_numbers("a cut of states", {"keep": self.keep}, 0.0, 1.0, "(]")
        if self.threshold > 0.0 and self.keep < 1.0:
            raise ConfigError("cut states by a threshold or by the share to keep, not by both.")

    def part(self, progress: float) -> StateCut:
        """The cut on its way, along a cubic: nothing at 0, itself at 1."""
        done = 1.0 - (1.0 - min(1.0, progress)) ** 3
        return StateCut(self.threshold * done, 1.0 - (1.0 - self.keep) * done)

    def kept(self, units: int) -> int:
        """How many of `units` entries a step keeps; 0 where nothing is cut by their number."""
        return 0 if self.keep >= 1.0 else max(1, round(self.keep * units))


NO_CUT = StateCut()


def cut_state(state: Tensor, threshold: float, keep: int) -> Tensor:
    """`state` ``(..., units)`` with zeros where it is small, or smaller than the `keep` largest.

    Its gradient is passed straight through (Ardakani et al. 2018): a unit that is cut learns what would make it useful.
    """
    if threshold <= 0.0 and keep == 0:
        return state
    size = state.detach().abs()
    least = size.topk(keep, dim=-1).values[..., -1:] if keep else threshold
    small = size < least
    if state.requires_grad:
        return state - state.detach().masked_fill(~small, 0.0)  # x - x is 0, x - 0 is x
    return state.masked_fill(small, 0.0)


def step_cell(cell: str, given: Tensor, learned: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One step of a cell.

    Args:
        cell: ``lstm`` or ``gru``.
        given: the input's projection, ``(batch, gates * units)``, a gate's units together, as torch orders them.
        learned: the state's, likewise.
        h: state before, ``(batch, units)``.
        c: of an LSTM, its cell before.

    Returns:
        State, and an LSTM's cell, after.
    """
    if cell == "lstm":
        assert c is not None
        opened, forgotten, new, shown = (given + learned).chunk(4, dim=-1)
        c = forgotten.sigmoid() * c + opened.sigmoid() * new.tanh()
        return shown.sigmoid() * c.tanh(), c
    (reset, update, new), (r, z, n) = given.chunk(3, dim=-1), learned.chunk(3, dim=-1)
    new = (new + (reset + r).sigmoid() * n).tanh()
    return new + (update + z).sigmoid() * (h - new), None


def run_steps(
    gates: Tensor, learn: Callable[[Tensor], Tensor], h: Tensor | None, c: Tensor | None, *, cell: str,
    time_first: bool, reverse: bool, threshold: float = 0.0, keep: int = 0, lengths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One direction of one layer, a step at a time.

    Args:
        gates: input projections, ``(steps, batch, gates * units)``, or batch first.
        learn: state -> its projection.
        h: state before the first step, ``(batch, units)``; zeros when None.
        c: cell before the first step, likewise.
        cell: ``lstm`` or ``gru``.
        time_first: whether steps are the first axis.
        reverse: from the last step to the first.
        threshold: of `cut_state`.
        keep: likewise.
        lengths: real steps of each sequence, ``(batch,)``: the state stays as it is in the others.

    Returns:
        States, ``(1, ...)`` shaped like `gates` but with ``units`` features; ``(2, ...)`` for an LSTM: and cells.
    """
    if not time_first:
        gates = gates.transpose(0, 1)
    units = gates.shape[-1] // GATES[cell]
    h = gates.new_zeros(gates.shape[1], units) if h is None else h
    c = torch.zeros_like(h) if c is None and cell == "lstm" else c
    states, cells = [], []
    order = range(len(gates) - 1, -1, -1) if reverse else range(len(gates))
    for step in order:
        after, carried = step_cell(cell, gates[step], learn(h), h, c)
        after = cut_state(after, threshold, keep)
        if lengths is not None:
            real = (lengths > step)[:, None]
            after = torch.where(real, after, h)
            carried = None if carried is None or c is None else torch.where(real, carried, c)
        h, c = after, carried
        states.append(h)
        if c is not None:
            cells.append(c)
    if reverse:
        states.reverse()
        cells.reverse()
    axis = 0 if time_first else 1
    return torch.stack([torch.stack(each, axis) for each in (states, cells) if each])


@torch.library.custom_op("autoprune::recurrent", mutates_args=())
def recurrent(
    gates: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor | None, c: Tensor | None, cell: str,
    time_first: bool, reverse: bool, threshold: float, keep: int,
) -> Tensor:  # fmt: skip
    """`run_steps` as one operator, which a captured model keeps whole."""
    return run_steps(
        gates.detach(), lambda state: functional.linear(state, weight.detach(), bias), h, c, cell=cell,
        time_first=time_first, reverse=reverse, threshold=threshold, keep=keep,
    )  # fmt: skip


@recurrent.register_fake
def _(
    gates: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor | None, c: Tensor | None, cell: str,
    time_first: bool, reverse: bool, threshold: float, keep: int,
) -> Tensor:  # fmt: skip
    batch = gates.shape[1] if time_first else gates.shape[0]
    for state in (h, c):
        torch._check(state is None or (state.shape[0] == batch and state.shape[1] == weight.shape[1]))
    return gates.new_empty((2 if cell == "lstm" else 1, gates.shape[0], gates.shape[1], weight.shape[1]))


# Whole modules -------------------------------------------------------------------------------------------------------

SequenceRun = Callable[[str, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]
"""(``l0``, ``l0_reverse``, ..., input, state and cell before, lengths) -> states, and cells."""


def run_directions(module: nn.LSTM | nn.GRU, x: Any, hx: Any, sequence: SequenceRun) -> tuple[Any, Any]:
    """Everything about a recurrent module but its directions: layers, layouts, dropout, packed sequences."""
    packed = x if isinstance(x, PackedSequence) else None
    lengths: Tensor | None = None
    if packed is not None:
        x, lengths = pad_packed_sequence(packed, batch_first=module.batch_first)
    single = x.dim() == 2  # one sequence without a batch
    axis = 0 if module.batch_first else 1
    if single:
        x = x.unsqueeze(axis)
    given = () if hx is None else (hx if isinstance(hx, (tuple, list)) else (hx,))
    before = [each.unsqueeze(1) if single else each for each in given]
    last: list[list[Tensor]] = []
    suffixes = ("", "_reverse") if module.bidirectional else ("",)
    for layer in range(module.num_layers):
        if layer and module.dropout and module.training:
            x = functional.dropout(x, module.dropout, True)
        outputs = []
        for suffix in suffixes:
            start = [each[len(last)] for each in before] + [None] * (2 - len(before))
            states = sequence(f"l{layer}{suffix}", x, start[0], start[1], lengths)
            last.append([_last(each, 1 - axis, bool(suffix), lengths) for each in states])
            outputs.append(_real(states[0], 1 - axis, lengths))
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    ends = tuple(_stacked([each[part] for each in last]) for part in range(len(last[0])))
    if single:
        x, ends = x.squeeze(axis), tuple(each.squeeze(1) for each in ends)
    if packed is not None and lengths is not None:
        x = _packed_like(packed, x, lengths, module.batch_first)
    return x, ends if cell_of(module) == "lstm" else ends[0]


def _stacked(values: list[Tensor]) -> Tensor:
    """Along a new first axis; of one value a view."""
    return values[0].unsqueeze(0) if len(values) == 1 else torch.stack(values)


def _last(states: Tensor, time: int, reverse: bool, lengths: Tensor | None) -> Tensor:
    """The state after a direction's last real step, ``(batch, units)``."""
    if reverse:
        return states.select(time, 0)
    if lengths is None:
        return states.select(time, -1)
    states = states.transpose(0, 1) if time == 0 else states  # (batch, steps, units)
    places = (lengths - 1)[:, None, None].expand(-1, 1, states.shape[2])
    return states.gather(1, places)[:, 0]


def _real(states: Tensor, time: int, lengths: Tensor | None) -> Tensor:
    """Zeros behind the end of each sequence."""
    if lengths is None:
        return states
    steps = torch.arange(states.shape[time])
    real = steps[:, None] < lengths if time == 0 else steps < lengths[:, None]
    return states * real[..., None]


def _packed_like(packed: PackedSequence, x: Tensor, lengths: Tensor, batch_first: bool) -> PackedSequence:
    """`x` packed in the very order of `packed`."""
    if packed.sorted_indices is not None:
        x = x.index_select(0 if batch_first else 1, packed.sorted_indices)
        lengths = lengths[packed.sorted_indices]
    data = pack_padded_sequence(x, lengths, batch_first=batch_first).data
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


# Sparse states -------------------------------------------------------------------------------------------------------
