"""What a dense engine is: something that runs a model as it is, as fast as it can."""

from __future__ import annotations

import copy
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from autoprune.errors import AutopruneError, MissingExtra
from autoprune.model.inventory import as_tuple

INSTALL = 'pip install "autoprune[engines]"'

LONGEST = 400  # characters of an engine's reason

Call = Callable[[], object]
Inputs = tuple[Any, ...]
EnginePrecision = Literal["float32", "bf16", "int8"]


class DenseEngine(ABC):
    """One engine.

    Attributes:
        needs: the modules it imports beyond autoprune's own dependencies.
        install: the command that installs them.
        precision: of its products. Only ``float32`` is the model's own work; other engines are shown beside a float32
            model, never compared with.
        note: what `prepare` decided, in words; empty where there was nothing to decide.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    install: ClassVar[str] = INSTALL
    precision: ClassVar[EnginePrecision] = "float32"
    note: str = ""

    @property
    def name(self) -> str:
        """Its row of ENGINES, which is called like its file."""
        return type(self).__module__.rpartition(".")[2]

    def available(self) -> str | None:
        """None when the engine can be used here, else the command that installs what is missing."""
        return None if all(importlib.util.find_spec(name) for name in self.needs) else self.install

    def prepare(
        self, model: nn.Module, example_inputs: Any, threads: int, calibration: Iterable[Any] | None = None
    ) -> Call:
        """Compiles a copy of `model` (in eval mode, weights as they are) for these very shapes.

        Args:
            model: left as it was.
            example_inputs: a tensor or a tuple of them, batch included.
            threads: of one inference; at least 1.
            calibration: batches of inputs, each of the example inputs' types and shapes, from which an int8 engine
                finds the ranges of activations; the example inputs alone when None. Other engines need none.

        Returns:
            A call that runs one inference on `example_inputs` and returns the outputs in the engine's own
            form: the model's for torch, a sequence of arrays for the others. The next call may overwrite them.

        Raises:
            MissingExtra: the engine is not installed; the message carries the command.
            AutopruneError: the engine cannot run the model, or not in its precision; or calibration batches that are
                not like the example inputs.
        """
        self.check_available()
        inputs = as_tuple(example_inputs)
        batches = [inputs] if calibration is None else _checked([as_tuple(each) for each in calibration], inputs)
        with self.reasons():
            return self._compile(copy.deepcopy(model).eval(), inputs, threads, batches)

    def check_available(self) -> None:
        """Raises MissingExtra where the engine is not installed; the message carries the command."""
        command = self.available()
        if command is not None:
            raise MissingExtra(f"this engine needs what is not installed here. Install it with: {command}")

    @contextmanager
    def reasons(self) -> Iterator[None]:
        """Whatever the engine raises over a model becomes an AutopruneError with its reason."""
        try:
            yield
        except AutopruneError:
            raise
        except Exception as error:
            # lines that name a place in the engine's own source say where, not why
            lines = [line.strip() for line in str(error).splitlines() if not re.search(r"src/\S+:\d+", line)]
            why = " ".join(filter(None, lines))[:LONGEST].rstrip(" .") or type(error).__name__
            raise AutopruneError(f"{self.name} cannot run this model: {why}.") from error

    @abstractmethod
    def _compile(self, model: nn.Module, inputs: Inputs, threads: int, calibration: Sequence[Inputs]) -> Call:
        """`prepare` on a copy of the model that may be changed, with at least one calibration batch."""


def _checked(batches: list[Inputs], inputs: Inputs) -> list[Inputs]:
    """The calibration batches, each like the example inputs: an engine compiles for their very shapes."""
    if not batches:
        raise AutopruneError("there is no calibration batch: give at least one, or None for the example inputs.")
    for number, batch in enumerate(batches):
        if (given := _kinds(batch)) != (wanted := _kinds(inputs)):
            raise AutopruneError(
                f"calibration batch {number} is {given}, the example inputs are {wanted}: "
                "give batches of the example inputs' types and shapes."
            )
    return batches


def _kinds(inputs: Inputs) -> str:
    return ", ".join(
        f"{str(x.dtype).removeprefix('torch.')} of {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        for x in inputs
    )
