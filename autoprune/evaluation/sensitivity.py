"""Sensitivity: what pruning one layer alone does, at anchor sparsities, told by one calibration pass.

Nothing is evaluated. A forward and a backward pass give every layer's input x and the gradient g of each sample's loss
at its output; what a mask takes away from that output is e = (W - masked W) x, a product with the layer alone. Then

- loss: half the mean over samples of (g . e)^2, the rise of the loss to second order, for targets drawn from the
  model's own predictions, which makes g's outer product the Fisher information, the Hessian of a model that fits
  (Kunstner et al. 2019; the same expansion as OBD, LeCun et al. 1990, without dropping what weights have in common);
- error: |e|^2 over the output's variance, the reconstruction error (as in SPDY, Frantar and Alistarh 2022).

Where a batch norm reads the output, e is what is left after its statistics are taken again, as every recovery does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from autoprune.errors import AutopruneError, FileError
from autoprune.evaluation.recovery import Subject
from autoprune.files import read_json, write_json
from autoprune.identity.fingerprint import fingerprint
from autoprune.latency.quiet import working
from autoprune.masks import masks_at
from autoprune.model.arguments import Arguments, call_with
from autoprune.model.given import called, check_loss
from autoprune.model.uses import Use, watch_weights
from autoprune.model.weights import as_read
from autoprune.plan import LayerPlan, LayerSpec, Plan
from autoprune.progress import SILENT, Progress
from autoprune.registry import Choice

ANCHORS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
SAMPLES = 256  # of a small model
WORK = 4e11  # multiply-accumulates a probe may take: a large model is probed with fewer samples
FEWEST = 8
_PRODUCTS = len(ANCHORS) + 5  # a forward, a backward of about three, and one product for each anchor and the whole

SENSITIVITY_VERSION = 3


@dataclass(frozen=True)
class Sensitivity:
    """A curve a layer over `anchors`, never falling.

    Attributes:
        loss: rise of the loss when the layer alone is pruned so far, in the loss's unit.
        error: share of the variance of the layer's output that is lost.
    """

    anchors: tuple[float, ...]
    loss: Mapping[str, tuple[float, ...]]
    error: Mapping[str, tuple[float, ...]]


def probe_sensitivity(
    subject: Subject,
    names: Sequence[str],
    pattern: Choice,
    criterion: Choice,
    *,
    path: Path | None = None,
    progress: Progress = SILENT,
) -> Sensitivity:
    """Probes all layers in one calibration pass.

    Args:
        subject: the dense model, its calibration batches and what the criteria know of its layers.
        names: the layers.
        pattern: of the masks; likewise `criterion`.
        criterion: scores the weights.
        path: a JSON file that keeps the curves, and gives them back when it was written for the same probe.
        progress: shows a bar over the batches.

    Raises:
        AutopruneError: the calibration batches never reach a layer.
    """
    about = {
        "version": SENSITIVITY_VERSION,
        "anchors": list(ANCHORS),
        "pattern": str(pattern),
        "criterion": str(criterion),
        "of": fingerprint([subject.dense, subject.task.calibration, subject.task.loss, subject.seed]),
    }
    if path is not None and path.exists() and (found := _read(path, about, names)) is not None:
        return found
    plan = Plan(dict.fromkeys(names, LayerPlan(max(ANCHORS), pattern, criterion)))
    with working():
        masks = masks_at(subject.dense, subject.inventory, plan, subject.statistics, ANCHORS)
        found = _probe(subject, names, masks, progress)
    if path is not None:
        write_json(path, {**about, "loss": dict(found.loss), "error": dict(found.error)})
    return found


def _probe(
    subject: Subject, names: Sequence[str], masks: Mapping[str, Sequence[Tensor]], progress: Progress
) -> Sensitivity:
    model = copy.deepcopy(subject.dense).eval()
    model.requires_grad_(True)  # not every parameter of a user's model may
    probes = {name: _LayerProbe(subject.inventory[name], masks[name]) for name in names}
    draws = torch.Generator().manual_seed(subject.seed)
    batches = list(_samples(subject))

    batch = 1

    def seen(name: str, use: Use) -> None:
        probes[name].watch(use, batch)

    with progress.bar("sensitivity", len(batches)) as bar, torch.enable_grad():
        for number, (inputs, target) in enumerate(batches, 1):
            with called(f"the sensitivity cannot be probed on batch {number} of the calibration data"):
                batch = max(1, Arguments.of(inputs).samples)
                with watch_weights(model, names, seen):
                    output = call_with(model, inputs)
                # A mean over samples: each sample's own gradient is as many times larger.
                loss = subject.task.loss(output, _drawn_targets(output, target, draws))
                check_loss(loss)
            torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
            for probe in probes.values():
                probe.end_batch(len(target))
            bar.advance()
    if missing := [name for name, probe in probes.items() if not probe.samples]:
        raise AutopruneError(f"calibration never reached {', '.join(missing)}: give batches that run the whole model.")
    return Sensitivity(
        ANCHORS,
        {name: _rising(probe.loss / probe.samples) for name, probe in probes.items()},
        {name: _rising(probe.lost / max(probe.variance, 1e-12)) for name, probe in probes.items()},
    )


def _samples(subject: Subject) -> Iterator[tuple[Any, Tensor]]:
    """Calibration batches, as many samples as the model's size leaves room for."""
    batch = max(1, Arguments.of(subject.task.example_inputs(1)).samples)
    macs = sum(layer.macs for layer in subject.inventory.layers) / batch
    left = int(min(SAMPLES, max(FEWEST, WORK / (max(1.0, macs) * _PRODUCTS))))
    for inputs, target in subject.task.calibration:
        if left <= 0:
            return
        yield Arguments.of(inputs).of_samples(left), target[:left]
        left -= len(target)


def _drawn_targets(output: Any, target: Tensor, draws: torch.Generator) -> Tensor:
    """Classes drawn from the model's predictions; a target that is no class, or below 0 (to be ignored), stays."""
    classes = isinstance(output, Tensor) and not target.is_floating_point() and output.shape[:-1] == target.shape
    if not classes:
        return target
    shares = output.detach().softmax(-1).flatten(0, -2)  # (samples, classes)
    drawn = torch.multinomial(shares, 1, generator=draws).reshape(target.shape)
    return torch.where(target < 0, target, drawn)


@dataclass
class _LayerProbe:
    """What is summed of one layer while batches pass."""

    spec: LayerSpec
    masks: Sequence[Tensor]
    samples: int = 0
    loss: Tensor = field(default_factory=lambda: torch.zeros(len(ANCHORS), dtype=torch.float64))
    lost: Tensor = field(default_factory=lambda: torch.zeros(len(ANCHORS), dtype=torch.float64))
    variance: float = 0.0
    _slopes: Tensor | None = None  # g . e of each sample of the batch, over all calls: (anchors, samples)

    def watch(self, use: Use, batch: int) -> None:
        """Takes in one use of the weight, on a batch of so many samples: the rest follows in the backward pass."""
        x, output = use.by_sample(use.x.detach(), batch), use.output

        def arrived(gradient: Tensor) -> None:
            self._add(use, x, use.by_sample(gradient.reshape(output.shape), batch))

        # A hook on the base: an in-place ReLU after a view would take a hook on the view away.
        base = output._base if output._is_view() else output
        cast("Tensor", base).register_hook(arrived)

    @torch.no_grad()
    def _add(self, use: Use, x: Tensor, gradient: Tensor) -> None:
        convolution = use.kind != "linear"
        whole = _by_channel(_product(use, x, use.weight), convolution)
        mean = whole.mean((0, 2), keepdim=True)
        self.variance += float((whole - mean).square().sum())
        if self.spec.norm is not None:
            whole = whole - mean
        given = _by_channel(gradient, convolution)
        # Passes over feature maps are dear: the error is never made, its sums are put together from products by sample
        # and channel of the output (o), what the mask leaves of it (l) and the gradient (g).
        fixed = torch.stack([whole, given], dim=2)
        oo, og = _products(fixed, whole)
        g = given.sum(2).double()
        count = whole.shape[0] * whole.shape[2]
        slopes = []
        for place, mask in enumerate(self.masks):
            left = _by_channel(_product(use, x, use.weight * as_read(mask, use.turned)), convolution)
            lo, lg = _products(fixed, left)
            ll = _products(left.unsqueeze(2), left)[0].sum(0)
            if self.spec.norm is not None:  # what is left gets the output's deviation, and no mean
                mean = left.sum(2).double().sum(0) / count
                ll = (ll - count * mean.square()).clamp(min=0.0)
                scale = _deviation(oo.sum(0), count) / (_deviation(ll, count) + 1e-6)
                lg = lg - mean * g
            else:
                scale = torch.ones_like(ll)
            error = (oo - 2.0 * scale * lo).sum() + (scale.square() * ll).sum()
            self.lost[place] += max(0.0, float(error))
            slopes.append((og - scale * lg).sum(1))
        stacked = torch.stack(slopes)
        self._slopes = stacked if self._slopes is None else self._slopes + stacked

    def end_batch(self, samples: int) -> None:
        """Squares what the batch gave; of a mean of losses, a sample's own gradient is `samples` times as large."""
        if self._slopes is None:
            return
        self.loss += 0.5 * (self._slopes * samples).square().mean(1) * samples
        self.samples += samples
        self._slopes = None


def _product(use: Use, x: Tensor, weight: Tensor) -> Tensor:
    """The layer without its bias, with another weight."""
    if use.kind == "linear":
        return functional.linear(x, weight)
    convolve = {"conv1d": functional.conv1d, "conv2d": functional.conv2d}[use.kind]
    return convolve(x, weight, None, **use.settings)


def _by_channel(values: Tensor, convolution: bool) -> Tensor:
    """A layer's output or its gradient as (samples, channels, positions)."""
    if not convolution:
        values = values.movedim(-1, 1)
    return values.reshape(*values.shape[:2], -1)


def _products(several: Tensor, one: Tensor) -> tuple[Tensor, ...]:
    """Of each of `several` (samples, channels, k, positions) with `one`, summed over positions: k of float64."""
    return torch.matmul(several, one.unsqueeze(3)).squeeze(3).double().unbind(2)


def _deviation(squares: Tensor, count: int) -> Tensor:
    return (squares / max(1, count - 1)).sqrt()


def _rising(values: Tensor) -> tuple[float, ...]:
    return tuple(accumulate((max(0.0, float(value)) for value in values), max))


def _read(path: Path, about: Mapping[str, Any], names: Sequence[str]) -> Sensitivity | None:
    """The curves of a file, None when it holds those of another probe."""
    data = read_json(path, "the sensitivity curves")
    try:
        if any(data[key] != value for key, value in about.items()) or set(data["loss"]) != set(names):
            return None
        loss, error = (
            {name: tuple(float(value) for value in data[kind][name]) for name in names} for kind in ("loss", "error")
        )
        if any(len(curve) != len(ANCHORS) for curve in (*loss.values(), *error.values())):
            raise ValueError("a curve is short")
    except (KeyError, TypeError, ValueError, AttributeError) as error_:
        raise FileError(f"the sensitivity curves are corrupt: {path} ({error_}). Delete the file.") from None
    return Sensitivity(ANCHORS, loss, error)
