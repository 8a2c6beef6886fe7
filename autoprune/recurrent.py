"""LSTM and GRU as Linear layers around a cell: what is pruned of them, watched, trained with sparse states and packed.

torch runs a recurrent module as one operator, its weights out of sight. Here a module can be run as what it is: one
Linear a direction and layer over the whole sequence (``weight_ih``), one a step (``weight_hh``), and the cell between
them. States may be cut at every step, so that a packed model skips the columns of ``weight_hh`` they would have met
(Ardakani et al. 2018, "Learning to skip ineffectual recurrent computations in LSTMs").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from autoprune.errors import ConfigError

GATES: Mapping[str, int] = {"lstm": 4, "gru": 3}
"""Rows of a recurrent weight a unit: input, forget, cell, output; reset, update, new."""

_WEIGHT = re.compile(r"weight_([ih])h_l\d+(_reverse)?")

LinearCall = Callable[[str, Tensor], Tensor]
"""(name of a weight in its module, input) -> input times the weight, plus its bias."""


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
    return {name: _as_linear(module, name) for name, _ in module.named_parameters() if _WEIGHT.fullmatch(name)}


def layer_at(model: nn.Module, name: str) -> nn.Module:
    """The module called `name`, or a Linear that shares the recurrent weight called so."""
    place = split_name(name)
    if place is None or cell_of(model.get_submodule(place[0])) is None:
        return model.get_submodule(name)
    return _as_linear(model.get_submodule(place[0]), place[1])


def _as_linear(module: nn.Module, name: str) -> nn.Linear:
    weight = cast("nn.Parameter", getattr(module, name))
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = weight
    linear.register_parameter("bias", getattr(module, name.replace("weight", "bias"), None))
    return linear


# Order of the gates --------------------------------------------------------------------------------------------------


def by_unit(values: Tensor, gates: int) -> Tensor:
    """Rows ``(gates * units, ...)``, a gate's units together as torch has them -> a unit's gates together."""
    return values if gates == 1 else values.unflatten(0, (gates, -1)).transpose(0, 1).flatten(0, 1)


def by_gate(values: Tensor, gates: int) -> Tensor:
    """The opposite of `by_unit`."""
    return values if gates == 1 else values.unflatten(0, (-1, gates)).transpose(0, 1).flatten(0, 1)


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
        for name, value, fine in (
            ("threshold", self.threshold, "a number >= 0"),
            ("keep", self.keep, "a number in (0, 1]"),
        ):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not (0.0 <= value < float("inf") if name == "threshold" else 0.0 < value <= 1.0):
                raise ConfigError(f"the {name} of a state must be {fine}, not {value!r}.")
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


def run_stepwise(
    module: nn.LSTM | nn.GRU, x: Any, hx: Any = None, linear: LinearCall | None = None, cut: StateCut | None = None
) -> tuple[Any, Any]:
    """What the module computes, a step at a time, through calls of its Linear layers; its states cut, if it cuts them.

    Args:
        module: an LSTM or GRU without projections.
        x: as the module takes it: a sequence, a batch of them or a PackedSequence.
        hx: likewise.
        linear: computes the Linear layers.
        cut: of the states; the module's own when None.
    """
    cell, pruned = cell_of(module), cut or state_cut(module)
    assert cell is not None

    def own(name: str, given: Tensor) -> Tensor:
        return functional.linear(given, getattr(module, name), getattr(module, name.replace("weight", "bias"), None))

    call = linear or own

    def sequence(suffix: str, x: Tensor, h: Tensor | None, c: Tensor | None, lengths: Tensor | None) -> Tensor:
        return run_steps(
            call(f"weight_ih_{suffix}", x), lambda state: call(f"weight_hh_{suffix}", state), h, c, cell=cell,
            time_first=not module.batch_first, reverse=suffix.endswith("_reverse"), threshold=pruned.threshold,
            keep=pruned.kept(module.hidden_size), lengths=lengths,
        )  # fmt: skip

    return run_directions(module, x, hx, sequence)


class WholeSequences(nn.Module):
    """Stands in for a recurrent module where it is captured: one operator a direction and layer.

    The parameters are the module's own, under their names.
    """

    def __init__(self, module: nn.LSTM | nn.GRU) -> None:
        super().__init__()
        self._module = [module]  # not a submodule: the parameters keep their names
        for name, parameter in module.named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, x: Any, hx: Any = None) -> tuple[Any, Any]:
        module = self._module[0]
        cell, cut = cell_of(module), state_cut(module)
        assert cell is not None

        def sequence(suffix: str, x: Tensor, h: Tensor | None, c: Tensor | None, lengths: Tensor | None) -> Tensor:
            weights = [getattr(self, f"weight_{part}_{suffix}") for part in ("ih", "hh")]
            biases = [getattr(self, f"bias_{part}_{suffix}", None) for part in ("ih", "hh")]

            def run(x: Tensor, reverse: bool) -> Tensor:
                gates = functional.linear(x, weights[0], biases[0])
                states: Tensor = recurrent(
                    gates, weights[1], biases[1], h, c, cell, not module.batch_first, reverse, cut.threshold,
                    cut.kept(module.hidden_size),
                )  # fmt: skip
                return states

            return run_whole(run, module, suffix, x, lengths)

        return run_directions(module, x, hx, sequence)


def run_whole(
    run: Callable[[Tensor, bool], Tensor], module: nn.LSTM | nn.GRU, suffix: str, x: Tensor, lengths: Tensor | None
) -> Tensor:
    """One direction by ``run(x, reverse)``, which knows no lengths: sequences of different ones are turned for it."""
    reverse = suffix.endswith("_reverse")
    if not reverse or lengths is None:
        return run(x, reverse)
    time = int(module.batch_first)
    return torch.stack([_turned(each, time, lengths) for each in run(_turned(x, time, lengths), False)])


def _turned(values: Tensor, time: int, lengths: Tensor) -> Tensor:
    """Each sequence's real steps in the opposite order."""
    values = values.transpose(0, 1) if time == 0 else values
    steps = torch.arange(values.shape[1])
    places = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)
    values = values.gather(1, places[..., None].expand_as(values))
    return values.transpose(0, 1) if time == 0 else values


def recurrent_modules(model: nn.Module) -> Iterator[tuple[str, nn.LSTM | nn.GRU]]:
    """Every LSTM and GRU that can be run here, by qualified name."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.LSTM, nn.GRU)) and cell_of(module) is not None:
            yield name, module


# Sparse states -------------------------------------------------------------------------------------------------------


class _SparseState(nn.RNNBase):
    """Cuts its states at every step, in training as in use; see `cut_states_`."""

    cut: StateCut
    over: int

    def forward(self, x: Any, hx: Any = None) -> Any:
        return run_stepwise(cast("nn.LSTM | nn.GRU", self), x, hx, cut=self._present_cut())

    def _present_cut(self) -> StateCut:
        """The cut of this call; counts the calls in training while the cut deepens."""
        if not self.training or not self.over:
            return self.cut
        steps = cast("Tensor", self.cut_steps)
        progress = int(steps) / self.over
        steps += 1
        return self.cut.part(progress)


class SparseStateLSTM(_SparseState, nn.LSTM):
    """An LSTM that cuts its states."""


class SparseStateGRU(_SparseState, nn.GRU):
    """A GRU that cuts its states."""


_SPARSE: Mapping[str, type[nn.Module]] = {"lstm": SparseStateLSTM, "gru": SparseStateGRU}


def state_cut(module: nn.Module) -> StateCut:
    """How a recurrent module cuts its states, training apart."""
    return module.cut if isinstance(module, _SparseState) else NO_CUT


def cut_states_(model: nn.Module, *, threshold: float = 0.0, keep: float = 1.0, over: int = 0) -> nn.Module:
    """Makes every LSTM and GRU of `model` set the small entries of its states to zero at every step, in place.

    Train the model on: it learns to do with the states that are left. Repacked, it skips the columns of ``weight_hh``
    that zeros would have met. Parameters and their names stay as they are. Called again, it changes the cut.

    Args:
        model: any module with an ``nn.LSTM`` or ``nn.GRU`` in it.
        threshold: entries smaller in size become zero; >= 0.
        keep: in place of it: the share of the entries, the largest, that stay, in (0, 1].
        over: calls in training over which the cut deepens from nothing to this, along a cubic; a trained model that
            loses most of its states at once hardly recovers. The module counts them in a buffer, ``cut_steps``. 0:
            the whole cut at once. In eval mode it is always the whole one.

    Raises:
        ConfigError: a number out of range, both given, or no recurrent module to cut.
    """
    cut = StateCut(threshold, keep)
    if not isinstance(over, int) or isinstance(over, bool) or over < 0:
        raise ConfigError(f"the cut of states deepens over a whole number of calls >= 0, not {over!r}.")
    found = list(recurrent_modules(model))
    if not found:
        raise ConfigError("this model has no nn.LSTM or nn.GRU (without projections) whose states could be cut.")
    for _, module in found:
        cell = cell_of(module)
        assert cell is not None
        sparse: Any = module
        sparse.__class__ = _SPARSE[cell]
        sparse.cut, sparse.over = cut, over
        if over:
            sparse.register_buffer("cut_steps", torch.zeros((), dtype=torch.int64))
    return model
