"""Whether a large pruned model is better than a small dense one of the same latency.

    python -m benchmarks front --tasks digits --seeds 1      # the embedded digits: half an hour
    python -m benchmarks front                               # Fashion-MNIST and spoken digits too: many hours; stop it,
                                                             # and go on, at any time
    python -m benchmarks front --report                      # the page and the figures again, from what is there

Networks of one architecture in several widths are trained densely, and pruned while they are trained, all for the same
number of epochs. A dense network is timed in every dense engine, in float32 and in int8, and repacked; a pruned one
repacked in float32 and in int8; always in turns with one reference, the dense network of width 1 in ONNX Runtime, so
that rows from different hours compare: a latency is a share of the reference's. One sample, one thread. Rows are kept
in benchmarks/results/front.jsonl as soon as they are there; the page is benchmarks/results/front.md.

Nothing is chosen on the test split.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from autoprune.errors import AutopruneError
from autoprune.files import read_tensors
from autoprune.latency.engines import ENGINES, baselines
from autoprune.latency.timer import Protocol, measure_together
from autoprune.model.inventory import as_tuple
from autoprune.registry import Choice
from autoprune.repack import repack
from autoprune.report.console import Console
from autoprune.tasks import TASKS, Task
from autoprune.tasks.batches import in_pieces
from benchmarks.front_report import DENSE, Outcome, report
from benchmarks.lib.command_line import add_report, add_seeds, among, command_line, listed
from benchmarks.lib.page import write_page
from benchmarks.lib.sweep import Rows, missing, sweep
from benchmarks.methods import model_path, train_one
from benchmarks.methods_report import Job
from benchmarks.methods_table import RECIPES, SPOKEN_DIGITS, TASKS_SHOWN, Shown

REFERENCE = "onnxruntime"  # the engine that runs the dense network of width 1
TIMING = Protocol(samples=40, threads=1)
METHODS = ("gradual_scratch_erk", "gradual_scratch_lamp", "joint")
Scale = Callable[[float], Mapping[str, object]]


@dataclass(frozen=True)
class Front:
    """Networks of one architecture.

    Attributes:
        shown: the task, with the network of width 1, and the training of all.
        scale: width -> the task's arguments that make the network so wide.
        dense: widths of the dense networks.
        pruned: width -> the settings, rows of SETTINGS, that it is pruned in.
    """

    shown: Shown
    scale: Scale
    dense: Sequence[float]
    pruned: Mapping[float, Sequence[str]]

    def at(self, width: float) -> Shown:
        task = self.shown.task
        return replace(self.shown, task=Choice(task.name, {**task.args, **self.scale(width)}))


def _channels(width: float) -> Mapping[str, object]:
    return {"widths": [round(width * channels) for channels in (16, 32, 64)]}


def _units(width: float) -> Mapping[str, object]:
    return {"hidden": round(width * 128)}


WIDTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
PRUNED = {0.5: ("group-75",), 1.0: ("group-75", "group-90"), 2.0: ("group-75", "group-90", "group-97")}
FRONTS: Mapping[str, Front] = {
    "digits": Front(TASKS_SHOWN["digits"], _channels, WIDTHS, PRUNED),
    "fashion_mnist": Front(TASKS_SHOWN["fashion_mnist"], _channels, WIDTHS, PRUNED),
    "spoken_digits": Front(SPOKEN_DIGITS, _units, (*WIDTHS, 4.0), {**PRUNED, 4.0: ("group-90", "group-97")}),
}


class Point(NamedTuple):
    """One network. `method` is a row of RECIPES, and `setting` one of SETTINGS: none for DENSE."""

    seed: int
    task: str
    width: float
    method: str
    setting: str


def main(argv: Sequence[str]) -> int:
    parser = command_line("front", __doc__)
    add_seeds(parser, 3)
    parser.add_argument("--tasks", type=among(FRONTS), default=tuple(FRONTS), help=f"of {', '.join(FRONTS)}")
    parser.add_argument("--methods", type=among(RECIPES), default=METHODS, help=f"default {','.join(METHODS)}")
    parser.add_argument("--widths", type=listed(float), help="only these, e.g. 0.5,1; all when left out")
    add_report(parser)
    given = parser.parse_args(argv)
    rows, failed = Rows(given.output / "front.jsonl", Outcome), 0
    try:
        if not given.report:
            torch.set_num_threads(1)
            wanted = [
                point
                for point in points(given.seeds, given.tasks, given.methods)
                if given.widths is None or point.width in given.widths
            ]
            failed = sweep(rows, missing(rows, wanted), measure, Console(), note=str)
    finally:
        write_page(given.output, "front", report(rows.read(), given.output))
    return int(failed > 0)


def points(seeds: int, tasks: Sequence[str], methods: Sequence[str]) -> list[Point]:
    """Seed by seed, task by task; narrow networks, which are trained soonest, first."""
    return [
        Point(seed, task, width, method, setting)
        for seed in range(seeds)
        for task in tasks
        for width in sorted({*FRONTS[task].dense, *FRONTS[task].pruned})
        for method, setting in (
            *([(DENSE, "")] if width in FRONTS[task].dense else []),
            *((method, setting) for setting in FRONTS[task].pruned.get(width, ()) for method in methods),
        )
    ]


def measure(point: Point) -> Outcome:
    """Trains one network, and times it in turns with the reference."""
    shown, job = FRONTS[point.task].at(point.width), Job(point.method, point.setting, point.seed)
    trained, task = train_one(shown, job), _task(shown, point.seed)
    model = copy.deepcopy(task.model)
    model.load_state_dict(read_tensors(model_path(shown, job), "the trained model")[0])
    ways, scores = _ways(model.eval(), task, point.method == DENSE)
    reference = _reference(FRONTS[point.task].shown)
    times = {name: time.median_ms for name, time in measure_together({"reference": reference, **ways}, TIMING).items()}
    reference_ms = times.pop("reference")
    return Outcome(
        **point._asdict(),
        validation={"float32": trained.validation, "int8": scores[0]},
        test={"float32": trained.test, "int8": scores[1]},
        macs=trained.macs,
        seconds=trained.seconds,
        reference_ms=reference_ms,
        latency={name: time / reference_ms for name, time in times.items()},
    )


def _ways(model: nn.Module, task: Task, dense: bool) -> tuple[dict[str, Callable[[], object]], tuple[float, float]]:
    """What runs the model, by name; and the scores, on the validation and the test split, of its repacked int8 form."""
    x, batches = task.example_inputs(1), [as_tuple(given) for given, _ in task.calibration]
    packed = {
        "repacked": repack(model, x, threads=1),
        "repacked_int8": repack(model, x, threads=1, precision="int8", calibration=batches),
    }
    ways: dict[str, Callable[[], object]] = {name: each.bind(*x) for name, each in packed.items()}
    if dense:
        pieces = in_pieces(batches, 1)
        for name in baselines("int8"):
            engine = ENGINES.create(Choice(name))
            try:
                ways[name] = engine.prepare(model, x, 1, pieces if engine.precision == "int8" else None)
            except AutopruneError as error:
                Console().say(f"{name} does not run it: {error}")
    return ways, (task.evaluate(packed["repacked_int8"]), task.test(packed["repacked_int8"]))


@cache
def _task(shown: Shown, seed: int) -> Task:
    return TASKS.create(shown.choice(seed))


@cache
def _reference(shown: Shown) -> Callable[[], object]:
    task = _task(shown, 0)
    return ENGINES.create(Choice(REFERENCE)).prepare(task.model.eval(), task.example_inputs(1), 1)
