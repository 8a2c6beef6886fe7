"""Pruning in a Lightning Trainer's loop; needs the extra `lightning`."""

from __future__ import annotations

from typing import Any

from autoprune.extras import needs
from autoprune.hooks import PruningHooks

with needs("lightning", "autoprune.integrations.lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer


class PruningCallback(Callback):  # type: ignore[misc]  # Lightning is not installed wherever types are checked
    """Prunes while the Trainer trains, to the sparsity or the speed-up that the hooks were made for.

        pruning = PruningHooks(lit.net, images, "gradual", sparsity=0.9)
        Trainer(max_epochs=10, accelerator="cpu", callbacks=[PruningCallback(pruning)]).fit(lit, loader)
        fast = autoprune.repack(lit.net.eval(), images[:1])

    Checkpoints of the Trainer hold its state. The whole number of steps must be trained, so that the target is met: a
    training that stops early ends with the error of `PruningHooks.finish`.

    Args:
        pruning: of the network that the LightningModule trains with its one optimizer; made before ``fit``.
    """

    def __init__(self, pruning: PruningHooks) -> None:
        self.pruning = pruning
        self._steps = 0
        self._training = False
        self._restored: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pruning.start(trainer.optimizers[0], trainer.estimated_stepping_batches)
        self._steps, self._training = trainer.global_step, True
        if self._restored:
            self.pruning.load_state_dict(self._restored)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step > self._steps:  # not at batches whose gradients are accumulated
            self._steps = trainer.global_step
            self.pruning.after_step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = False
        self.pruning.finish()

    def state_dict(self) -> dict[str, Any]:
        return dict(self.pruning.state_dict()) if self._training else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict  # the hooks take it when they have their optimizer
