"""What benchmarks/dynamic.py shows: gates against the static plans at the same accuracy and at the same latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from dynamic_runs import PATTERN, SETTINGS, TASK
from dynamic_times import IMAGES, ROUNDS, SHARES, SPARSITIES, Measured

from autoprune.latency.machine import machine_text
from autoprune.report.table import MISSING, markdown_table

BAR = 1.2
Point = tuple[float, float]
"""Mean milliseconds, accuracy."""


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both, the fastest first."""
    best: list[Point] = []
    for ms, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((ms, accuracy))
    return best


def static_ms(points: Sequence[Point], accuracy: float) -> float | None:
    """Milliseconds of a static plan of that accuracy, between the measured ones; None where none is as good."""
    line = frontier(points)
    if accuracy > line[-1][1]:
        return None
    return float(np.interp(accuracy, [point[1] for point in line], [point[0] for point in line]))


def static_accuracy(points: Sequence[Point], ms: float) -> float | None:
    """Accuracy of a static plan that takes so long; None where none is as fast."""
    line = frontier(points)
    if ms < line[0][0]:
        return None
    return float(np.interp(ms, [point[0] for point in line], [point[1] for point in line]))


def report(rows: Sequence[Measured], mechanism: Mapping[tuple[str, float, float | None], float]) -> str:
    static = [row for row in rows if not row.run.variant.place]
    dynamic = [row for row in rows if row.run.variant.place]
    points = {split: [(row.mean_ms, getattr(row.run, split)) for row in static] for split in ("validation", "test")}
    gains = {row: _gain(points["validation"], row) for row in dynamic}
    return "\n".join(
        [
            "# Dynamic channel gates",
            "",
            f"Written by `python benchmarks/dynamic.py`. {TASK}: a dense start of {SETTINGS.epochs} epochs, then "
            f"{SETTINGS.epochs} more in every row, in which a static plan is reached (`gradual`, {PATTERN}, every "
            "layer but the first and the last), gates are trained, or both; dense just trains on. One seed.",
            "",
            f"Latency: one image at a time, one thread, the call from Python included; {IMAGES} test images, each the "
            f"median of {ROUNDS} rounds in which the models took turns. p50 and p95 are over images. Live: share of "
            "the gates' groups. Static, same ms: test accuracy of a static plan that takes as long on average, between "
            "the measured ones. Faster: than a static plan of the same validation accuracy, likewise; MORE where no "
            "static plan is as good.",
            "",
            _main_table(rows, points, gains),
            _verdict(gains),
            "## Where the time goes",
            "",
            "Microseconds an image. Call: Python around the native code. All live: the same model, gates open; "
            "against the row of the same sparsity without gates it shows what predictors, lists of live positions and "
            "smaller groups of filters cost.",
            "",
            _profile_table(rows),
            "## Live share and latency, whatever the accuracy",
            "",
            "Milliseconds of untrained models; the first convolution of each block is gated, so that it computes and "
            "the second reads so many of the channels.",
            "",
            _mechanism_table(mechanism),
            f"{machine_text()}.",
            "",
        ]
    )


def _gain(points: Sequence[Point], row: Measured) -> float | None:
    ms = static_ms(points, row.run.validation)
    return None if ms is None else ms / row.mean_ms


def _main_table(
    rows: Sequence[Measured], points: Mapping[str, Sequence[Point]], gains: Mapping[Measured, float | None]
) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: (bool(row.run.variant.place), row.mean_ms)):
        same = static_accuracy(points["test"], row.mean_ms)
        gated, gain = row in gains, gains.get(row)
        lines.append(
            [
                str(row.run.variant),
                f"{100 * row.run.validation:.2f}",
                f"{100 * row.run.test:.2f}",
                f"{100 * row.live:.0f}%" if gated else MISSING,
                f"{row.mean_ms:.3f}",
                f"{np.quantile(row.per_image, 0.5):.3f}",
                f"{np.quantile(row.per_image, 0.95):.3f}",
                f"{100 * same:.2f}" if gated and same is not None else MISSING,
                MISSING if not gated else "MORE" if gain is None else f"{gain:.2f}x",
            ]
        )
    header = ("row", "validation %", "test %", "live", "mean ms", "p50", "p95", "static, same ms", "faster")
    return markdown_table(header, lines)


def _verdict(gains: Mapping[Measured, float | None]) -> str:
    beyond = [row for row, gain in gains.items() if gain is None]
    known = {row: gain for row, gain in gains.items() if gain is not None}
    said = []
    if known:
        best = max(known, key=known.__getitem__)
        word = "reached" if known[best] >= BAR else "missed"
        said.append(
            f"The bar of {BAR}x at equal validation accuracy is {word}: {known[best]:.2f}x ({best.run.variant})."
        )
    if beyond:
        said.append(f"{len(beyond)} rows are more accurate than every static plan, on the validation split.")
    return "\n".join([*said, ""])


def _profile_table(rows: Sequence[Measured]) -> str:
    lines = [
        [str(row.run.variant), *(f"{value:.1f}" for value in row.profile.values()), f"{1e3 * row.all_live_ms:.1f}"]
        for row in rows
    ]
    return markdown_table(("row", *(rows[0].profile if rows else ()), "all live"), lines)


def _mechanism_table(found: Mapping[tuple[str, float, float | None], float]) -> str:
    lines = []
    for widths in dict.fromkeys(name for name, _, _ in found):
        for sparsity in SPARSITIES:
            plain = found[widths, sparsity, None]
            cells = [
                f"{found[widths, sparsity, share]:.3f} ({plain / found[widths, sparsity, share]:.2f}x)"
                for share in SHARES
            ]
            lines.append([widths, f"{100 * sparsity:g}%", f"{plain:.3f}", *cells])
    return markdown_table(("widths", "static", "no gates", *(f"{100 * share:g}% live" for share in SHARES)), lines)
