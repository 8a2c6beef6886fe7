"""What `python -m benchmarks dynamic` shows: gates against static plans of the same accuracy or latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autoprune.report.table import MISSING, markdown_table
from benchmarks.dynamic_runs import PATTERN, SETTINGS, TASK
from benchmarks.dynamic_times import IMAGES, ROUNDS, SHARES, SPARSITIES, Measured
from benchmarks.lib.page import page
from benchmarks.lib.provenance import Provenance

BAR = 1.2
TYPICAL = 0.92  # accuracy
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


@dataclass(frozen=True)
class Gain:
    """How many times faster a row is than a static plan of its accuracy; None where none is as good.

    Attributes:
        validation: at equal accuracy on the validation split; rows are chosen by it.
        test: at equal accuracy on the test split.
        native: likewise, of the native code without the call from Python.
    """

    validation: float | None
    test: float | None
    native: float | None


def gain(static: Sequence[Measured], row: Measured) -> Gain:
    """Compares a row with gates with the static plans."""

    def at(split: str, ms: Callable[[Measured], float]) -> float | None:
        found = static_ms([(ms(each), getattr(each.run, split)) for each in static], getattr(row.run, split))
        return None if found is None else found / ms(row)

    call = at("validation", _call_ms), at("test", _call_ms)
    return Gain(*call, at("test", lambda each: each.mean_native_ms))


def _call_ms(row: Measured) -> float:
    return row.mean_ms


def report(rows: Sequence[Measured], mechanism: Mapping[tuple[str, float, float | None], float]) -> str:
    static = [row for row in rows if not row.run.variant.place]
    gains = {row: gain(static, row) for row in rows if row.run.variant.place}
    return page(
        "Dynamic channel gates",
        "dynamic",
        f"{TASK}: a dense start of {SETTINGS.epochs} epochs, then "
        f"{SETTINGS.epochs} more in every row, in which a static plan is reached (`gradual`, {PATTERN}, every "
        "layer but the first and the last), gates are trained, or both; dense just trains on. One seed: the "
        f"standard error of an accuracy is about {100 * _noise(5_000):.1f} points on the validation split and "
        f"{100 * _noise(10_000):.1f} on the test split.",
        f"Latency: one image at a time, one thread; {IMAGES} test images, each the median of {ROUNDS} rounds in "
        "which the models took turns. Mean, p50 and p95 are over images, of a call from Python; native is the mean "
        "of the native code alone. Live: share of the gates' groups. Static, same ms: test accuracy of a static "
        "plan whose call takes as long on average, between the measured ones. Faster: than a static plan of the "
        "same accuracy, likewise: by validation accuracy, by test accuracy, and the native code by test accuracy; "
        "MORE where no static plan is as good.",
        _main_table(rows, static, gains),
        _verdict(gains),
        "## Where the time goes",
        "Microseconds an image. Call: Python around the native code. All live: a call of the same model, gates "
        "open; against the row of the same sparsity without gates it shows what predictors, lists of live "
        "positions and smaller groups of filters cost.",
        _profile_table(rows),
        "## Live share and latency, whatever the accuracy",
        "Milliseconds a call of untrained models; the first convolution of each block is gated, so that it "
        "computes and the second reads so many of the channels.",
        _mechanism_table(mechanism),
        str(Provenance.here()),
    )


def _noise(samples: int) -> float:
    return float(np.sqrt(TYPICAL * (1 - TYPICAL) / samples))


def _times(factor: float | None) -> str:
    return "MORE" if factor is None else f"{factor:.2f}x"


def _main_table(rows: Sequence[Measured], static: Sequence[Measured], gains: Mapping[Measured, Gain]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: (bool(row.run.variant.place), row.mean_ms)):
        line = [
            str(row.run.variant),
            f"{100 * row.run.validation:.2f}",
            f"{100 * row.run.test:.2f}",
            f"{100 * row.live:.0f}%" if row in gains else MISSING,
            f"{row.mean_ms:.3f}",
            f"{np.quantile(row.per_image, 0.5):.3f}",
            f"{np.quantile(row.per_image, 0.95):.3f}",
            f"{row.mean_native_ms:.3f}",
        ]
        if row in gains:
            same = static_accuracy([(each.mean_ms, each.run.test) for each in static], row.mean_ms)
            found = gains[row]
            line += [MISSING if same is None else f"{100 * same:.2f}"]
            line += [_times(found.validation), _times(found.test), _times(found.native)]
        else:
            line += [MISSING] * 4
        lines.append(line)
    header = ("row", "validation %", "test %", "live", "mean ms", "p50", "p95", "native")
    return markdown_table((*header, "static, same ms", "faster (val)", "faster (test)", "faster (native)"), lines)


def _verdict(gains: Mapping[Measured, Gain]) -> str:
    beyond = [row for row, found in gains.items() if found.validation is None]
    known = {row: found for row, found in gains.items() if found.validation is not None}
    said = []
    if known:
        best = max(known, key=lambda row: known[row].validation or 0.0)
        found = known[best]
        word = "reached" if (found.validation or 0.0) >= BAR else "missed"
        said.append(
            f"The bar of {BAR}x at equal validation accuracy is {word}: {_times(found.validation)} "
            f"({best.run.variant}); on the test split {_times(found.test)}, {_times(found.native)} without the call."
        )
    if beyond:
        said.append(f"{len(beyond)} rows are more accurate than every static plan, on the validation split.")
    return "\n".join(said)


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
