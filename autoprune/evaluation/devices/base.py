"""What measures latency: this process, or something that runs programs built for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from autoprune.latency.timer import Clock, Latency, Protocol
from autoprune.repack import ProgramModel, RepackedModel
from autoprune.repack.tuning.layer_times import LayerTime

Call = Callable[[], object]
Candidate = RepackedModel | Call
"""What is timed: a repacked model on given inputs, or where torch runs any call without arguments."""


class Device(ABC):
    """Where latency is measured, and by whom.

    Attributes:
        runs_torch: whether it times calls of this process too: torch eager, and the dense engines.
    """

    runs_torch: ClassVar[bool]

    @abstractmethod
    def __str__(self) -> str:
        """What it is, in a report."""

    @property
    @abstractmethod
    def reference_name(self) -> str:
        """What `reference` gives, as people read it."""

    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """JSON values: what is measured holds where these are the same.

        Raises:
            DeviceError: it cannot be reached.
        """

    @abstractmethod
    def reference(
        self, dense: nn.Module, inputs: tuple[Tensor, ...], repacked: Callable[[], RepackedModel]
    ) -> Candidate:
        """The form of the dense model that plans are timed beside, which their speed-ups are over.

        Args:
            dense: in eval mode.
            inputs: of one inference.
            repacked: gives the dense model repacked.
        """

    @abstractmethod
    def time(
        self, candidates: Mapping[str, Candidate], inputs: tuple[Tensor, ...], protocol: Protocol, clock: Clock
    ) -> dict[str, Latency]:
        """Times all of them in turns.

        Args:
            candidates: name -> what is timed.
            inputs: of one inference, of the repacked models.
            protocol: of the timing.
            clock: seconds, of this process.

        Raises:
            DeviceError: the device cannot do it, now or at all.
        """

    @abstractmethod
    def layer_times(
        self, fast: ProgramModel, dense: nn.Module, inputs: tuple[Tensor, ...], protocol: Protocol, clock: Clock
    ) -> tuple[LayerTime, ...]:
        """Times every operation of a program, in the order they run, on one thread.

        Args:
            fast: the program.
            dense: what it was made of; its layers are timed beside it where torch runs.
            inputs: of one inference.
            protocol: its `samples` and `warmup` are the rounds.
            clock: seconds, of this process.

        Raises:
            DeviceError: the device cannot do it, now or at all.
        """
