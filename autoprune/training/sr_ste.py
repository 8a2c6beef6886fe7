"""SR-STE: sparse from the first step, dense weights behind the mask (Zhou et al. 2021, N:M from scratch).

The gradient goes straight through the mask to every weight, and the sparse-refined term ``decay * (1 - mask) * weight``
draws what is cut towards zero, so that the masks settle. The paper's masks are N:M ones; any pattern may take their
place, at the sparsities of the plan. The fading of what is cut is after Kao et al. 2022.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from autoprune.checks import check_counts, check_numbers
from autoprune.training.latent import LatentTraining


class SrSte(LatentTraining):
    """Every few steps the masks are made anew of the dense weights, at the plan's sparsities; what was cut may return.

    The paper neither fades nor freezes (``every=1, fade=0, freeze=1``); in runs of a few epochs its masks then change
    too long.

    Args:
        decay: of the weights that are cut, in units of their gradient as any weight decay; >= 0.
        every: steps between two sets of masks, >= 1; the paper's 1 costs the most.
        fade: fraction of the run over which the factor on what is cut falls from 1 to 0, linearly, in [0, 1]; 0 cuts
            at once.
        freeze: fraction of the run after which the masks stay as they are, in [fade, 1].
    """

    strength_range = ("decay", 2e-5, 2e-3)

    def __init__(self, decay: float = 2e-4, every: int = 10, fade: float = 0.4, freeze: float = 0.5) -> None:
        check_numbers("training method 'sr_ste'", {"decay": decay}, 0.0)
        check_counts("training method 'sr_ste'", {"every": every})
        check_numbers("training method 'sr_ste'", {"fade": fade}, 0.0, 1.0)
        check_numbers("training method 'sr_ste'", {"freeze": freeze}, fade, 1.0)
        self.decay, self.every, self.fade, self.freeze = decay, every, fade, freeze

    def prepare(self) -> None:
        self._fade_steps, self._last = int(self.fade * self.total_steps), int(self.freeze * self.total_steps)
        self.factor = 1.0 if self._fade_steps else 0.0
        self.set_masks(self.pruner.masks())

    def effective(self, name: str, latent: Tensor) -> Tensor:
        masked = super().effective(name, latent)
        return torch.lerp(masked, latent, self.factor) if self.factor else masked

    def pull_back(self, name: str, latent: Tensor, gradient: Tensor) -> Tensor:
        if name not in self.masks:
            return gradient
        return gradient + self.decay * latent * ~self.masks[name]

    def update(self, step: int) -> None:
        self.factor = max(0.0, 1.0 - step / self._fade_steps) if self._fade_steps else 0.0
        if step <= self._last and step % self.every == 0:
            self.set_masks(self.pruner.masks())

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"factor": torch.tensor(self.factor, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.factor = float(state["factor"])
        super().load_state(state)
