"""A device that a command runs programs on: an emulator, or a script that copies a file to a board and starts it there.

Models are built for it ahead of time, with a program that times them (`repack.aot.bench`); what that prints is read.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from autoprune.documents import parse_json
from autoprune.errors import AutopruneError, ConfigError, DeviceError, FileError
from autoprune.evaluation.devices.base import Candidate, Device
from autoprune.evaluation.devices.running import FILE, output_of
from autoprune.files import temporary_folder
from autoprune.latency.quiet import timing
from autoprune.latency.timer import Clock, Latency, Protocol
from autoprune.metric import number
from autoprune.repack import ProgramModel, RepackedModel
from autoprune.repack.aot.bench import bench_program
from autoprune.repack.aot.build import Compiled, compiled
from autoprune.repack.aot.targets import platform
from autoprune.repack.runtime.program import shapes_of
from autoprune.repack.tuning.layer_times import LayerTime, described
from autoprune.version import __version__

TIMEOUT_S = 600.0
LONGEST_S = 86400.0
LEAST_US = 1e-3  # of what takes no time by the device's clock
_LINE = '{"autoprune": '  # what the program's lines begin with; a command may print others
_NAMES = itertools.count()


class Command(Device):
    """Models are built for a target, and a command runs them.

    Args:
        target: a row of `repack.aot.targets.PLATFORMS`, or ``host``.
        run: the command, split as a shell does and run without one; ``{file}`` in it is the program's path here.
        timeout_s: of one run of it, seconds; above 0, a day at most.

    Raises:
        ConfigError: there is no such target, the command does not say where the program stands or cannot be one, or
            the time is none.
    """

    runs_torch = False

    def __init__(self, target: str, run: str, timeout_s: float = TIMEOUT_S) -> None:
        for name, given in (("target", target), ("run", run)):
            if not isinstance(given, str):
                raise ConfigError(f"device.{name} is a string, not {given!r:.60}.")
        seconds = number(timeout_s)
        if seconds is None or not 0.0 < seconds <= LONGEST_S:
            raise ConfigError(
                f"device.timeout_s is a number of seconds above 0 and at most {LONGEST_S:g}, not {timeout_s!r:.60}."
            )
        if "\0" in run:
            raise ConfigError(f"device.run holds a character that no command can: \\0 in {run!r:.200}.")
        try:
            self._command = shlex.split(run)
        except ValueError as error:
            raise ConfigError(f"device.run cannot be split into words: {error} ({run!r}).") from None
        if not any(FILE in word for word in self._command):
            raise ConfigError(
                f"device.run must hold {FILE}, which stands for the program that is timed, e.g. "
                f"'qemu-aarch64-static {FILE}' or './on-my-board {FILE}', not {run!r}."
            )
        try:
            platform(target)
        except AutopruneError as error:
            raise ConfigError(f"device.{error}") from None
        self._target, self._run, self._timeout_s = target, run, seconds
        self._built: WeakKeyDictionary[RepackedModel, Compiled] = WeakKeyDictionary()
        self._references: WeakKeyDictionary[nn.Module, dict[Any, RepackedModel]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return Command, (self._target, self._run, self._timeout_s)  # what was built is built again elsewhere

    def __deepcopy__(self, memo: object) -> Command:
        return self

    def __str__(self) -> str:
        return f"{self._target}, by {self._run!r}"

    @property
    def reference_name(self) -> str:
        return f"the dense model repacked and built for {self._target}"

    def identity(self) -> Mapping[str, Any]:
        return {
            "device": "command",
            "target": self._target,
            "run": self._run,
            **self._about,
            "torch": str(torch.__version__),
            "llvmlite": importlib.metadata.version("llvmlite"),
            "autoprune": __version__,
        }

    @cached_property
    def _about(self) -> dict[str, Any]:
        """What the device says of itself; asked once a process."""
        said = self._lines({}, (), Protocol(), "device")
        if len(said) != 1:
            raise self._not_understood(f"it says {len(said)} times what it is, not once")
        return {key: said[0][key] for key in ("machine", "cpu", "cores") if key in said[0]}

    def reference(
        self, dense: nn.Module, inputs: tuple[Tensor, ...], repacked: Callable[[], RepackedModel]
    ) -> Candidate:
        known = self._references.setdefault(dense, {})
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in known:
            known[key] = repacked()
        return known[key]

    def time(
        self, candidates: Mapping[str, Candidate], inputs: tuple[Tensor, ...], protocol: Protocol, clock: Clock
    ) -> dict[str, Latency]:
        models = {name: self._compiled(name, each, inputs) for name, each in candidates.items()}
        numbered = {f"model_{at}": each for at, each in enumerate(models.values())}  # names are anything, as JSON not
        found: dict[str, list[float]] = {}
        for line in self._lines(numbered, inputs, protocol, "model"):
            found[str(line.get("model"))] = self._samples(line, "samples_ms", protocol)
        if found.keys() != numbered.keys():
            raise self._not_understood(f"it tells of {', '.join(found) or 'no model'}, not {', '.join(numbered)}")
        return {
            name: Latency.from_samples(found[own], 1, self._target)
            for name, own in zip(models, numbered, strict=True)
        }  # fmt: skip

    def layer_times(
        self, fast: ProgramModel, dense: nn.Module, inputs: tuple[Tensor, ...], protocol: Protocol, clock: Clock
    ) -> tuple[LayerTime, ...]:
        model = self._compiled("the program", fast, inputs)
        rows = described(fast.program, model.calls[0].lowered)
        taken = [
            self._samples(line, "samples_us", protocol)
            for line in self._lines({"model": model}, inputs, protocol, "op")
        ]  # fmt: skip
        if len(taken) != len(rows) * model.calls[0].samples:
            raise self._not_understood(f"it tells of {len(taken)} operations, not {len(rows)} for each sample")
        taken = [[math.fsum(each) for each in zip(*taken[at :: len(rows)], strict=True)] for at in range(len(rows))]
        return tuple(
            replace(row, median_us=max(LEAST_US, statistics.median(times)), min_us=min(times))
            for row, times in zip(rows, taken, strict=True)
        )

    def _compiled(self, name: str, candidate: Candidate, inputs: tuple[Tensor, ...]) -> Compiled:
        if not isinstance(candidate, ProgramModel):
            why = f": {candidate.summary}" if isinstance(candidate, RepackedModel) and candidate.summary else ""
            raise DeviceError(f"{name} cannot be measured on {self}: only whole programs can be built for it{why}.")
        shapes = shapes_of(inputs)
        known = self._built.get(candidate)
        if known is None or tuple(each.shape for each in known.calls[0].inputs) != shapes:
            known = compiled(candidate, self._target, [shapes], f"model_{next(_NAMES)}", ops=True)
            self._built[candidate] = known
        return known

    def _lines(
        self, models: Mapping[str, Compiled], inputs: Sequence[Tensor], protocol: Protocol, kind: str
    ) -> list[dict[str, Any]]:
        """What the program that times these models says of one kind."""
        with temporary_folder() as folder:
            program = folder / "bench"
            bench_program(models, inputs, self._target, protocol, program, ops=kind == "op")
            with timing():
                text = output_of(self._run, self._command, program, self._timeout_s)
        lines = []
        for line in text.splitlines():
            if line.startswith(_LINE):
                try:
                    lines.append(parse_json(line))
                except FileError as error:
                    raise self._not_understood(f"{line[:100]!r} is no JSON ({error})") from None
        if not lines or lines[-1].get("autoprune") != "end":
            raise self._not_understood("it lacks the program's last line")
        return [line for line in lines if line["autoprune"] == kind]

    def _samples(self, line: Mapping[str, Any], key: str, protocol: Protocol) -> list[float]:
        given = line.get(key)
        samples = [number(each) for each in given] if isinstance(given, list) else []
        taken = [each for each in samples if each is not None and each >= 0.0]
        if len(taken) != protocol.samples or len(samples) != len(taken) or max(taken, default=0.0) <= 0.0:
            raise self._not_understood(f"{key} are not {protocol.samples} times: {given!r:.100}")
        return taken

    def _not_understood(self, why: str) -> DeviceError:
        return DeviceError(
            f"what the device's command {self._run!r} printed is not understood: {why}. It must pass on all that the "
            "program {file} prints, line by line, and nothing else that begins like these lines."
        )
