"""Sensitivity: what pruning one layer alone does, at anchor sparsities, told by one calibration pass.

Nothing is evaluated. A forward and a backward pass give every layer's input x and the gradient g of each sample's loss
at its output; what a mask takes away from that output is e = (W - masked W) x, a product with the layer alone. Then

- loss: half the mean over samples of (g . e)^2, the rise of the loss to second order, for targets drawn from the
  model's own predictions, which makes g's outer product the Fisher information, the Hessian of a model that fits
  (Kunstner et al. 2019; the same expansion as OBD, LeCun et al. 1990, without dropping what weights have in common);
- error: |e|^2 over the output's variance, the reconstruction error (as in SPDY, Frantar and Alistarh 2022).

Where a batch norm reads the output, e is what is left after its statistics are taken again, as every recovery does.
Of a layer in int8, e is what rounding its masked weight and its input takes away as well.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from autoprune.precision import OF_LAYERS, OfLayer, choices_of_layers
from autoprune.progress import SILENT, Progress
from autoprune.quantization import Grid, on_scales, weight_scales
from autoprune.registry import Choice

ANCHORS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
SAMPLES = 256  # of a small model
WORK = 4e11  # multiply-accumulates a probe may take: a large model is probed with fewer samples
FEWEST = 8
_PASSES = 5  # products that a probe takes besides one for each cut: a forward, a backward of about three, the whole

SENSITIVITY_VERSION = 3
_KINDS = ("loss", "error")


@dataclass(frozen=True)
class Sensitivity:
    """A curve a layer over `anchors`, never falling.

    Attributes:
        loss: rise of the loss when the layer alone is pruned so far, in the loss's unit.
        error: share of the variance of the layer's output that is lost.
        int8: the curves of layers that are in int8, too, from an anchor 0 on; None where plans have none.
    """

    anchors: tuple[float, ...]
    loss: Mapping[str, tuple[float, ...]]
    error: Mapping[str, tuple[float, ...]]
    int8: Sensitivity | None = None

    @property
    def from_zero(self) -> Sensitivity:
        """The same curves with an anchor 0, at which a layer in float32 loses nothing."""
        if self.anchors[0] == 0.0:
            return self
        loss, error = ({name: (0.0, *curve) for name, curve in each.items()} for each in (self.loss, self.error))
        return replace(self, anchors=(0.0, *self.anchors), loss=loss, error=error)

    def of(self, precision: OfLayer) -> Sensitivity:
        """The curves of layers of a precision, from an anchor 0 on.

        Raises:
            AutopruneError: int8 was not probed.
        """
        found = self if precision == "float32" else self.int8
        if found is None:
            raise AutopruneError(f"the sensitivity to {precision} was not probed: take precision 'planned'.")
        return found.from_zero


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
    several = len(choices_of_layers(subject.precision)) > 1
    about = {
        "version": SENSITIVITY_VERSION,
        "anchors": list(ANCHORS),
        "pattern": str(pattern),
        "criterion": str(criterion),
        "of": fingerprint([subject.dense, subject.task.calibration, subject.task.loss, subject.seed]),
        **({"precisions": list(OF_LAYERS)} if several else {}),
    }
    if path is not None and path.exists() and (found := _read(path, about, names)) is not None:
        return found
    plan = Plan(dict.fromkeys(names, LayerPlan(max(ANCHORS), pattern, criterion)))
    with working():
        masks = masks_at(subject.dense, subject.inventory, plan, subject.statistics, ANCHORS)
        found = _probe(subject, names, masks, progress)
    if path is not None:
        kept = {"": found} | ({} if found.int8 is None else {"int8_": found.int8})
        curves = {f"{prefix}{kind}": dict(getattr(of, kind)) for prefix, of in kept.items() for kind in _KINDS}
        write_json(path, {**about, **curves})
    return found


def _probe(
    subject: Subject, names: Sequence[str], masks: Mapping[str, Sequence[Tensor]], progress: Progress
) -> Sensitivity:
    model = copy.deepcopy(subject.dense).eval()
    model.requires_grad_(True)  # not every parameter of a user's model may
    several = len(choices_of_layers(subject.precision)) > 1
    probes = {name: _LayerProbe(subject.inventory[name], _cuts(masks[name], several)) for name in names}
    draws = torch.Generator().manual_seed(subject.seed)
    batches = list(_samples(subject, len(probes[names[0]].cuts)))

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

    def curves(anchors: tuple[float, ...], which: slice) -> Sensitivity:
        return Sensitivity(
            anchors,
            {name: _rising((probe.loss / probe.samples)[which]) for name, probe in probes.items()},
            {name: _rising((probe.lost / max(probe.variance, 1e-12))[which]) for name, probe in probes.items()},
        )

    whole = curves(ANCHORS, slice(len(ANCHORS)))
    return replace(whole, int8=curves((0.0, *ANCHORS), slice(len(ANCHORS), None))) if several else whole


@dataclass(frozen=True)
class _Cut:
    """What is left of a layer: its weight under a mask, the whole where that is None; rounded to bytes or not."""

    mask: Tensor | None
    in_bytes: bool = False

    def product(self, use: Use, x: Tensor) -> Tensor:
        """The layer's output without its bias."""
        weight = use.weight if self.mask is None else use.weight * as_read(self.mask, use.turned)
        if self.in_bytes:
            weight = on_scales(weight, weight_scales(weight))
            x = Grid.of_range(float(x.min()), float(x.max())).rounded(x)
        return _product(use, x, weight)


def _cuts(masks: Sequence[Tensor], several: bool) -> list[_Cut]:
    """One for each anchor; with `several` precisions one in bytes of the whole weight and of each anchor, too."""
    return [*map(_Cut, masks), *(_Cut(mask, True) for mask in (None, *masks) if several)]


def _samples(subject: Subject, cuts: int) -> Iterator[tuple[Any, Tensor]]:
    """Calibration batches, as many samples as the model's size leaves room for."""
    batch = max(1, Arguments.of(subject.task.example_inputs(1)).samples)
    macs = sum(layer.macs for layer in subject.inventory.layers) / batch
    left = int(min(SAMPLES, max(FEWEST, WORK / (max(1.0, macs) * (_PASSES + cuts)))))
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
    cuts: Sequence[_Cut]
    samples: int = 0
    loss: Tensor = field(init=False)  # (cuts,), likewise
    lost: Tensor = field(init=False)
    variance: float = 0.0
    _slopes: Tensor | None = None  # g . e of each sample of the batch, over all calls: (cuts, samples)

    def __post_init__(self) -> None:
        self.loss, self.lost = (torch.zeros(len(self.cuts), dtype=torch.float64) for _ in range(2))

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
        for place, cut in enumerate(self.cuts):
            left = _by_channel(cut.product(use, x), convolution)
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
        found = _curves(data, "", ANCHORS, names)
        if "precisions" in about:
            found = replace(found, int8=_curves(data, "int8_", (0.0, *ANCHORS), names))
    except (KeyError, TypeError, ValueError, AttributeError) as error_:
        raise FileError(f"the sensitivity curves are corrupt: {path} ({error_}). Delete the file.") from None
    return found


def _curves(data: Mapping[str, Any], prefix: str, anchors: tuple[float, ...], names: Sequence[str]) -> Sensitivity:
    loss, error = (
        {name: tuple(float(value) for value in data[f"{prefix}{kind}"][name]) for name in names} for kind in _KINDS
    )
    if any(len(curve) != len(anchors) for curve in (*loss.values(), *error.values())):
        raise ValueError("a curve is short")
    return Sensitivity(anchors, loss, error)
