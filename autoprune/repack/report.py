"""What `repack` returns: a model called like the original, and a row a layer that says what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.repack.program.bound import Bound
from autoprune.repack.program.program import Program

DENSE = "dense"


@dataclass(frozen=True)
class LayerReport:
    """What became of one Conv2d or Linear.

    Attributes:
        sparsity: fraction of zeros in its weight.
        group_size: filters that share their kept positions, as packed.
        backend: what runs it; ``dense`` is torch's own layer.
        dense_us: microseconds a call of the dense layer, None when nothing was measured.
        packed_us: likewise of the fastest packed form.
        fused: what was folded into it: ``batch norm``, an activation, a sum, or nothing.
        why: the reason for the choice.
    """

    name: str
    kind: str
    sparsity: float
    group_size: int
    backend: str
    dense_us: float | None
    packed_us: float | None
    fused: str
    why: str


class RepackedModel(nn.Module):
    """A repacked model, called like the original; inference only.

    Attributes:
        report: a row a layer.
    """

    def __init__(self, report: Sequence[LayerReport]) -> None:
        super().__init__()
        self.report = tuple(report)

    def train(self, mode: bool = True) -> RepackedModel:
        """Stays in eval mode: its norms are folded and its layers cannot be trained."""
        super().train(False)
        return self


class ProgramModel(RepackedModel):
    """A model as a whole program: one native call an inference. Several threads may call it.

    Attributes:
        program: what runs; it follows ``torch.set_num_threads`` unless it was made for a number of threads.
    """

    def __init__(self, program: Program, report: Sequence[LayerReport]) -> None:
        super().__init__(report)
        self.program = program
        self.eval()

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        # Not as a decorator: that would load torch's compiler, which takes longer than torch, with every import of
        # autoprune; and a call through it costs as much as a small model takes.
        call = torch.compiler.disable(self._call) if torch.compiler.is_compiling() else self._call
        return call(*args, **kwargs)

    def bind(self, *inputs: Tensor) -> Bound:
        """The program on tensors that stay the same, for models that are called very often with little to do.

        Args:
            inputs: as the model is called; copied, see `Bound.inputs`.

        Raises:
            AutopruneError: the program does not take them.
        """
        return Bound(self.program.plan_for(inputs), inputs)

    def _call(self, *args: Tensor, **kwargs: Tensor) -> Any:
        if not kwargs and len(args) == len(self.program.graph.inputs):
            return self.program(*args)
        names = [each.name for each in self.program.graph.inputs]
        unknown = [name for name in kwargs if name not in names[len(args) :]]
        if unknown or len(args) + len(kwargs) != len(names):
            given = ", ".join([*(f"<{i}>" for i in range(len(args))), *kwargs]) or "nothing"
            raise AutopruneError(f"this model takes {', '.join(names)}, not {given}.")
        return self.program(*args, *(kwargs[name] for name in names[len(args) :]))


class SwappedModel(RepackedModel):
    """A model with packed layers in the places of its own.

    Attributes:
        model: the original's architecture with packed layers in it.
        relus: layer -> whether its backend applies the ReLU that followed it.
        removed: modules that became ``nn.Identity`` because they were folded or fused.
    """

    def __init__(
        self, model: nn.Module, report: Sequence[LayerReport], relus: Mapping[str, bool], removed: Sequence[str]
    ) -> None:
        super().__init__(report)
        self.model = model
        self.relus, self.removed = dict(relus), tuple(removed)
        self.eval().requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)
