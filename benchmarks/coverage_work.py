"""What is done with one model of ``python -m benchmarks coverage``, in a process of its own.

    python -m benchmarks.coverage_work STAGE MODEL FILE ENGINES SECONDS

`STAGE` is ``pack``: repacked with an empty cache, what the user waits for first; ``judge``: repacked with what the
cache knows, compared and timed; or ``form``: repacked without tuning and compared, not timed. What is found is written
to `FILE` at once, so that a crash or the end of the time leaves the rest.
"""

from __future__ import annotations

import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import autoprune
from autoprune.errors import AutopruneError, first_line
from autoprune.files import read_json, write_json
from autoprune.latency.timer import Latency, measure_together, speedup
from autoprune.latency.timer import Protocol as Timing
from autoprune.model.arguments import Arguments
from autoprune.model.inventory import take_inventory
from autoprune.repack import CaptureError, ProgramModel, RepackedModel, SwappedModel
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.native.sequence import NativeSequence
from autoprune.repack.rivals import dense_calls
from autoprune.repack.tuning.tuning import TuningCache
from benchmarks.coverage_models import build
from benchmarks.coverage_models.pruning import prunable_weights, prune_, randomise_
from benchmarks.coverage_models.subject import Subject
from benchmarks.engine import MIN_SAMPLE_MS, WARMUP, rounds
from benchmarks.lib.others import others

SINCE = re.compile(r"layer by layer, since (.*)", re.DOTALL)
PROFILED = 5  # calls by which the shares of time are told
EAGER, REPACKED = "eager", "repacked"
Value = TypeVar("Value")


class Findings:
    """What is known of a model, in a file that is whole at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = read_json(path, "what was found") if path.exists() else {}

    def put(self, **values: Any) -> None:
        self.values |= values
        write_json(self._path, self.values)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Names what is being done, for the one who finds out that the process died of it."""
        self.put(doing=what)
        yield
        self.put(doing="")


def prepared(name: str) -> Subject:
    """The model with random weights, zeros in them."""
    subject = build(name)
    with torch.no_grad():
        prune_(randomise_(subject.model))
    return subject


def pack(name: str, found: Findings) -> None:
    """The first time that a user repacks the model."""
    with found.doing("building it"):
        subject = prepared(name)
        masked, call = subject.model, subject.call
    with found.doing("running it"), torch.inference_mode():
        call.call(masked)
    with found.doing("taking its inventory"):
        found.put(planned=planned(subject))
    with found.doing("repacking it"):
        before, start = memory_mb("VmRSS"), time.perf_counter()
        fast = autoprune.repack(masked, call, threads=1)
        found.put(cold_s=time.perf_counter() - start, memory_mb=before, peak_mb=memory_mb("VmHWM"))
        found.put(form="program" if isinstance(fast, ProgramModel) else "modules", why=why_no_program(fast, subject))


def planned(subject: Subject) -> float | None:
    """Share of the prunable weights that the inventory offers; None where there are none."""
    weights = sum(rows.values.numel() for rows in prunable_weights(subject.model))
    try:
        layers = take_inventory(subject.model, subject.call).layers
    except AutopruneError:  # nothing can be pruned
        layers = ()
    return sum(torch.Size(layer.weight_shape).numel() for layer in layers) / weights if weights else None


def memory_mb(what: str) -> float:
    """What the process takes, from the kernel: ``VmRSS`` now, ``VmHWM`` at most so far."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{what}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1e3


def why_no_program(fast: RepackedModel, subject: Subject) -> str:
    """The reason for the drop-in form; empty for a program."""
    if isinstance(fast, ProgramModel):
        return ""
    for row in fast.report:
        if since := SINCE.search(row.why):
            return since[1]
    try:  # no layer has a row that tells
        autoprune.repack(subject.model, subject.call, threads=1, form="program")
    except AutopruneError as error:
        return str(error)
    return ""


def judge(name: str, found: Findings, engines: tuple[str, ...], seconds: float) -> None:
    """Everything else, once the cache knows the model."""
    subject = prepared(name)
    masked, call = subject.model, subject.call
    with found.doing("repacking it from the cache"):
        start = time.perf_counter()
        fast = autoprune.repack(masked, call, threads=1)
        found.put(cached_s=time.perf_counter() - start)
    check(fast, subject, found)
    calls: dict[str, Callable[[], object]] = {
        EAGER: partial(call.call, masked), REPACKED: partial(call.call, fast),
    }  # fmt: skip
    time_calls(found, calls, seconds)  # kept, should an engine crash
    for engine in engines:
        with found.doing(f"preparing {engine}"):
            more, left_out = dense_calls(ByPlace(masked, call), call.tensors, 1, (engine,))
        calls |= more
        found.put(left_out=found.values.get("left_out", {}) | left_out)
    time_calls(found, calls, seconds)


def check(fast: RepackedModel, subject: Subject, found: Findings) -> None:
    """Whether it computes the same, however it is called, and what torch still runs in it."""
    masked, call = subject.model, subject.call
    with found.doing("comparing it"):
        error = compared(fast, masked, call)
        assert isinstance(error, float), error
        found.put(error=error)
    with found.doing("saving and loading it"):
        found.put(saved_equal=same_when_loaded(fast, subject))
    with found.doing("telling where the time goes"):
        native, steps = profile(fast, call)
        found.put(native=native, torch_steps=steps)
    with found.doing("calling it otherwise"):
        found.put(batch=compared(fast, masked, subject.batch), size=compared(fast, masked, subject.size))


def form(name: str, found: Findings) -> None:
    """Repacks the model without timing a candidate, and checks it."""
    with found.doing("building it"):
        subject = prepared(name)
    with found.doing("running it"), torch.inference_mode():
        subject.call.call(subject.model)
    with found.doing("repacking it"):
        fast, why = untuned(subject)
        found.put(form="program" if isinstance(fast, ProgramModel) else "modules", why=why)
    check(fast, subject, found)


def untuned(subject: Subject) -> tuple[RepackedModel, str]:
    """The repacked model in the form that users get, tilings apart, and the reason where it is no program."""
    masked, call = subject.model, subject.call
    try:
        return autoprune.repack(masked, call, threads=1, form="program", cache=Unasked()), ""
    except CaptureError as error:
        choose = partial(lambda backend, *_: backend, "jit")
        return autoprune.repack(masked, call, threads=1, form="modules", choose=choose), str(error).rstrip(".")


class Unasked(TuningCache):
    """Knows the default tiling of every layer, so that none is timed, and remembers nothing."""

    def __init__(self) -> None:
        super().__init__(Path(os.devnull))
        self.found, self.by_sample = _Always(Tiling()), _Always(False)


class _Always(dict[str, Value]):
    """One value at every key."""

    def __init__(self, value: Value) -> None:
        super().__init__()
        self.value = value

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> Value:
        return self.value


class ByPlace(nn.Module):
    """A model called with its tensors alone, by place, which gives those of its output."""

    def __init__(self, model: nn.Module, call: Arguments) -> None:
        super().__init__()
        self.model, self.call_of_users = model, call

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        return list(Arguments(self.call_of_users.with_tensors(tensors).call(self.model)).tensors)


def compared(fast: nn.Module, masked: nn.Module, call: Arguments | None) -> float | str | None:
    """Largest difference of an output as a share of its largest value; a refusal's words; None: no such call."""
    if call is None:
        return None
    with torch.inference_mode():
        try:
            right = Arguments(call.call(masked)).tensors
        except Exception:  # the model is made for one size
            return None
        try:
            given = Arguments(call.call(fast)).tensors
        except Exception as error:  # an AutopruneError is a refusal, anything else a fault: said, not the end
            kind = "" if isinstance(error, AutopruneError) else f"{type(error).__name__}: "
            return f"{kind}{first_line(error)}"
    errors = [0.0]
    for ours, theirs in zip(given, right, strict=True):
        if ours.shape != theirs.shape:
            errors.append(math.inf)
        elif theirs.is_floating_point() and theirs.numel():
            far = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
            errors.append(far if math.isfinite(far) else math.inf)
        else:
            errors.append(0.0 if torch.equal(ours, theirs) else 1.0)
    return max(errors)


def same_when_loaded(fast: RepackedModel, subject: Subject) -> bool:
    """Whether what is read from a file computes the very same bits."""
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "fast.safetensors"
        autoprune.save(fast, path)
        loaded = autoprune.load(path, None if isinstance(fast, ProgramModel) else subject.model, threads=1)
        ours, theirs = (Arguments(subject.call.call(model)).tensors for model in (loaded, fast))
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


Steps = dict[str, tuple[int, float]]
"""What torch still runs: operator -> how often a call, share of the time."""


def profile(fast: RepackedModel, call: Arguments) -> tuple[float, Steps]:
    """Share of the time that native code takes, and what torch takes the rest for."""
    with torch.inference_mode():
        call.call(fast)
        if isinstance(fast, ProgramModel):
            return _profile_program(fast, call)
        assert isinstance(fast, SwappedModel)
        return _profile_modules(fast, call), {}


def _profile_program(fast: ProgramModel, call: Arguments) -> tuple[float, Steps]:
    inputs = tuple(fast.signature.tensors(call.args, call.kwargs))
    plan = fast.program.plan(tuple(tuple(x.shape) for x in inputs))
    seconds: list[list[float]] = [[] for _ in plan.parts]
    for _ in range(PROFILED):
        frame = plan.frame()
        plan.fill(frame, inputs)
        sequence = 0
        for part, taken in zip(plan.parts, seconds, strict=True):
            start = time.perf_counter()
            if isinstance(part, NativeSequence):
                plan.run_native(part, frame, sequence)
                sequence += 1
            else:
                plan.run_torch(part, frame)
            taken.append(time.perf_counter() - start)
    medians = [statistics.median(taken) for taken in seconds]
    total, count, share = sum(medians), Counter[str](), defaultdict[str, float](float)
    for part, median in zip(plan.parts, medians, strict=True):
        if not isinstance(part, NativeSequence):
            count[part.op.label] += 1
            share[part.op.label] += median / total
    ranked = sorted(share, key=lambda label: -share[label])
    return 1.0 - sum(share.values()), {label: (count[label], share[label]) for label in ranked}


def _profile_modules(fast: SwappedModel, call: Arguments) -> float:
    taken, started = 0.0, 0.0

    def begin(*_: object) -> None:
        nonlocal started
        started = time.perf_counter()

    def end(*_: object) -> None:
        nonlocal taken
        taken += time.perf_counter() - started

    packed = [module for module in fast.model.modules() if type(module).__module__.startswith("autoprune.")]
    hooks = [module.register_forward_pre_hook(begin) for module in packed]
    hooks += [module.register_forward_hook(end) for module in packed]
    start = time.perf_counter()
    for _ in range(PROFILED):
        call.call(fast)
    total = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    return taken / total


def time_calls(found: Findings, calls: dict[str, Callable[[], object]], seconds: float) -> None:
    """Times all of them in turns."""
    with found.doing("timing it"):
        count = rounds(calls, 1, seconds)
        with others() as other:
            times = measure_together(calls, Timing(count, WARMUP, 1, MIN_SAMPLE_MS, lead=1))
        dense = {name: taken for name, taken in times.items() if name != REPACKED}
        best = min(dense, key=lambda name: dense[name].median_ms)
        found.put(
            load=other.cores,
            times_ms={name: taken.median_ms for name, taken in times.items()},
            over_eager=_over(times, EAGER),
            over_best=_over(times, best),
            best=best,
        )


def _over(times: dict[str, Latency], dense: str) -> float:
    return speedup(times[dense], times[REPACKED])


if __name__ == "__main__":
    stage, model, file, names, time_s = sys.argv[1:]
    torch.set_num_threads(1)
    findings = Findings(Path(file))
    try:
        if stage == "pack":
            pack(model, findings)
        elif stage == "form":
            form(model, findings)
        else:
            judge(model, findings, tuple(filter(None, names.split(","))), float(time_s))
    except Exception as error:  # the next process could not ask what it was
        findings.put(failure=f"{type(error).__name__}: {error}")
        raise
