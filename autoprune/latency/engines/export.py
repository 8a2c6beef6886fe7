"""A model as an ONNX file, and the engines that read one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.files import temporary_folder
from autoprune.latency.engines.base import Call, DenseEngine, Inputs
from autoprune.model.copies import own_copy
from autoprune.tracing import tracing

BATCH = "batch"  # what an extent that may be any is called in a file


class OnnxEngine(DenseEngine):
    """An engine that reads ONNX files."""

    def load(self, path: Path, inputs: Inputs, threads: int) -> Call:
        """Compiles a file for inputs of these very shapes; the call is that of `prepare`. The file may go away.

        Raises:
            AutopruneError: the engine cannot run the file.
        """
        with self.reasons():
            run = self._load(path, inputs, threads)
            run()
        return run

    @abstractmethod
    def _load(self, path: Path, inputs: Inputs, threads: int) -> Call:
        """`load`, which may raise whatever the engine raises."""

    def _compile(self, model: nn.Module, inputs: Inputs, threads: int, calibration: Sequence[Inputs]) -> Call:
        with onnx_file(model, inputs) as path:
            return self.load(path, inputs, threads)


@contextmanager
def onnx_file(model: nn.Module, inputs: Inputs, opset: int | None = None) -> Iterator[Path]:
    """Exports `model` for exactly these shapes; the file lasts as long as the block. `opset` None takes torch's own.

    Raises:
        AutopruneError: torch cannot export the model; the message carries torch's reason.
    """
    with temporary_folder() as folder:
        path = folder / "model.onnx"
        try:
            with tracing(), torch.inference_mode():
                apart = tuple(own_copy(x) if isinstance(x, Tensor) else x for x in inputs)  # one object were one input
                torch.onnx.export(model, apart, str(path), dynamo=True, verbose=False, opset_version=opset)
        except Exception as error:  # the exporter raises whatever the model's own Python raises
            lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
            raise AutopruneError(
                f"the model cannot be exported to ONNX: {lines[0]}. "
                "Leave the engines that read ONNX files out, or make torch.export accept the model."
            ) from error
        yield path


def arrays(inputs: Inputs, expected: int) -> list[NDArray[Any]]:
    """The example inputs as the engine's, in order; raises AutopruneError when they do not correspond."""
    if len(inputs) != expected or not all(isinstance(value, Tensor) for value in inputs):
        kinds = ", ".join(type(value).__name__ for value in inputs)
        raise AutopruneError(
            f"the exported model takes {expected} tensors, the example inputs are: {kinds}. "
            "Give example inputs that are tensors only."
        )
    return [own_copy(value.cpu()).numpy() for value in inputs]
