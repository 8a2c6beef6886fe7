"""Recurrent modules that run step by step, or whole, and those that cut their states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.checks import check_counts
from autoprune.errors import ConfigError
from autoprune.model.recurrent.cells import NO_CUT, StateCut, recurrent, run_directions, run_steps
from autoprune.model.recurrent.names import LinearCall, cell_of


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
    check_counts("a cut of states", {"over": over}, least=0)
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
