"""Pruning as a callback of Lightning's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import autoprune
from autoprune import PruningHooks
from autoprune.errors import AutopruneError
from autoprune.masks import sparsity

pytest.importorskip("lightning", reason='pip install "autoprune[lightning]"')

from lightning.pytorch import LightningModule, Trainer

from autoprune.integrations.lightning import PruningCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, of workers and loggers
X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
LOADER = DataLoader(TensorDataset(X, (X.sum(1) > 0).long()), 8)


class Lit(LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 32)
        self.net = nn.Sequential(self.first, nn.ReLU(), nn.Linear(32, 2))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def trainer(folder: Path, *callbacks: Any, epochs: int = 4, **more: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **quiet, **more
    )


def zeros(lit: Lit) -> float:
    return sparsity(lit.first.weight)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("method", ["gradual", "adaptive"])
def test_a_trainer_prunes_to_a_sparsity(tmp_path: Path, method: str, accumulated: int) -> None:
    lit = Lit()
    pruning = PruningHooks(lit.net, X[:1], method, sparsity=0.75, pattern="unstructured", keep_dense=["2"])
    trainer(tmp_path, PruningCallback(pruning), accumulate_grad_batches=accumulated).fit(lit, LOADER)
    assert zeros(lit) == pytest.approx(0.75, abs=0.01)
    fast = autoprune.repack(lit.net.eval(), X[:1])
    with torch.inference_mode():
        torch.testing.assert_close(fast(X), lit.net(X), rtol=1e-4, atol=1e-5)


def test_a_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def pruned(lit: Lit) -> PruningHooks:
        return PruningHooks(lit.net, X[:1], "gradual", sparsity=0.75, keep_dense=["2"])

    whole = Lit()
    trainer(tmp_path, PruningCallback(pruned(whole))).fit(whole, LOADER)

    class Kept(PruningCallback):
        def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    Kept.__qualname__ = PruningCallback.__qualname__  # Lightning keeps states by the callback's name
    first, second = Lit(), Lit()
    trainer(tmp_path, Kept(pruned(first))).fit(first, LOADER)
    again = PruningCallback(pruned(second))
    trainer(tmp_path, again).fit(second, LOADER, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(second.first.weight, whole.first.weight)


def test_a_training_that_stops_early_says_so(tmp_path: Path) -> None:
    class Stop(PruningCallback):
        def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = True

    lit = Lit()
    with pytest.raises(AutopruneError, match="4 of 16"):
        trainer(tmp_path, Stop(PruningHooks(lit.net, X[:1], sparsity=0.5))).fit(lit, LOADER)
