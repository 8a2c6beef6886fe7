"""What `repack` returns: a model called like the original, and a row a layer that says what became of it."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.repack.graph.calls import Signature, restored
from autoprune.repack.runtime.bound import Bound
from autoprune.repack.runtime.program import Program

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
        precision: of its work: ``float32``, ``bf16`` or ``int8``.
        scale, zero_point: of its input's bytes; None unless it is int8.
        snr_db: how far the rounding error lies below its output, decibels; None in float32.
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
    precision: str = "float32"
    scale: float | None = None
    zero_point: int | None = None
    snr_db: float | None = None


def unreached(name: str, kind: str, why: str) -> LayerReport:
    """The row of a part whose layers cannot be seen."""
    return LayerReport(name, kind, 0.0, 1, DENSE, None, None, "", why)


class RepackedModel(nn.Module):
    """A repacked model, called like the original; inference only, float32 in and out, on the CPU.

    What would move it, convert it or make it learn is an error; what leaves it as it is (``to("cpu")``, ``float()``,
    ``eval()``, ``share_memory()``) does nothing.

    Attributes:
        report: a row a layer.
        summary: what became of the whole where it is no program: why, and what is gained.
        device: the CPU, for code that asks.
        dtype: float32, likewise.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, report: Sequence[LayerReport]) -> None:
        super().__init__()
        self.report = tuple(report)
        self.summary = ""

    def __getattr__(self, name: str) -> Any:
        """The original's own methods and attributes, such as ``generate`` and ``config``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            own = self._own()
            if own is None or name.startswith("__"):
                raise
        return getattr(own, name)

    def _own(self) -> nn.Module | None:
        """The original's code with packed layers in it, whose methods are those of the repacked model."""
        return None

    def train(self, mode: bool = True) -> RepackedModel:
        """Stays in eval mode: its norms are folded and its layers cannot be trained."""
        super().train(False)
        return self

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that are not packed; if there is none an empty one, for code that asks it for its device."""
        own = list(super().named_parameters(prefix, recurse, remove_duplicate))
        empty = nn.Parameter(torch.empty(0, dtype=self.dtype), requires_grad=False)
        yield from own or [(f"{prefix}.packed".lstrip("."), empty)]

    def requires_grad_(self, requires_grad: bool = True) -> RepackedModel:
        """Raises AutopruneError where gradients are asked for."""
        if requires_grad:
            raise AutopruneError("a repacked model is for inference: train the model it was made of, and repack that.")
        super().requires_grad_(False)
        return self

    def bound_call(self, *inputs: Any) -> Callable[[], object]:
        """A call on these very inputs, with as little of Python around it as there can be: what is timed."""
        return partial(self, *inputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RepackedModel:
        """What `to`, `half`, `cuda` and the like do to every tensor."""
        try:
            moved = fn(torch.empty(0, dtype=self.dtype))
        except Exception as error:  # torch raises what it likes where there is no such device
            raise AutopruneError(
                f"a repacked model runs in float32 on the CPU and cannot be moved: {error}."
            ) from error
        if moved.dtype != self.dtype or moved.device != self.device:
            raise AutopruneError(
                f"a repacked model runs in float32 on the CPU, not in {moved.dtype} on {moved.device}: move or convert "
                "the model it was made of."
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class Sealed(RepackedModel):
    """A repacked model that can be called, no more: it has none of the original's modules and no state dict."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises AutopruneError: there is none."""
        raise AutopruneError(
            "a repacked program has no state dict, its weights are packed: write it with autoprune.save(fast, path), "
            "or take the state dict of the model it was made of."
        )

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises AutopruneError: weights are packed once."""
        raise AutopruneError(
            "a repacked program takes no state dict, its weights are packed: read one with autoprune.load(path), or "
            "load the state dict into the model it was made of and repack that."
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Not as a decorator: that would load torch's compiler, which takes longer than torch, with every import of
        # autoprune; and a call through it costs as much as a small model takes.
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(self._call)(*args, **kwargs)
        if torch._C._is_tracing():  # what is computed by no operator of torch's would be taken for a constant
            raise AutopruneError(
                "a repacked program cannot be traced: trace the model it was made of, or repack with form='modules'."
            )
        return self._call(*args, **kwargs)

    @abstractmethod
    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""


class ProgramModel(Sealed):
    """A model as a whole program: one native call an inference. Several threads may call it.

    Attributes:
        program: what runs; it follows ``torch.set_num_threads`` unless it was made for a number of threads.
        signature: how it is called.
        classes: of the records and dictionaries it returns, in order; a program from a file has none, and returns
            `Record` and plain dictionaries.
    """

    def __init__(
        self,
        program: Program,
        report: Sequence[LayerReport],
        signature: Signature,
        classes: Sequence[Callable[..., Any]] = (),
    ) -> None:
        super().__init__(report)
        self.program, self.signature, self.classes = program, signature, tuple(classes)
        self._methods: tuple[nn.Module, ...] = ()  # in a tuple: it is no part of this module
        self.eval()

    def with_methods(self, own: nn.Module) -> ProgramModel:
        """Itself, with the methods and attributes of `own`, whose calls run the program wherever it takes them."""
        own.forward = _Forward(self, own)
        self._methods = (own,)
        return self

    def takes(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the program takes such a call."""
        try:
            self.program.plan_for(tuple(self.signature.tensors(args, kwargs)))
        except AutopruneError:
            return False
        return True

    def _own(self) -> nn.Module | None:
        return next(iter(self.__dict__.get("_methods", ())), None)

    def bind(self, *args: Any, **kwargs: Any) -> Bound:
        """The program on tensors that stay the same, for models that are called very often with little to do.

        Args:
            args: as the model is called; copied, see `Bound.inputs`.
            kwargs: likewise.

        Raises:
            AutopruneError: the program does not take them.
        """
        inputs = tuple(self.signature.tensors(args, kwargs))
        return Bound(self.program.plan_for(inputs), inputs, self._restored)

    def bound_call(self, *inputs: Any) -> Callable[[], object]:
        return self.bind(*inputs)

    def by_place(self, *tensors: Tensor) -> Any:
        """What the model returns for the graph's inputs."""
        return self._restored(self.program(*tensors))

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or not self.signature.plain or len(args) != len(self.signature.parameters):
            args = tuple(self.signature.tensors(args, kwargs))
        return self._restored(self.program(*args))

    def _restored(self, output: Any) -> Any:
        return restored(output, iter(self.classes)) if self.classes else output


class _Forward:
    """The forward of a model's own code: the program, or that code for a call that the program does not take."""

    def __init__(self, made: ProgramModel, own: nn.Module) -> None:
        self._made, self._model = made, own
        self.__signature__ = inspect.signature(own.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._made.takes(*args, **kwargs):
            return self._made(*args, **kwargs)
        return type(self._model).forward(self._model, *args, **kwargs)


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

    def _own(self) -> nn.Module | None:
        own: nn.Module | None = self.__dict__.get("_modules", {}).get("model")
        return own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)
