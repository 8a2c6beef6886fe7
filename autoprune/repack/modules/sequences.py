"""A drop-in for an LSTM or GRU with packed weights: called like the module it replaces, inference only.

Takes what a captured model cannot hold, packed sequences above all. Each direction of each layer is a program of two
operations: the projection of the input and the recurrence.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from autoprune.errors import AutopruneError
from autoprune.model.recurrent.cells import run_directions
from autoprune.model.recurrent.modules import run_whole, state_cut
from autoprune.model.recurrent.names import GATES, by_unit, cell_of, layers_of
from autoprune.repack.graph.ir import Graph, Input
from autoprune.repack.graph.ops import Linear, Recurrent
from autoprune.repack.graph.passes import simplify
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.modules.layers import check_input
from autoprune.repack.runtime.program import Program
from autoprune.repack.weights.packed import PackedWeight, pack


class PackedRecurrent(nn.Module):
    """An LSTM or GRU with any number of layers and directions; its states cut where the module's are.

    Args:
        module: of which the settings are taken; left as it is.
        packs: weight name -> packed, a unit's gates side by side.
        biases: bias name -> ``(gates * hidden,)`` as torch has them.
    """

    def __init__(
        self, module: nn.LSTM | nn.GRU, packs: Mapping[str, PackedWeight], biases: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self._settings = [copy.deepcopy(module).to("meta")]  # in a list: nothing of it belongs to the state dict
        self.packs, self.biases = dict(packs), dict(biases)
        self._programs: dict[tuple[str, bool, int], Program] = {}

    @classmethod
    def of(cls, module: nn.LSTM | nn.GRU) -> PackedRecurrent:
        """Packs a module whose weights hold zeros."""
        gates = _gates(module)
        packs = {name: pack(by_unit(layer.weight.detach(), gates)) for name, layer in layers_of(module).items()}
        biases = {name: value.detach().clone() for name, value in module.named_parameters() if name.startswith("bias")}
        return cls(module, packs, biases)

    @property
    def settings(self) -> nn.LSTM | nn.GRU:
        """The module it stands for, without its weights."""
        return self._settings[0]

    def forward(self, input: Any, hx: Any = None) -> Any:  # named as torch names it
        call = (
            torch.compiler.disable(self._call) if torch.compiler.is_dynamo_compiling() else self._call
        )  # see ProgramModel
        return call(input, hx)

    def _call(self, input: Any, hx: Any) -> Any:
        given = input.data if isinstance(input, PackedSequence) else input
        for x in (given, *([] if hx is None else hx if isinstance(hx, (tuple, list)) else [hx])):
            check_input(x)
        if given.dim() not in (1, 2, 3) or given.shape[-1] != self.settings.input_size or not given.numel():
            raise AutopruneError(
                f"this layer takes sequences of {self.settings.input_size} features, not shape {tuple(given.shape)}."
            )

        def sequence(suffix: str, x: Tensor, h: Tensor | None, c: Tensor | None, lengths: Tensor | None) -> Tensor:
            begin = tuple(each for each in (h, c) if each is not None)

            def run(x: Tensor, reverse: bool) -> Tensor:
                return self._run(suffix, reverse, (x, *begin))

            return run_whole(run, self.settings, suffix, x, lengths)

        return run_directions(self.settings, input, hx, sequence)

    def _run(self, suffix: str, reverse: bool, given: tuple[Tensor, ...]) -> Tensor:
        key = (suffix, reverse, len(given))
        program = self._programs.get(key)
        if program is None:  # two threads may both make it, alike
            program = self._programs[key] = self._program(*key)
        states: Tensor = program.whole_plan(tuple(tuple(x.shape) for x in given)).run(given)
        return states

    def _program(self, suffix: str, reverse: bool, inputs: int) -> Program:
        """One direction of one layer: from its input, and the states before it, to its states (and cells)."""
        module, cut, names = self.settings, state_cut(self.settings), ("x", "h", "c")[:inputs]
        weights = [self.packs[f"weight_{part}_{suffix}"].unpack() for part in ("ih", "hh")]
        constants = {"input": weights[0], "state": weights[1]}
        tensors: list[dict[str, str]] = [{"weight": "input"}, {"weight": "state"}]
        if module.bias:
            for role, part, of in (("input", "ih", tensors[0]), ("state", "hh", tensors[1])):
                of["bias"] = f"{role} bias"
                constants[f"{role} bias"] = by_unit(self.biases[f"bias_{part}_{suffix}"], _gates(module))
        recurrent = Recurrent(
            "states", ("gates", *names[1:]), tensors[1], cell=_cell(module), time_first=not module.batch_first,
            reverse=reverse, units=None, threshold=cut.threshold, keep=cut.kept(module.hidden_size), interleaved=True,
        )  # fmt: skip
        ops = (Linear("gates", ("x",), tensors[0], activation=None), recurrent)
        shapes = {"x": (1, 1, weights[0].shape[1]), "h": (1, module.hidden_size), "c": (1, module.hidden_size)}
        graph = simplify(Graph(tuple(Input(name, shapes[name], "float32") for name in names), ops, "states", constants))
        packed, tilings = {}, {}
        for op in graph.ops:
            weight, bias = graph.constants[op.tensors["weight"]], graph.constants.get(op.tensors.get("bias", ""))
            packed[op.output] = Weights.of(pack(weight), bias)
            skips = isinstance(op, Recurrent) and (cut.threshold > 0.0 or cut.keep < 1.0)
            tilings[op.output] = Tiling(packed[op.output].packed.group_size, columns=skips)
        light = {name: value.to("meta") if value.dim() == 2 else value for name, value in graph.constants.items()}
        return Program(replace(graph, constants=light), packed, tilings)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_programs": {}}  # a copy makes its own


def _cell(module: nn.Module) -> str:
    cell = cell_of(module)
    assert cell is not None
    return cell


def _gates(module: nn.Module) -> int:
    return GATES[_cell(module)]
