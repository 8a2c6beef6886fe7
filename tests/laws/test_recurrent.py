"""Laws of LSTMs and GRUs: stepwise, whole, packed in a program or as a module, they compute what torch's own do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

from autoprune.model.recurrent.cells import cut_state
from autoprune.model.recurrent.modules import WholeSequences, cut_states_, run_stepwise
from autoprune.model.recurrent.names import GATES, by_gate, by_unit, cell_of, layers_of
from autoprune.repack import ProgramModel, repack
from autoprune.repack.graph.capture import capture
from autoprune.repack.graph.passes import simplify
from autoprune.repack.graph.reference import reference
from autoprune.repack.kernels.compiler import narrowed
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.model import packable
from autoprune.repack.modules.sequences import PackedRecurrent
from autoprune.repack.runtime.program import Program
from autoprune.repack.tuning.tuning import TuningCache

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}


class Case:
    """A recurrent module with zeros in its weights, and what it is called with."""

    def __init__(self, draw: st.DrawFn) -> None:
        kind: Any = draw(st.sampled_from([nn.LSTM, nn.GRU]))
        self.hidden, self.features = draw(st.integers(1, 40)), draw(st.integers(1, 9))
        self.batch_first = draw(st.booleans())
        torch.manual_seed(draw(st.integers(0, 2**20)))
        self.module = kind(
            self.features, self.hidden, draw(st.integers(1, 2)), bias=draw(st.booleans()),
            batch_first=self.batch_first, bidirectional=draw(st.booleans()),
        ).eval()  # fmt: skip
        self.size = draw(st.sampled_from([1, 2, 4, 8, 16]))
        sparsity = draw(st.sampled_from([0.0, 0.5, 0.9]))
        cell = cell_of(self.module)
        assert cell is not None
        with torch.no_grad():
            for layer in layers_of(self.module).values():
                rows = -(-len(layer.weight) // self.size)
                kept = (torch.rand(rows, layer.weight.shape[1]) >= sparsity).repeat_interleave(self.size, 0)
                layer.weight.mul_(by_gate(kept[: len(layer.weight)], GATES[cell])).mul_(2.0)
        self.silent = draw(st.booleans()) and self.hidden > 2
        if self.silent:
            silence_(self.module, [1])
        self.cut: dict[str, Any] = draw(st.sampled_from([{}, {}, {"threshold": 0.1}, {"keep": 0.3}]))
        if self.cut:
            cut_states_(self.module, **self.cut)
        self.begins = draw(st.booleans())

    def inputs(self, batch: int, steps: int) -> tuple[Tensor, Any]:
        """A batch of sequences and the states before them."""
        shape = (batch, steps) if self.batch_first else (steps, batch)
        module = self.module
        before = torch.randn(module.num_layers * (1 + module.bidirectional), batch, self.hidden)
        hx = (before, torch.randn_like(before)) if isinstance(module, nn.LSTM) else before
        return torch.randn(*shape, self.features), hx if self.begins else None


def silence_(module: nn.Module, units: list[int]) -> None:
    """Makes units whose state is always 0."""
    cell = cell_of(module)
    assert cell is not None
    with torch.no_grad():
        for parameter in module.parameters():
            turned = by_unit(parameter, GATES[cell]).unflatten(0, (-1, GATES[cell]))
            turned[units] = 0.0
            parameter.copy_(by_gate(turned.flatten(0, 1), GATES[cell]))


cases = st.composite(Case)
sizes = st.tuples(st.integers(1, 14), st.integers(1, 5))


def same(one: Any, other: Any) -> None:
    leaves = [tree_leaves(each) for each in (one, other)]
    assert len(leaves[0]) == len(leaves[1])
    for a, b in zip(*leaves, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, **CLOSE)


@given(case=cases(), size=sizes)
@torch.no_grad()
def test_stepwise_and_whole_are_torchs_own(case: Case, size: tuple[int, int]) -> None:
    x, hx = case.inputs(*size)
    wanted = case.module(x, hx)
    same(run_stepwise(case.module, x, hx), wanted)
    same(WholeSequences(case.module)(x, hx), wanted)


@pytest.mark.slow
@settings(max_examples=30)
@given(case=cases(), lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), ordered=st.booleans())
@torch.no_grad()
def test_packed_sequences_are_torchs_own(case: Case, lengths: list[int], ordered: bool) -> None:
    lengths = sorted(lengths, reverse=True) if ordered else lengths
    x, hx = case.inputs(len(lengths), max(lengths))
    packed = pack_padded_sequence(x, torch.tensor(lengths), case.batch_first, enforce_sorted=ordered)
    wanted = case.module(packed, hx)
    assert isinstance(wanted[0], PackedSequence)
    for module in (WholeSequences(case.module), PackedRecurrent.of(case.module)):
        same(module(packed, hx), wanted)
    same(run_stepwise(case.module, packed, hx), wanted)


@pytest.mark.slow
@settings(max_examples=30, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(case=cases(), size=sizes, more=sizes, data=st.data())
@torch.no_grad()
def test_a_program_is_the_masked_module(
    case: Case, size: tuple[int, int], more: tuple[int, int], data: st.DataObject
) -> None:
    """Whatever the vector width, the groups, the way of walking the weight, the batch, the steps, the threads."""
    x, hx = case.inputs(*size)
    given_ = (x,) if hx is None else (x, *(hx if isinstance(hx, tuple) else (hx,)))
    module = Flat(case.module)
    graph = simplify(capture(module, given_))
    recurrent = [op for op in graph.ops if op.kind == "recurrent"]
    assert recurrent
    assert all(op.attributes["interleaved"] for op in recurrent)
    if case.silent and hx is None:
        assert all(op.attributes["units"] is not None and 1 not in op.attributes["units"] for op in recurrent)
    same(reference(graph, given_), module(*given_))
    layers = packable(graph)
    size_ = data.draw(st.sampled_from([case.size, 1, 16]))
    weights = {name: layer.pack(size_) for name, layer in layers.items()}
    threads = data.draw(st.integers(1, 3))
    tilings = {
        name: Tiling(
            size_, data.draw(st.integers(1, 8)), data.draw(st.integers(0, 3)), columns=data.draw(st.booleans())
        )
        for name in layers
    }
    lanes = data.draw(st.sampled_from([4, 8, 16]))
    program = Program(graph, weights, tilings, threads, narrowed(lanes))
    same(program(*given_), module(*given_))
    x, hx = case.inputs(*more)
    given_ = (x,) if hx is None else (x, *(hx if isinstance(hx, tuple) else (hx,)))
    same(program(*given_), module(*given_))


class Flat(nn.Module):
    """The module with states as arguments of their own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> Any:
        return self.module(x, h if c is None else (h, c))


@settings(max_examples=10, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(case=cases(), size=sizes)
@torch.no_grad()
def test_repacked_is_masked(case: Case, size: tuple[int, int]) -> None:
    x, hx = case.inputs(*size)
    if hx is not None:
        return
    fast = repack(Flat(case.module), (x,), cache=TuningCache(), threads=1)
    assert isinstance(fast, ProgramModel)
    same(fast(x), Flat(case.module)(x))
    assert {row.name.split(".")[-1] for row in fast.report} == set(layers_of(case.module))
    assert all(row.backend == "jit" for row in fast.report)


@given(state=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20), keep=st.integers(1, 20))
def test_a_cut_state_keeps_the_largest(state: list[float], keep: int) -> None:
    values = torch.tensor(state)
    keep = min(keep, len(state))
    cut = cut_state(values, 0.0, keep)
    least = values.abs().sort(descending=True).values[keep - 1]
    assert torch.equal(cut, torch.where(values.abs() >= least, values, 0.0))
    trained = values.clone().requires_grad_()
    training = cut_state(trained, 0.0, keep)
    assert torch.equal(training, cut)
    training.sum().backward()
    assert trained.grad is not None
    assert torch.equal(trained.grad, torch.ones_like(values))  # straight through


@pytest.mark.parametrize("gates", [1, 3, 4])
def test_orders_of_gates_undo_each_other(gates: int) -> None:
    values = torch.arange(24.0).reshape(12, 2)
    assert torch.equal(by_gate(by_unit(values, gates), gates), values)
    if gates > 1:
        assert torch.equal(by_unit(values, gates)[:gates], values[:: 12 // gates])


@pytest.mark.slow
@settings(max_examples=15)  # what a copy shares with its original does not hang on sizes
@given(case=cases(), size=sizes)
@torch.no_grad()
def test_a_copy_and_the_original_run_side_by_side(case: Case, size: tuple[int, int]) -> None:
    packed = PackedRecurrent.of(case.module)
    x, hx = case.inputs(*size)
    wanted = case.module(x, hx)
    same(packed(x, hx), wanted)
    same(copy.deepcopy(packed)(x, hx), wanted)
