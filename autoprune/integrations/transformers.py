"""Pruning in a Hugging Face Trainer's loop; needs the extra `transformers`."""

from __future__ import annotations

from typing import Any

from autoprune.errors import AutopruneError
from autoprune.extras import needs
from autoprune.hooks import PruningHooks

with needs("transformers", "autoprune.integrations.transformers"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class PruningCallback(TrainerCallback):  # type: ignore[misc]  # it is not installed wherever types are checked
    """Prunes while the Trainer trains, to the sparsity or the speed-up that the hooks were made for.

        pruning = PruningHooks(model, dict(tokens), "gradual", sparsity=0.8)
        Trainer(model, arguments, train_dataset=data, callbacks=[PruningCallback(pruning)]).train()
        fast = autoprune.repack(model.eval(), dict(tokens))

    The whole number of steps must be trained, so that the target is met: a training that stops early ends with the
    error of `PruningHooks.finish`. A training that is resumed from a checkpoint is refused: the Trainer keeps no
    tensors of callbacks.

    Args:
        pruning: of the model that the Trainer trains; made before ``train``.
    """

    def __init__(self, pruning: PruningHooks) -> None:
        self.pruning = pruning

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step:
            raise AutopruneError(
                f"a pruning training cannot be resumed, here from step {state.global_step}: train anew, or use "
                "PruningHooks in a loop of your own, which keeps their state_dict."
            )
        optimizer = kwargs["optimizer"]
        self.pruning.start(getattr(optimizer, "optimizer", optimizer), state.max_steps)  # accelerate wraps it

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.pruning.after_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pruning.finish()
