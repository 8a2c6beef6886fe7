"""Fine-tuning of what will run in int8."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from autoprune.evaluation.recovery import finetune
from autoprune.evaluation.recovery.finetune import finetune_
from autoprune.masks import sparsity
from autoprune.model.weights import weight_of
from autoprune.plan import LayerPlan, Plan
from autoprune.quantization import grids_of
from autoprune.registry import Choice
from autoprune.repack import quantize_
from autoprune.settings import TrainingSettings
from autoprune.testing.recoveries import subject_to_recover

# Half of the epochs, distilled from the dense model and from an average of the model that is never quantised.
SETTINGS = TrainingSettings(epochs=4, distillation_weight=0.5, ema_teacher=0.9, quantize_from=0.5)


def test_it_trains_rounded_values_and_leaves_plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, ends, quantised = subject_to_recover(), {}, []

    def recorded(model: nn.Module, **given: Any) -> None:
        quantize_(model, **given)
        quantised.append((given["precision"], list(grids_of(model))))

    monkeypatch.setattr(finetune, "quantize_", recorded)
    layer = LayerPlan(0.5, Choice("group", {"size": 4}))
    plan = Plan(dict.fromkeys(subject.inventory.names, layer), Choice("gradual"))
    for precision in ("float32", "int8"):
        model = copy.deepcopy(subject.dense)
        finetune_(model, plan, subject, SETTINGS, precision=precision)
        assert not grids_of(model)
        assert list(model.state_dict()) == list(subject.dense.state_dict())
        weights = [weight_of(model, name) for name in subject.inventory.names]
        assert all(abs(sparsity(weight != 0) - 0.5) < 0.1 for weight in weights)
        ends[precision] = weights[0]
    assert quantised == [("int8", ["0.int8_input", "3.int8_input", "5.int8_input"])]
    assert not torch.equal(ends["float32"], ends["int8"])
