"""What several files of tests share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from autoprune.errors import DeviceError
from autoprune.evaluation.devices import Candidate, Device
from autoprune.evaluation.measurement import Evaluated, Measurement
from autoprune.latency.timer import Clock, Latency, Protocol
from autoprune.repack import ProgramModel, RepackedModel
from autoprune.repack.runtime.program import shapes_of
from autoprune.repack.tuning.layer_times import LayerTime, described

SMALL_TOML = """
[task]
name = "digits"
widths = [8, 16]
[dense]
epochs = 1
learning_rate = 0.1
[latency]
samples = 3
search_samples = 3
profile_samples = 3
engines = ["eager"]
[finetune.settings]
epochs = 1
"""
"""A config of the digits task without a target and an environment, quick to run through."""


class CountingDevice(Device):
    """A device without torch, on which a weight takes a nanosecond; it is lost after some measurements.

    Attributes:
        measured: what was, in order.
        lost_after: so many measurements.
        name: of the device.
    """

    runs_torch = False
    measured: ClassVar[list[str]] = []
    lost_after: ClassVar[int] = 10**6
    name: ClassVar[str] = "a counter"

    def __str__(self) -> str:
        return self.name

    @property
    def reference_name(self) -> str:
        return "the dense model on the counter"

    def identity(self) -> Mapping[str, Any]:
        return {"device": self.name}

    def reference(
        self, dense: nn.Module, inputs: tuple[Tensor, ...], repacked: Callable[[], RepackedModel]
    ) -> Candidate:
        return repacked()

    def time(
        self, candidates: Mapping[str, Candidate], inputs: tuple[Tensor, ...], protocol: Protocol, clock: Clock
    ) -> dict[str, Latency]:
        self._count(", ".join(candidates))
        return {name: Latency.from_samples([_weights(x) / 1e6] * protocol.samples, 1) for name, x in candidates.items()}

    def layer_times(
        self, fast: ProgramModel, dense: nn.Module, inputs: tuple[Tensor, ...], protocol: Protocol, clock: Clock
    ) -> tuple[LayerTime, ...]:
        self._count("layers")
        rows = described(fast.program, fast.program.plan(shapes_of(inputs)).lowered)
        return tuple(replace(row, median_us=0.1 + row.flops / 1e4) for row in rows)

    def _count(self, what: str) -> None:
        if len(self.measured) >= self.lost_after:
            raise DeviceError("the counter is lost")
        self.measured.append(what)


def _weights(candidate: Candidate) -> int:
    assert isinstance(candidate, ProgramModel)
    return 100 + sum(int(np.count_nonzero(each.packed.values)) for each in candidate.program.weights.values())


def measured(outcome: Evaluated) -> Measurement:
    """The measurement that an evaluation came to; a failure fails the test."""
    assert isinstance(outcome, Measurement), outcome
    return outcome
