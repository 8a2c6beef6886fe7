"""Figures, drawn without a display and without pyplot's global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from autoprune.files import write_bytes
from autoprune.metric import ACCURACY, Metric
from autoprune.report.data import MeasuredPoint

MANY_LAYERS = 60  # more names than this would not be legible


def pareto_front(points: Sequence[MeasuredPoint]) -> list[MeasuredPoint]:
    """The points that no other beats in both, from fast to good; ties keep one."""
    front: list[MeasuredPoint] = []
    for point in sorted(points, key=lambda point: (point.latency_ms, -point.score)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front


def front_figure(
    trials: Sequence[MeasuredPoint],
    best: MeasuredPoint | None = None,
    dense: MeasuredPoint | None = None,
    uniform: MeasuredPoint | None = None,
    metric: Metric = ACCURACY,
) -> Figure:
    """The metric over latency: all trials, their front, and the marks that are given."""
    figure, axes = _figure(
        "latency (ms)", metric.label, f"{metric.name.capitalize()} and measured latency of the trials"
    )
    axes.scatter(*_coordinates(trials, metric), s=14, color="0.7", label="trials")
    front = pareto_front(trials)
    axes.plot(*_coordinates(front, metric), color="C0", drawstyle="steps-post", marker=".", label="front")
    marks = (("best", best, "*", "C3", 180), ("dense", dense, "s", "k", 50), ("uniform", uniform, "D", "C2", 50))
    for label, point, marker, colour, area in marks:
        if point is not None:
            axes.scatter(*_coordinates([point], metric), s=area, marker=marker, color=colour, label=label, zorder=3)
    axes.legend()
    return figure


def reward_figure(rewards: Mapping[str, Sequence[float]]) -> Figure:
    """Reward of each episode (dots) and the best so far (lines), one colour an agent."""
    figure, axes = _figure("episode", "reward", "Reward over episodes")
    for at, (name, values) in enumerate(rewards.items()):
        episodes = range(1, len(values) + 1)
        axes.scatter(episodes, values, s=6, alpha=0.35, color=f"C{at % 10}")
        best = list(accumulate(values, max))
        axes.plot(episodes, best, color=f"C{at % 10}", drawstyle="steps-post", label=f"{name}, best so far")
    if rewards:
        axes.legend()
    return figure


def sparsity_figure(sparsities: Mapping[str, float]) -> Figure:
    """One bar a layer, in the model's order from the top."""
    named = len(sparsities) <= MANY_LAYERS
    height = 1.2 + (0.22 * len(sparsities) if named else 0.22 * MANY_LAYERS)
    figure, axes = _figure("sparsity (%)", "layer", "Sparsity of each layer", height=height)
    places = range(len(sparsities))
    axes.barh(places, [100 * value for value in sparsities.values()], color="C0")
    axes.set_yticks(places if named else [], list(sparsities) if named else [], fontsize=7)
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    return figure


def png_of(figure: Figure) -> bytes:
    """The figure as a PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def save_png(figure: Figure, path: Path) -> None:
    """Writes a PNG to the side and renames it into place."""
    write_bytes(path, png_of(figure))


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """The figure as ``(height, width, 3)`` RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _figure(x: str, y: str, title: str, *, height: float = 4.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, height), dpi=120, layout="constrained")
    axes: Any = figure.add_subplot(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _coordinates(points: Sequence[MeasuredPoint], metric: Metric) -> tuple[list[float], list[float]]:
    return [point.latency_ms for point in points], [metric.figure(point.score) for point in points]
