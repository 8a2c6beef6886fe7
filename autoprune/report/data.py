"""What a report is made of: plain data, gathered by those who measured it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autoprune.latency.timer import Latency
from autoprune.metric import ACCURACY, Metric
from autoprune.model.inventory import KeptDense


@dataclass(frozen=True)
class ResultRow:
    """One form of the model in the final table; None where a figure was not taken.

    Attributes:
        name: e.g. ``dense, onnxruntime`` or ``pruned, repacked``.
        score: on the test split; the report's metric says how it reads.
        latency: of the whole model, from the run's one `measure_together`.
        speedup: over the dense model in torch eager.
        speedup_over_best: over the fastest dense engine of the same run.
        parameters: weights that are not zero, and all other parameters.
        size_bytes: of the file on disk.
        left_out: why the form was not measured, where it was not.
        precision: of its products: ``float32``, ``bf16``, ``int8`` or ``mixed``.
        snr_db: how far the error of that precision lies below the output, on the inputs that are timed: decibels;
            None where there is none.
    """

    name: str
    score: float | None = None
    latency: Latency | None = None
    speedup: float | None = None
    speedup_over_best: float | None = None
    parameters: int | None = None
    size_bytes: int | None = None
    left_out: str | None = None
    precision: str = "float32"
    snr_db: float | None = None


@dataclass(frozen=True)
class PlanRow:
    """One layer of the plan and what runs it; latencies in microseconds an inference, None if not measured.

    `precision`, `scale` and `snr_db` are as of `autoprune.repack.LayerReport`.
    """

    layer: str
    weights: int
    sparsity: float
    pattern: str
    criterion: str
    backend: str
    dense_us: float | None = None
    latency_us: float | None = None
    precision: str = "float32"
    scale: float | None = None
    snr_db: float | None = None


@dataclass(frozen=True)
class SearchRow:
    """The best plan one agent found, and in how many episodes."""

    agent: str
    episodes: int
    reward: float
    score: float
    latency_ms: float
    speedup: float


@dataclass(frozen=True)
class ContenderRow:
    """A plan that was fine-tuned before one was chosen.

    Attributes:
        source: the agent or rule that made it.
        chosen: whether it was.
        speedup: measured, over what the target's is over; None where none was asked for.
        validation: score after the training on the split that one is chosen by.
        test: likewise on the test split.
    """

    source: str
    chosen: bool
    speedup: float | None
    validation: float
    test: float


@dataclass(frozen=True)
class MethodRow:
    """What one training method brought; None where it brought nothing.

    Attributes:
        method: its name.
        score: of the repacked model, on the test split.
        speedup_over_best: of the repacked model over the fastest dense engine of its run.
        speedup: likewise, over torch eager.
        kept: parameters that are not zero, as a share of the dense model's.
        minutes: of training and repacking.
        remark: why there are no figures, or what of the target was missed.
        missed: whether the target was missed, or the method cannot do it.
    """

    method: str
    score: float | None = None
    speedup_over_best: float | None = None
    speedup: float | None = None
    kept: float | None = None
    minutes: float | None = None
    remark: str | None = None
    missed: bool = False


@dataclass(frozen=True)
class TrialRow:
    """One trial of a search as TensorBoard shows it; score, latency and speed-up are None where it failed.

    Attributes:
        reward: what the agent got.
        terms: of the reward, by name.
        sparsities: of the plan, by layer.
        choices: what else the plan decides in numbers: kind -> name -> number, e.g. ``group_size`` by layer.
    """

    reward: float
    terms: Mapping[str, float]
    sparsities: Mapping[str, float]
    choices: Mapping[str, Mapping[str, float]] = field(default_factory=dict, kw_only=True)
    score: float | None = None
    latency_ms: float | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class MeasuredPoint:
    """One plan (or model) in the plane of the front plot; the score is higher when better."""

    latency_ms: float
    score: float


@dataclass(frozen=True)
class Report:
    """All that the page of a run says.

    Attributes:
        headline: the result in one or two sentences.
        facts: what was run: task, target, agent, training, seed, ...
        kept_dense: layers that were not pruned, and why.
        protocol: how latency was measured.
        metric: how scores read.
        machine: `autoprune.latency.machine.machine_identity`.
        figures: caption -> file name beside the page.
    """

    title: str
    headline: str
    facts: Mapping[str, Any]
    results: tuple[ResultRow, ...]
    plan: tuple[PlanRow, ...]
    kept_dense: tuple[KeptDense, ...]
    searches: tuple[SearchRow, ...]
    contenders: tuple[ContenderRow, ...]
    protocol: Mapping[str, Any]
    machine: Mapping[str, Any]
    figures: Mapping[str, str] = field(default_factory=dict)
    metric: Metric = ACCURACY
