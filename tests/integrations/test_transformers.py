"""Pruning as a callback of Hugging Face's Trainer, and a causal language model as a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import autoprune
from autoprune import PruningHooks
from autoprune.errors import AutopruneError
from autoprune.masks import sparsity
from autoprune.registry import Choice
from autoprune.tasks import TASKS

pytest.importorskip("transformers", reason='pip install "autoprune[transformers]"')

from transformers import DistilBertConfig, DistilBertForSequenceClassification, Trainer, TrainingArguments

from autoprune.integrations.transformers import PruningCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
IDS = torch.randint(1, 50, (16, 6), generator=torch.Generator().manual_seed(0))
TOKENS = {"input_ids": IDS[:2], "attention_mask": torch.ones_like(IDS[:2])}


def classifier() -> Any:
    torch.manual_seed(0)
    size = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 50, "max_position_embeddings": 8}
    return DistilBertForSequenceClassification(DistilBertConfig(**size, num_labels=3))


def trained(model: Any, folder: Path, callback: Any, **more: Any) -> Trainer:
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": int(ids[0]) % 3} for ids in IDS]
    arguments = TrainingArguments(
        str(folder), num_train_epochs=4, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no", **more,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, callbacks=[callback])


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_trainer_prunes_to_a_sparsity(tmp_path: Path, accumulated: int) -> None:
    model = classifier()
    pruning = PruningHooks(model, TOKENS, "gradual", sparsity=0.75, pattern="unstructured", keep_dense=["*classifier"])
    trained(model, tmp_path, PruningCallback(pruning), gradient_accumulation_steps=accumulated).train()
    layer = model.distilbert.transformer.layer[0].ffn.lin1
    assert sparsity(layer.weight) == pytest.approx(0.75, abs=0.01)
    model.eval()
    fast = autoprune.repack(model, TOKENS)
    with torch.inference_mode():
        torch.testing.assert_close(fast(**TOKENS)["logits"], model(**TOKENS).logits, rtol=1e-3, atol=1e-4)


def test_a_training_that_stops_early_says_so(tmp_path: Path) -> None:
    class Stop(PruningCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    model = classifier()
    with pytest.raises(AutopruneError, match="4 of 16"):
        trained(model, tmp_path, Stop(PruningHooks(model, TOKENS, sparsity=0.5))).train()


PROJECT = """
import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification, GPT2Config, GPT2LMHeadModel

IDS = torch.randint(1, 50, (16, 6), generator=torch.Generator().manual_seed(0))

def gpt():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8)).eval()

def text():
    return [{"input_ids": IDS, "labels": IDS}], [{"input_ids": IDS, "labels": IDS}]

def bert():
    size = dict(dim=16, hidden_dim=32, n_layers=1, n_heads=2, vocab_size=50, max_position_embeddings=8)
    return DistilBertForSequenceClassification(DistilBertConfig(**size, num_labels=3)).eval()

def sentences():
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS[:, 0] % 3}
    return [batch], [batch]
"""


@pytest.mark.parametrize(("model", "data", "metric"), [("gpt", "text", "bits"), ("bert", "sentences", "accuracy")])
def test_models_of_hugging_face_are_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, data: str, metric: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf_project.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(tmp_path)
    task = TASKS.create(Choice("user", {"model": f"hf_project:{model}", "data": f"hf_project:{data}"}))
    assert task.facts["loss"] == "cross_entropy, as that is the model's own loss"
    assert task.metric.name == metric
    inputs, target = task.calibration[0]
    labels = inputs["input_ids"] if model == "gpt" else target
    own = task.model(**inputs, labels=labels).loss
    torch.testing.assert_close(task.loss(task.model(**inputs), target), own)
    fast = autoprune.repack(task.model, task.example_inputs(2))
    with torch.inference_mode():
        assert task.score(fast, [(inputs, target)]) == pytest.approx(task.evaluate(task.model), abs=1e-3)
