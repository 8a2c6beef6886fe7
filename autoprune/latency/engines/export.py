"""A model as an ONNX file, and the engines that read one."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.files import temporary_folder
from autoprune.latency.engines.base import Call, DenseEngine, Inputs
from autoprune.latency.timer import Protocol, measure_together
from autoprune.model.copies import own_copy
from autoprune.tracing import tracing

BRIEF_MS = 0.2  # an inference, up to which sessions are compared
SESSIONS = 4  # of a file that are compared
_TIMING = Protocol(samples=15, warmup=3, lead=1)
BATCH = "batch"  # what an extent that may be any is called in a file


class OnnxEngine(DenseEngine):
    """An engine that reads ONNX files."""

    def load(self, path: Path, inputs: Inputs, threads: int) -> Call:
        """Compiles a file for inputs of these very shapes; the call is that of `prepare`. The file may go away.

        Where an inference is brief, it is compiled several times and the fastest is kept: by where its memory happens
        to lie, one takes up to a fifth longer than another.

        Raises:
            AutopruneError: the engine cannot run the file.
        """
        with self.reasons():
            made = {"0": self._load(path, inputs, threads)}
            once = Protocol(samples=1, warmup=1, threads=threads)
            if measure_together(made, once)["0"].median_ms > BRIEF_MS:
                return made["0"]
            made |= {str(number): self._load(path, inputs, threads) for number in range(1, SESSIONS)}
            times = measure_together(made, replace(_TIMING, threads=threads))
        return made[min(times, key=lambda number: times[number].median_ms)]

    def prepare_from(self, exported: Exported, inputs: tuple[Any, ...], threads: int) -> Call:
        """`prepare`, of a model whose file other engines read, too; raises what it does."""
        self.check_available()
        with self.reasons():
            return self.load(exported.path, inputs, threads)

    @abstractmethod
    def _load(self, path: Path, inputs: Inputs, threads: int) -> Call:
        """`load`, which may raise whatever the engine raises."""

    def _compile(self, model: nn.Module, inputs: Inputs, threads: int, calibration: Sequence[Inputs]) -> Call:
        with onnx_file(model, inputs) as path:
            return self.load(path, inputs, threads)


class Exported(AbstractContextManager["Exported"]):
    """A model's ONNX file for several engines: written when it is first asked for, gone after the block.

    Args:
        model: in eval mode; left as it is.
        inputs: of exactly the shapes it is for.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._model, self._inputs, self._after = model, inputs, ExitStack()

    @property
    def path(self) -> Path:
        """The file; raises AutopruneError where torch cannot export the model."""
        if isinstance(self._outcome, AutopruneError):
            raise self._outcome
        return self._outcome

    @cached_property
    def _outcome(self) -> Path | AutopruneError:
        try:
            return self._after.enter_context(onnx_file(copy.deepcopy(self._model), self._inputs))
        except AutopruneError as error:
            return error

    def __exit__(self, *raised: object) -> None:
        self._after.close()


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
