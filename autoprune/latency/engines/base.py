"""What a dense engine is: something that runs a model as it is, as fast as it can."""

from __future__ import annotations

import copy
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import nn

from autoprune.errors import AutopruneError, MissingExtra
from autoprune.model.inventory import as_tuple

INSTALL = 'pip install "autoprune[engines]"'

LONGEST = 400  # characters of an engine's reason

Call = Callable[[], object]


class DenseEngine(ABC):
    """One engine.

    Attributes:
        needs: the modules it imports beyond autoprune's own dependencies.
        float32: whether it computes in float32 throughout; one that does not is shown, never compared with.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    float32: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Its row of ENGINES, which is called like its file."""
        return type(self).__module__.rpartition(".")[2]

    def available(self) -> str | None:
        """None when the engine can be used here, else the command that installs what is missing."""
        return None if all(importlib.util.find_spec(name) for name in self.needs) else INSTALL

    def prepare(self, model: nn.Module, example_inputs: Any, threads: int) -> Call:
        """Compiles a copy of `model` (in eval mode, weights as they are) for these very shapes.

        Args:
            model: left as it was.
            example_inputs: a tensor or a tuple of them, batch included.
            threads: of one inference; at least 1.

        Returns:
            A call that runs one inference on `example_inputs` and returns the outputs in the engine's own
            form: the model's for torch, a sequence of arrays for the others. The next call may overwrite them.

        Raises:
            MissingExtra: the engine is not installed; the message carries the command.
            AutopruneError: the engine cannot run the model.
        """
        command = self.available()
        if command is not None:
            raise MissingExtra(f"this engine needs what is not installed here. Install it with: {command}")
        with self.reasons():
            return self._compile(copy.deepcopy(model).eval(), as_tuple(example_inputs), threads)

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
    def _compile(self, model: nn.Module, inputs: tuple[Any, ...], threads: int) -> Call:
        """`prepare` on a copy of the model that may be changed."""
