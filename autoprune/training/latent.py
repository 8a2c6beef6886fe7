"""Methods that keep the dense weights behind the masked ones, so that what is cut can come back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from autoprune.masks import filter_rows, live_filters, silent_filters
from autoprune.model.recurrent.names import partner_of
from autoprune.model.weights import as_held
from autoprune.plan import LayerSpec
from autoprune.training.base import Pruner, Signals, SparseTraining

RESTART = 1e-3  # of the size of a layer's weights


def regrown(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Weights that `before` cut and `after` keeps, over those `before` cut; 0 when it cut none."""
    cut = sum(int((~mask).sum()) for mask in before.values())
    back = sum(int((~mask & after[name]).sum()) for name, mask in before.items() if name in after)
    back += sum(int((~mask).sum()) for name, mask in before.items() if name not in after)
    return back / cut if cut else 0.0


def lasting(layer: LayerSpec, mask: Tensor) -> Tensor:
    """The weights that `LatentTraining.restart_` leaves as they are; bool, in the mask's shape.

    They are those that the mask keeps, and all of a filter that it cuts as a whole: through an activation a filter of
    zeros learns nothing, and behind a norm its gradients are huge.
    """
    rows = ~live_filters(layer, mask)
    silent = rows.reshape(-1, *[1] * (len(layer.weight_shape) - 1)).expand(layer.weight_shape)
    return mask | as_held(silent, layer.turned)


class LatentTraining(SparseTraining):
    """A method that keeps the dense weights behind the masked ones, so that what is cut can come back.

    The optimizer moves the dense weights (`latent`); the model computes with `effective` ones, and so do all its
    gradients. `before_step` turns those gradients into the latent weights' (`pull_back`) and puts the latent weights
    in place for the optimizer; `after_step` takes them out again. Nothing of the model is replaced or wrapped.
    A filter that is cut as a whole is silent in the model: its bias and its batch norm's weight and bias are 0, and
    come back with it.

    Attributes:
        latent: layer -> dense weight.
        rows: layer -> parameter with one entry a filter (`filter_rows`) -> its value where no filter is silent.
        total_steps: of the run.
        regrowth: share of the weights cut before the last `set_masks` that it kept.
    """

    latent: dict[str, Tensor]
    rows: dict[str, dict[str, Tensor]]
    total_steps: int
    regrowth: float

    def start(self, pruner: Pruner, total_steps: int) -> None:
        self.pruner, self.total_steps = pruner, total_steps
        self.latent = {name: pruner.weight(name).detach().clone() for name in pruner.layers}
        self._rows = {name: filter_rows(pruner.model, pruner.inventory[name]) for name in pruner.layers}
        self.rows = {name: {p: x.detach().clone() for p, x in rows.items()} for name, rows in self._rows.items()}
        self.masks = {}
        self.regrowth = 0.0
        self._latent_is_in_place = False
        self.prepare()
        self._show_effective_()

    def prepare(self) -> None:
        """Called once by `start`, when `pruner`, `latent`, `masks` (none) and `total_steps` are there."""

    @abstractmethod
    def update(self, step: int) -> None:
        """Called after each optimizer step, counted from 1; `latent` has just moved. May change `masks`."""

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Takes new masks, and notes what came back."""
        self.regrowth = regrown(self.masks, masks)
        self.masks = dict(masks)

    @torch.no_grad()
    def restart_(self) -> None:
        """Sets what the masks cut to where it is to start from when it returns, as good as zero.

        That is a thousandth of the root mean square of what the layer keeps, with the weight's sign: a zero would look
        cut, and might stay one. What `lasting` says keeps its value.
        """
        for name, mask in self.masks.items():
            latent = self.latent[name]
            size = (latent.square() * mask).sum().div(mask.sum().clamp(min=1)).sqrt()
            start = torch.copysign(RESTART * size, latent)
            latent.copy_(torch.where(lasting(self.pruner.inventory[name], mask), latent, start))

    def effective(self, name: str, latent: Tensor) -> Tensor:
        """The weight the model computes with, 0 where the mask cuts."""
        return latent * self.masks[name] if name in self.masks else latent

    def pull_back(self, name: str, latent: Tensor, gradient: Tensor) -> Tensor:
        """The latent weight's gradient, from the effective one's: straight through, unless a method knows better."""
        return gradient

    def before_step(self, step: int) -> None:
        with torch.no_grad():
            for name, latent in self.latent.items():
                weight = self.pruner.weight(name)
                if weight.grad is not None:
                    weight.grad.copy_(self.pull_back(name, latent, weight.grad))
                weight.copy_(latent)
        self._place_rows_()

    def _place_rows_(self) -> None:
        """The latent weights are in place for the optimizer; puts the rows of silent filters there too."""
        with torch.no_grad():
            for name, rows in self.rows.items():
                for parameter, row in rows.items():
                    self._rows[name][parameter].copy_(row)
        self._latent_is_in_place = True

    def after_step(self, step: int) -> None:
        if self._latent_is_in_place:  # a skipped step (loss scaling) has no `before_step`
            with torch.no_grad():
                for name, latent in self.latent.items():
                    latent.copy_(self.pruner.weight(name))
                    for parameter, row in self.rows[name].items():
                        row.copy_(self._rows[name][parameter])
            self._latent_is_in_place = False
        self.update(step)
        self._show_effective_()

    def _show_effective_(self) -> None:
        with torch.no_grad():
            shown = {name: self.effective(name, latent) for name, latent in self.latent.items()}
            for name, effective in shown.items():
                self.pruner.weight(name).copy_(effective)
                silent = self._silent(name, shown) if self.rows[name] else None
                for parameter, row in self.rows[name].items():
                    self._rows[name][parameter].copy_(row if silent is None else row.masked_fill(silent, 0.0))

    def _silent(self, name: str, shown: Mapping[str, Tensor]) -> Tensor | None:
        """The filters that are cut as a whole, ``(out,)``, not those that are zero of themselves; None for none."""
        layer = self.pruner.inventory[name]
        silent = silent_filters(layer, shown)
        if silent is None:
            return None
        cut = torch.zeros_like(silent)
        for each in (name, partner_of(name)):
            if each is not None:
                cut |= live_filters(layer, self.latent[each])
                if each in self.masks:
                    cut |= ~live_filters(layer, self.masks[each])
        return silent & cut

    def signals(self) -> Signals:
        signals = super().signals()
        return replace(signals, scalars={**signals.scalars, "regrowth": self.regrowth})

    def state(self) -> dict[str, Tensor]:
        masks = {f"mask.{name}": mask for name, mask in self.masks.items()}
        latent = {f"latent.{name}": latent for name, latent in self.latent.items()}
        rows = {f"row.{parameter}": row for rows in self.rows.values() for parameter, row in rows.items()}
        return masks | latent | rows

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.masks = {name.removeprefix("mask."): value for name, value in state.items() if name.startswith("mask.")}
        for name, latent in self.latent.items():
            latent.copy_(state[f"latent.{name}"])
            for parameter, row in self.rows[name].items():
                row.copy_(state[f"row.{parameter}"])
        self._show_effective_()
