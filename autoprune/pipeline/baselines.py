"""What the pruned model has to beat on the run's device: every dense engine, and the dense model repacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from autoprune.envs.limits import FileSize
from autoprune.errors import AutopruneError, FileError
from autoprune.evaluation.devices import Candidate, Device
from autoprune.evaluation.devices.process import HERE
from autoprune.files import read_json, temporary_folder, write_json
from autoprune.latency.engines import ENGINES, baselines, best_engine
from autoprune.latency.machine import differences
from autoprune.latency.timer import Clock, Protocol, speedup, torch_threads
from autoprune.model.arguments import Arguments
from autoprune.precision import Precision, RunPrecision
from autoprune.repack import RepackedModel, repack, save
from autoprune.repack.rivals import dense_calls
from autoprune.target import Over, baseline_name
from autoprune.tasks.batches import in_pieces

if TYPE_CHECKING:  # hooks in a user's own loop need no run
    from autoprune.pipeline.preparation import Context, Prepared

BASELINES_FILE = "baselines.json"  # in a run's directory
EAGER = "eager"
REPACKED = "repacked"


@dataclass(frozen=True)
class DenseEngines:
    """The dense model, ready to be timed in every way there is.

    Attributes:
        calls: engine -> what is timed; ``eager`` is torch's, ``repacked`` the dense model as this project runs it,
            which alone is there where the device runs no torch.
        left_out: engine -> why it is not there.
        repacked: the dense model, repacked.
        prepared_s: how long it took to make all of them, seconds.
        inputs: of one inference.
        device: that times them.
    """

    calls: Mapping[str, Candidate]
    left_out: Mapping[str, str]
    repacked: RepackedModel
    prepared_s: float
    inputs: tuple[Any, ...] = ()
    device: Device = HERE

    @property
    def reference(self) -> str:
        """What speed-ups are over, as plans are timed beside it: torch eager, where the device runs torch."""
        return EAGER if self.device.runs_torch else REPACKED

    def call(self, name: str, measured_in: Path) -> Candidate:
        """One inference by the engine that a target is over.

        Args:
            name: of the engine.
            measured_in: the file that names it.

        Raises:
            AutopruneError: it was there when that file was written, and cannot run now.
        """
        if name not in self.calls:
            why = self.left_out.get(name, "it is not among the engines of this run.")
            raise AutopruneError(
                f"the target is over {name}, the best dense engine by {measured_in}, which cannot run here now: {why} "
                "Mend that; or delete the file, so that the target is over the best of the engines that are left."
            )
        return self.calls[name]


@dataclass(frozen=True)
class Baselines:
    """The dense model by every engine, timed interleaved in one run.

    Attributes:
        best: the fastest dense engine of those that the run's precision is compared with: see `baselines`; where there
            are none, the dense model repacked.
        ms: engine -> median of one inference, milliseconds; ``repacked`` is the dense model as this project runs it.
        speedups: likewise, over what plans are timed beside: torch eager, or on a device without torch the dense model
            repacked. Medians of the rounds' ratios.
        file_bytes: of the dense model repacked and saved.
        machine: where they were measured, and how.
        prepared_s: how long it took to make them ready to be timed, seconds; 0 where that was not noted.
        precision: of the repacked model; the dense one is in float32 where that is ``planned``.
    """

    best: str
    ms: Mapping[str, float]
    speedups: Mapping[str, float]
    file_bytes: int
    machine: Mapping[str, Any] = field(repr=False)
    prepared_s: float = 0.0
    precision: RunPrecision = "float32"

    def engine(self, over: Over) -> str:
        """What a speed-up is over, by its name in `ms`."""
        return {"best": self.best, "repacked": REPACKED, "eager": EAGER}[over]

    def over_reference(self, over: Over) -> float:
        """How many times faster than what plans are timed beside that runs which a speed-up is over."""
        return self.speedups[self.engine(over)]

    def name(self, over: Over) -> str:
        """What a speed-up is over, as people read it."""
        return baseline_name(over, self.precision)

    @property
    def repacked(self) -> float:
        """The speed-up that repacking alone gives, over what plans are timed beside."""
        return self.speedups[REPACKED]

    def file_size(self, weights: int, value_bits: int) -> FileSize:
        """What is known of a packed file's size, of a model with so many weights in the layers that are planned."""
        return FileSize(max(0.0, self.file_bytes - weights * value_bits / 8), value_bits / 8)

    def text(self) -> str:
        """All of them as people read it."""
        shown = [f"{name} {self.ms[name]:.3f} ms" + (" (best)" if name == self.best else "") for name in self.ms]
        return "dense model: " + ", ".join(shown)


def prepare_engines(context: Context, prepared: Prepared) -> DenseEngines:
    """Compiles the dense model for the engines that the config names, or all that are installed."""
    latency, precision = context.config.latency, context.config.precision
    task, inputs = prepared.task, prepared.task.example_inputs(latency.batch)
    device = context.device
    names = [name for name in latency.engines or baselines(precision) if name != EAGER] if device.runs_torch else []
    with context.progress.bar("dense engines", len(names)) as bar:
        engines = engines_of(
            prepared.dense, inputs, names, latency.threads, context.clock, lambda name: bar.advance(1, name),
            precision=precision, calibration=task.calibration_inputs(precision), device=device,
        )  # fmt: skip
    for name, why in engines.left_out.items():
        context.progress.say(f"dense engine {name} left out: {why}")
    return engines


def engines_of(
    dense: nn.Module,
    inputs: tuple[Any, ...],
    names: Sequence[str],
    threads: int,
    clock: Clock,
    done: Callable[[str], object] = lambda name: None,
    *,
    precision: RunPrecision = "float32",
    calibration: Sequence[tuple[Tensor, ...]] | None = None,
    device: Device = HERE,
) -> DenseEngines:
    """Compiles a dense model for engines, and repacks it.

    Args:
        dense: in eval mode; left as it is.
        inputs: of one inference.
        names: rows of ENGINES beside torch eager.
        threads: of one inference.
        clock: seconds.
        done: told each engine when it is prepared or left out.
        precision: that the model is repacked in; float32 where it is ``planned``, for there is no plan of it.
        calibration: batches of inputs, for what runs in int8; where none has the samples of one inference, engines find
            their ranges on `inputs`.
        device: that will time them; one that runs no torch takes the repacked model alone.
    """
    began_s = clock()
    calls: dict[str, Candidate] = {}
    left_out: dict[str, str] = {}
    if device.runs_torch:
        pieces = in_pieces(calibration or (), Arguments(*inputs).samples) or None
        engines, left_out = dense_calls(dense, inputs, threads, names, done, pieces)
        calls = {EAGER: ENGINES.get(EAGER)().prepare(dense, inputs, threads), **engines}
    own: Precision = "float32" if precision == "planned" else precision
    ranges = None if own == "float32" else calibration
    with torch_threads(threads):
        fast = repack(dense, inputs, precision=own, calibration=ranges, clock=clock)
    return DenseEngines({**calls, REPACKED: fast}, left_out, fast, clock() - began_s, inputs, device)


def measure_baselines(context: Context, engines: Callable[[], DenseEngines]) -> Baselines:
    """Times the dense engines and the dense model repacked, or reads them from the directory.

    Args:
        context: of the run.
        engines: called where they have to be timed.
    """
    latency, config = context.config.latency, context.config
    how = {"batch": latency.batch, "threads": latency.threads, "engines": list(latency.engines)}
    model = {"value_bits": config.repack.value_bits, "precision": config.precision}
    machine = {**context.device.identity(), **how, **model}

    def measure() -> Baselines:
        measured = time_engines(
            engines(), context.final_protocol, context.clock, machine, config.repack.value_bits, config.precision
        )
        context.progress.say(measured.text())
        return measured

    return kept_baselines(context.directory / BASELINES_FILE, machine, measure)


def time_engines(
    engines: DenseEngines,
    protocol: Protocol,
    clock: Clock,
    machine: Mapping[str, Any],
    value_bits: int = 32,
    precision: RunPrecision = "float32",
) -> Baselines:
    """Times engines interleaved, and weighs the file of the dense model repacked.

    Args:
        engines: of one model.
        protocol: of the timing.
        clock: seconds.
        machine: where that is, and how it is done.
        value_bits: of a weight in the file.
        precision: that says which engines count for the best.
    """
    with temporary_folder() as folder:
        save(engines.repacked, folder / "dense.safetensors", value_bits=value_bits)
        file_bytes = (folder / "dense.safetensors").stat().st_size
    times = engines.device.time(engines.calls, engines.inputs, protocol, clock)
    among = baselines(precision) if engines.device.runs_torch else [REPACKED]
    ms = {name: took.median_ms for name, took in times.items()}
    return Baselines(
        best=best_engine(ms, among),
        ms=ms,
        speedups={name: speedup(times[engines.reference], took) for name, took in times.items()},
        file_bytes=file_bytes,
        machine=machine,
        prepared_s=engines.prepared_s,
        precision=precision,
    )


def kept_baselines(path: Path, machine: Mapping[str, Any], measure: Callable[[], Baselines]) -> Baselines:
    """The baselines of a file, where they were measured on this machine and in this way; else measured, and kept there.

    Raises:
        FileError: the file is corrupt.
    """
    if path.exists():
        known = _read(path)
        if not differences(known.machine, machine):
            return known
    measured = measure()
    write_json(path, asdict(measured))
    return measured


def _read(path: Path) -> Baselines:
    try:
        known = TypeAdapter(Baselines).validate_python(read_json(path, "the dense engines' times"))
        if {known.best, REPACKED} - known.speedups.keys() or min(known.speedups.values()) <= 0.0:
            raise ValueError("an engine lacks its speed-up")
    except (ValidationError, ValueError) as error:
        raise FileError(f"the dense engines' times are corrupt: {path} ({error}). Delete the file.") from None
    return known
