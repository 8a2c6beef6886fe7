"""This process, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from autoprune.evaluation.devices.base import Candidate, Device
from autoprune.latency.machine import machine_identity
from autoprune.latency.timer import Clock, Latency, Protocol, measure_together, torch_threads
from autoprune.repack import ProgramModel, RepackedModel
from autoprune.repack.tuning.layer_times import LayerTime, layer_times


@dataclass(frozen=True)
class Process(Device):
    """Models run in this process; a repacked one is bound to its inputs, as the dense engines are."""

    runs_torch = True

    def __str__(self) -> str:
        return "cpu"

    @property
    def reference_name(self) -> str:
        return "dense torch eager"

    def identity(self) -> Mapping[str, Any]:
        return machine_identity()

    def reference(
        self, dense: nn.Module, inputs: tuple[Tensor, ...], repacked: Callable[[], RepackedModel]
    ) -> Candidate:
        return partial(dense, *inputs)

    def time(
        self, candidates: Mapping[str, Candidate], inputs: tuple[Tensor, ...], protocol: Protocol, clock: Clock
    ) -> dict[str, Latency]:
        with torch_threads(protocol.threads):
            calls = {
                name: each.bound_call(*inputs) if isinstance(each, RepackedModel) else each
                for name, each in candidates.items()
            }
        return measure_together(calls, protocol, clock)

    def layer_times(
        self, fast: ProgramModel, dense: nn.Module, inputs: tuple[Tensor, ...], protocol: Protocol, clock: Clock
    ) -> tuple[LayerTime, ...]:
        return layer_times(fast, dense, inputs, protocol, clock)


HERE = Process()
