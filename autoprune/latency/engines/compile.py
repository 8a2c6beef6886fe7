"""torch.compile with freezing: inductor folds constants and lays weights out for the processor."""

from __future__ import annotations

import shutil
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.latency.engines.base import Call, DenseEngine, Inputs
from autoprune.latency.engines.eager import torch_call
from autoprune.tracing import tracing

INSTALL = "sudo apt install g++ (or your system's C++ compiler)"


class Compile(DenseEngine):
    """torch.compile's inductor, which needs a C++ compiler."""

    def available(self) -> str | None:
        import torch._inductor.config as inductor

        return None if any(name and shutil.which(name) for name in inductor.cpp.cxx) else INSTALL

    def _compile(self, model: nn.Module, inputs: Inputs, threads: int, calibration: Sequence[Inputs]) -> Call:
        import torch._inductor.config as inductor

        try:
            with tracing(), inductor.patch(freezing=True):
                compiled = torch.compile(_own_function(model.requires_grad_(False)))
                copies = tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)  # the model may write to them
                torch_call(compiled, copies, threads)()  # compiles
        except Exception as error:  # inductor, the C++ compiler, or the model's own Python
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise AutopruneError(
                f"torch.compile cannot run this model: {lines[0]}. Leave the engine 'compile' out."
            ) from error
        return torch_call(compiled, inputs, threads)


def _own_function(model: nn.Module) -> Callable[..., object]:
    """A function that calls `model` and shares its code with no other.

    What is compiled is kept with the code, and after a few entries torch stops compiling that code without a word.
    """

    def call(*inputs: Any) -> object:
        return model(*inputs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
