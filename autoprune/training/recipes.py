"""How a model is fine-tuned unless its user says otherwise: by what it is made of."""

from __future__ import annotations

from torch import nn

from autoprune.settings import TrainingSettings

CONVOLUTIONAL = TrainingSettings(epochs=10, learning_rate=0.02)
"""Networks with batch norms, or none: SGD with momentum."""

SEQUENTIAL = TrainingSettings(
    epochs=10, learning_rate=1e-3, optimizer="adamw", weight_decay=0.01, warmup=0.1, clip_norm=1.0
)
"""Encoders and recurrent networks: plain SGD moves their norms and gates too far or not at all."""

_SEQUENTIAL_PARTS = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.LayerNorm, nn.RMSNorm)


def recipe_for(model: nn.Module) -> TrainingSettings:
    """The settings that fine-tune a model of this kind."""
    sequential = any(isinstance(module, _SEQUENTIAL_PARTS) for module in model.modules())
    return SEQUENTIAL if sequential else CONVOLUTIONAL
