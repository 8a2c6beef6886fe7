"""Figures show what they are given, and are written whole or not at all."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from autoprune.metric import BITS_PER_CHARACTER
from autoprune.report.data import MeasuredPoint
from autoprune.report.plots import front_figure, pareto_front, pixels, reward_figure, save_png, sparsity_figure

POINTS = st.builds(MeasuredPoint, st.floats(0.1, 10), st.floats(0, 1))
TRIALS = [MeasuredPoint(1.0, 0.7), MeasuredPoint(2.0, 0.9), MeasuredPoint(3.0, 0.8)]


@given(st.lists(POINTS, max_size=20))
def test_the_front_is_what_no_point_beats(points: list[MeasuredPoint]) -> None:
    front = pareto_front(points)
    for point in points:
        assert any(kept.latency_ms <= point.latency_ms and kept.score >= point.score for kept in front)
    for fast, accurate in pairwise(front):
        assert fast.latency_ms < accurate.latency_ms
        assert fast.score < accurate.score


def labels(figure: Figure) -> list[str]:
    return list(figure.axes[0].get_legend_handles_labels()[1])


def test_the_front_figure_marks_what_it_is_given() -> None:
    assert labels(front_figure(TRIALS)) == ["trials", "front"]
    marked = front_figure(TRIALS, best=TRIALS[1], dense=MeasuredPoint(6.0, 0.95), uniform=TRIALS[2])
    assert set(labels(marked)) == {"trials", "front", "best", "dense", "uniform"}
    line: Any = marked.axes[0].lines[0]
    assert list(line.get_xdata()) == [1.0, 2.0]
    assert list(line.get_ydata()) == pytest.approx([70, 90])
    assert marked.axes[0].get_ylabel() == "accuracy (%)"


def test_the_front_of_another_metric_shows_its_figures() -> None:
    points = [MeasuredPoint(1.0, -2.5), MeasuredPoint(2.0, -2.1), MeasuredPoint(3.0, -2.3)]
    axes = front_figure(points, metric=BITS_PER_CHARACTER).axes[0]
    line: Any = axes.lines[0]
    assert list(line.get_xdata()) == [1.0, 2.0], "fewer bits are better"
    assert list(line.get_ydata()) == pytest.approx([2.5, 2.1])
    assert axes.get_ylabel() == "bits per character"


def test_the_reward_figure_never_falls() -> None:
    figure = reward_figure({"ppo": [0.1, 0.5, 0.3], "random": [0.2, 0.1]})
    lines: list[Any] = list(figure.axes[0].lines)
    assert [list(line.get_ydata()) for line in lines] == [[0.1, 0.5, 0.5], [0.2, 0.2]]
    assert labels(figure) == ["ppo, best so far", "random, best so far"]


@pytest.mark.parametrize("count", [1, 5, 200])
def test_the_sparsity_figure_has_a_bar_a_layer(count: int) -> None:
    figure = sparsity_figure({f"layer{at}": at / count for at in range(count)})
    bars: list[Any] = list(figure.axes[0].patches)
    assert [bar.get_width() for bar in bars] == pytest.approx([100 * at / count for at in range(count)])
    assert pixels(figure).std() > 0


@pytest.mark.parametrize("figure", [front_figure([]), reward_figure({}), sparsity_figure({})])
def test_nothing_to_show_is_still_a_figure(figure: Figure) -> None:
    assert pixels(figure).shape[2] == 3


def test_equal_figures_are_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_png(sparsity_figure({"conv1": 0.5, "conv2": 0.9}), tmp_path / name / "plan.png")
    first = (tmp_path / "a" / "plan.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert first == (tmp_path / "b" / "plan.png").read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["plan.png"]


def test_pixels_are_rgb_bytes() -> None:
    image = pixels(front_figure(TRIALS))
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
