"""A speed-up asked for in Python: the latency table of the user's model, and the uniform plan that meets it there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from autoprune.allocation import Cost
from autoprune.criteria import LayerStatistics
from autoprune.envs.projection import check_feasible, fastest, meet, release_useless
from autoprune.errors import AutopruneError
from autoprune.evaluation.profile import (
    profile_record,
    profile_settings,
    profile_table,
    shared_file,
    shared_or_measured,
)
from autoprune.evaluation.recovery import Subject
from autoprune.identity.fingerprint import architecture_fingerprint
from autoprune.latency.cost import LatencyCost
from autoprune.latency.engines import baselines as engines
from autoprune.latency.machine import machine_identity
from autoprune.latency.table import LatencyTable
from autoprune.latency.timer import Clock, Protocol
from autoprune.model.arguments import Arguments
from autoprune.model.copies import copy_for_inference
from autoprune.model.inventory import Inventory
from autoprune.pipeline.baselines import EAGER, Baselines, engines_of, kept_baselines, time_engines
from autoprune.plan import LayerPlan, Plan
from autoprune.processes.locks import turn
from autoprune.registry import Choice
from autoprune.settings import TrainingSettings
from autoprune.target import Over, Target, baseline_name
from autoprune.tasks.base import Task
from autoprune.training.distributed import several

_LOG = logging.getLogger(__name__)
THREADS = 1
PROFILE_SAMPLES = 15
MAX_SPARSITY = 0.95
_ALONE = (
    "each of several processes would measure times of its own, and plan differently: measure the table first, in one "
    "process, with the same speedup, over and table='latency.json', and give that file to all."
)


def latency_table(
    model: nn.Module,
    inputs: Any,
    inventory: Inventory,
    pattern: Choice,
    file: Path | None = None,
    *,
    clock: Clock = time.perf_counter,
) -> LatencyTable:
    """Measures the latency table of a model on one thread, or reads it from `file` or the user's cache.

    Args:
        model: left as it is.
        inputs: a tensor or a tuple of them, at the batch size latency matters for.
        inventory: its prunable layers.
        pattern: they are pruned by.
        file: read when it is there, else written.
        clock: seconds.

    Raises:
        AutopruneError: several processes would each measure a table of their own.
        FileError: the file is corrupt, or of another model, machine or pattern.
    """
    dense = copy_for_inference(model)
    examples = Arguments.of(inputs).positional(dense)
    task = Task("given", dense, (), (), (), (), functional.cross_entropy, None, examples=examples)
    statistics = {name: LayerStatistics() for name in inventory.names}
    subject = Subject(task, dense, inventory, statistics, TrainingSettings(epochs=1, learning_rate=0.1), 0)
    settings = profile_settings(subject, (pattern,), len(examples[0]), THREADS)
    protocol = Protocol(samples=PROFILE_SAMPLES, threads=THREADS)
    if several() and (file is None or not file.exists()):
        raise AutopruneError(_ALONE)
    if file is None:
        measure = partial(profile_table, subject, (pattern,), settings, protocol, clock)
        return shared_or_measured(settings, protocol, measure, _LOG.info)
    with turn(file, _LOG.info):
        if file.exists():
            return LatencyTable.load(file, settings=settings, machine=machine_identity())
        record = profile_record(file, settings, protocol)
        measure = partial(profile_table, subject, (pattern,), settings, protocol, clock, record=record)
        table = shared_or_measured(settings, protocol, measure, _LOG.info)
        table.save(file)
        record.clear()
    return table


def faster_than_eager(
    model: nn.Module, inputs: Any, over: Over, table: Path | None = None, *, clock: Clock = time.perf_counter
) -> float:
    """How many times faster than torch eager that runs which a speed-up is over, on one thread.

    The dense engines are timed once: what that gave is kept beside the latency table's file, or in the user's cache.

    Args:
        model: left as it is.
        inputs: as for `latency_table`.
        over: of the target.
        table: the latency table's file; None where it is in the user's cache.
        clock: seconds.

    Raises:
        AutopruneError: several processes would each time the engines.
        FileError: the file is corrupt, or there is no place for one.
    """
    if over == EAGER:
        return 1.0
    dense = copy_for_inference(model).eval()
    examples = Arguments.of(inputs).positional(dense)
    names = [name for name in engines() if name != EAGER]
    shapes = [list(each.shape) if isinstance(each, Tensor) else repr(each) for each in examples]
    how = {"threads": THREADS, "engines": names, "architecture": architecture_fingerprint(dense), "inputs": shapes}
    protocol = Protocol(threads=THREADS, lead=1)
    file = shared_file("engines", how, protocol) if table is None else table.with_name(f"{table.stem}.engines.json")

    machine = {**machine_identity(), **how}

    def measure() -> Baselines:
        if several():
            raise AutopruneError(_ALONE)
        ready = engines_of(dense, examples, names, THREADS, clock)
        return time_engines(ready, protocol, clock, machine)

    with turn(file, _LOG.info):
        return kept_baselines(file, machine, measure).over_reference(over)


def plan_at(
    table: LatencyTable,
    inventory: Inventory,
    layer: LayerPlan,
    method: Choice,
    target: Target,
    baseline: float,
) -> tuple[Plan, Callable[[Inventory], Cost]]:
    """The plan that treats every layer alike and meets a speed-up in the table, and its cost in milliseconds.

    Args:
        table: of the model.
        inventory: the layers it was measured on.
        layer: the pattern and the criterion of every layer.
        method: the plan's.
        target: a speed-up alone.
        baseline: how many times faster than torch eager that runs which the speed-up is over.

    Raises:
        InfeasibleTarget: with the best reachable figure.
    """
    assert target.speedup is not None
    plan = Plan(dict.fromkeys(inventory.names, layer), method)
    check_feasible(
        fastest(plan, table, MAX_SPARSITY) / baseline, target.speedup, baseline_name(target.over), MAX_SPARSITY
    )
    plan = release_useless(meet(plan, table, target.speedup * baseline, MAX_SPARSITY), table)
    return plan, lambda pruned: LatencyCost(table, plan, inventory, pruned)
