"""What people give to `compress` and to the hooks: taken as it is meant, or refused before anything that takes long."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, prune
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

import autoprune
from autoprune import PruningHooks
from autoprune.errors import AutopruneError, ConfigError
from autoprune.model.copies import copy_for_inference
from autoprune.model.inventory import take_inventory
from autoprune.model.weights import weight_of
from autoprune.repack import ProgramModel
from autoprune.settings import TrainingSettings
from autoprune.tasks.checks import check_training, unfreeze_
from autoprune.training.loop import train_

QUICK = {
    "latency": {"samples": 3, "search_samples": 3, "profile_samples": 3, "engines": ["eager"]},
    "search": {"agent": "random", "episodes": 2, "finalists": 1, "rules": False},
    "env": {
        "min_saving": 0.0,
        "actions": ["sparsity"],
        "criterion": "gradient",
        "recovery": {"name": "train", "steps": 1},
    },
    "finetune": {"settings": {"max_steps": 1}},
}
TARGET = autoprune.Target(sparsity=0.5)
X = torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 4


def network(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 8)]
    return nn.Sequential(*layers, *([nn.BatchNorm1d(8)] if norm else []), nn.Linear(8, 4)).eval()


def batches(size: int = 6) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(size), Y.split(size), strict=True))


def accuracy(model: nn.Module) -> Tensor:
    return cast("Tensor", (model(X).argmax(1) == Y).float().mean())


def counted(evaluate: Callable[[nn.Module], Any]) -> tuple[list[nn.Module], Callable[[nn.Module], Any]]:
    seen: list[nn.Module] = []

    def evaluating(model: nn.Module) -> Any:
        seen.append(model)
        return evaluate(model)

    return seen, evaluating


def everything(model: nn.Module) -> list[Any]:
    """All that a caller could find changed."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    values = [(name, value.tolist(), value.requires_grad, value.is_inference()) for name, value in tensors]
    hooks = [
        (len(each._forward_hooks), len(each._forward_pre_hooks), "forward" in vars(each)) for each in model.modules()
    ]
    return [values, hooks, [(type(each), each.training) for each in model.modules()]]


def refusal(**given: Any) -> tuple[str, int]:
    """What `compress` says, and after how many evaluations; the model is as it was."""
    seen, evaluate = counted(given.pop("evaluate", accuracy))
    model = given.pop("model", network())
    told = isinstance(model, nn.Module) and not any(each.is_meta or is_lazy(each) for each in model.parameters())
    before = everything(model) if told else []
    with pytest.raises(AutopruneError) as refused:
        autoprune.compress(
            model,
            given.pop("train", batches()),
            evaluate,
            given.pop("example", X[:1]),
            given.pop("target", TARGET),
            **{"config": QUICK, **given},
        )
    assert (everything(model) if told else []) == before
    return str(refused.value), len(seen)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compress_works_frozen_and_without_gradients_and_leaves_the_model(mode: Any) -> None:
    """A deployment script: weights loaded for inference, under no_grad, with an evaluation that does as it likes."""
    with mode():
        model = network(norm=True).requires_grad_(False)
        model[0].requires_grad_(mode is torch.no_grad)
        before = everything(model)

        def evaluate(given: nn.Module) -> dict[str, Any]:
            given.train()
            for parameter in given.parameters():
                parameter.zero_()
            given.eval()
            return {"loss": None, "accuracy": torch.tensor(0.25).numpy()}

        seen, evaluating = counted(evaluate)
        done = autoprune.compress(model, batches(), evaluating, X[:1], TARGET, config=QUICK)
    assert everything(model) == before
    assert done.rows[0].score == 0.25
    assert len(seen) > 2
    assert not torch.is_inference_mode_enabled()
    assert done.model(X).shape == (12, 4)
    assert float(done.model(X).abs().max()) > 0, "what evaluate did to its model is no matter"


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        (lambda model: None, "None (is there a return missing?)"),
        (lambda model: {"acc": 0.9}, "'accuracy'"),
        (lambda model: 97.3, "a fraction, not a percentage"),
        (lambda model: float("nan"), "nan"),
        (lambda model: model(X).argmax(1) == Y, "shape (12,)"),
        (lambda model: model.fc(X), "cannot be evaluated: AttributeError"),
        (lambda model: model(X).sum().backward(), "cannot be evaluated: RuntimeError"),
        (lambda model: model.half()(X), "cannot be evaluated: a repacked model runs in float32"),
        (lambda model: model.double()(X), "cannot be evaluated: a repacked model runs in float32"),
        (lambda model: model.state_dict(), "cannot be evaluated: a repacked program has no state dict"),
        (lambda model: pickle.dumps(model), "is no pickle"),
        (lambda model: torch.jit.trace(model, X), "cannot be evaluated: a repacked program cannot be traced"),
        (lambda model: model[0], "cannot be evaluated: TypeError"),
        (lambda model: len(model), "cannot be evaluated: TypeError"),
    ],
)
def test_an_evaluation_that_gives_no_score_is_refused_at_its_first_call(evaluate: Any, said: str) -> None:
    message, calls = refusal(evaluate=evaluate)
    assert said in message
    assert calls == 1


class Stream:
    """Batches without a length, anew at each iteration."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(batches())


class Iterated:
    """Batches that are known by reading alone; a callable in place of one is called, to raise."""

    def __init__(self, given: list[Any]) -> None:
        self.given = given

    def __len__(self) -> int:
        return len(self.given)

    def __iter__(self) -> Iterator[Any]:
        return (each() if callable(each) else each for each in self.given)


class Once:
    """Each iteration goes on with the last one."""

    def __init__(self) -> None:
        self.iterator = iter(batches())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.iterator


def failing(error: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


ONE = "holds one sample"
LOADER = DataLoader(TensorDataset(X, Y), 4, shuffle=True)


@pytest.mark.parametrize(
    "train",
    [
        batches(),
        tuple(batches()),
        [list(each) for each in batches()],
        Stream(),
        LOADER,
        [((x,), y) for x, y in batches()],
    ],
    ids=lambda given: type(given).__name__,
)
def test_batches_of_many_kinds_are_trained_on(train: Any) -> None:
    before = torch.get_rng_state()
    check_training("train", network(norm=True), train, nn.functional.cross_entropy)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (iter(batches()), "again and again"),
        ((each for each in batches()), "not a generator"),
        (None, "not a NoneType"),
        ([], "train is empty"),
        (DataLoader(TensorDataset(X[:0], Y[:0]), 4), "train is empty"),
        ([(X, Y, torch.arange(12))], "cannot be trained on"),  # a model of one input
        ([{"image": X, "label": Y}], "cannot be trained on"),  # it is called `input`
        ([X], "cannot be trained on"),  # the loss needs a target
        ([()], "not a tuple of 0"),
        ([{}], "not a dict of 0"),
        (["text"], "must be an (inputs, target) pair, not a str"),
        ([(X, None)], "cannot be trained on"),
        ([(X, Y.float())], "cannot be trained on"),
        ([(X, Y + 4)], "cannot be trained on"),
        ([({"x": X}, Y)], "cannot be trained on"),
        ([(X[:, :, :5], Y)], "cannot be trained on"),
        ([(X / 0, Y)], "the loss of the first batch of train is nan"),
        (batches(11), "the last batch of train holds one sample"),
        (DataLoader(TensorDataset(X, Y), 11), "the last batch of train holds one sample"),
        (DataLoader(TensorDataset(X, Y), 1), "cannot be trained on"),
        (
            DataLoader(TensorDataset(X, Y), batch_sampler=BatchSampler(SequentialSampler(X), 11, False)),
            f"the last batch of train {ONE}",
        ),
        (Iterated(batches(11)), f"batch 2 of train {ONE}"),
        ([*batches(), (X[:1], Y[:1]), *batches()], f"batch 3 of train {ONE}"),
        ([(X[:0], Y[:0]), *batches()], "the first batch of train holds no sample"),
        ([*batches(), (X[:0], Y[:0]), *batches()], "batch 3 of train holds no sample"),
        ([*batches(1)[:0], *batches(), None], "batch 3 of train must be an (inputs, target) pair, not a NoneType"),
        ([*batches(), (X.double(), Y)], "batch 3 of train cannot be trained on"),
        ([*batches(), (X, Y + 4)], "batch 3 of train cannot be trained on"),
        ([*batches(), (X / 0, Y)], "the loss of batch 3 of train is nan"),
        (Iterated([*batches(), failing(KeyError("gone"))]), "batch 3 of train cannot be read: KeyError: 'gone'"),
        (Iterated([failing(OSError("disk"))]), "batch 1 of train cannot be read: OSError: disk"),
        (Once(), "each iteration of this Once goes on with the same iterator"),
    ],
)
def test_batches_that_cannot_be_trained_on_are_refused_unevaluated(train: Any, said: str) -> None:
    message, calls = refusal(train=train, model=network(norm=True))
    assert said in message
    assert calls == 0


def test_a_batch_that_fails_later_is_named() -> None:
    settings = TrainingSettings(epochs=1)
    late = [*batches(2), *batches(2)]
    for broken, said in (
        (failing(KeyError("gone")), "batch 13 of the training data cannot be read: KeyError: 'gone'"),
        ((X[:1], Y[:1]), "batch 13 of epoch 1 cannot be trained on: ValueError: Expected more than 1 value"),
    ):
        train = Iterated([*late, broken])
        check_training("train", network(norm=True), train, nn.functional.cross_entropy)
        with pytest.raises(AutopruneError, match=re.escape(said)):
            train_(network(norm=True), train, nn.functional.cross_entropy, settings, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("call", [2, 4])
def test_one_failing_evaluation_ends_its_trial_alone(call: int, tmp_path: Path) -> None:
    """The second call is a trial's; the fourth the final table's, which another call of compress goes on with."""
    seen: list[nn.Module] = []

    def evaluate(model: nn.Module) -> Tensor:
        seen.append(model)
        if len(seen) == call:
            raise KeyError("gone")
        return accuracy(model)

    def run() -> autoprune.Compressed:
        return autoprune.compress(network(), batches(), evaluate, X[:1], TARGET, config=QUICK, directory=tmp_path)

    if call == 2:
        assert "1 of 2; the first: the model cannot be evaluated: KeyError: 'gone'." in run().report
        return
    with pytest.raises(AutopruneError, match=r"KeyError: 'gone'\. All that was made is in the run's directory"):
        run()
    assert (tmp_path / "results.rounds.jsonl").exists()
    assert run().rows[0].score == float(accuracy(network()))


def test_an_evaluation_that_fails_in_every_trial_ends_the_search_with_its_error() -> None:
    def evaluate(model: nn.Module) -> Tensor:
        if isinstance(model, ProgramModel):
            raise StopIteration("enough")
        return accuracy(model)

    with pytest.raises(AutopruneError, match=r"all 2 trials failed.*StopIteration: enough") as refused:
        autoprune.compress(network(), batches(), evaluate, X[:1], TARGET, config=QUICK)
    assert isinstance(refused.value.__cause__, StopIteration)


def test_a_last_batch_of_one_is_no_matter_where_it_can_be_trained_on() -> None:
    check_training("train", network(), batches(11), nn.functional.cross_entropy)
    dropped = DataLoader(TensorDataset(X, Y), 11, drop_last=True)
    check_training("train", network(norm=True), dropped, nn.functional.cross_entropy)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (nn.CrossEntropyLoss(reduction="none"), "a tensor of shape (6,)"),
        (lambda output, target: (output.mean(), {}), "it gave a tuple"),
        (lambda output, target: 0.5, "it gave a float"),
        (lambda output, target: output.mean() * float("nan"), "is nan"),
        (lambda output, target: output.detach().mean(), "no gradient"),
        (lambda output, target: output.argmax(), "int64"),
        (lambda output, target: output.no_such_thing(), "AttributeError"),
    ],
)
def test_a_loss_that_is_none_is_refused_unevaluated(loss: Any, said: str) -> None:
    message, calls = refusal(loss=loss)
    assert said in message
    assert calls == 0


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (network().to("meta"), "0.weight is on the meta device"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), "1.weight has no shape yet"),
        (network().half(), "cannot be trained on"),
        (nn.Linear, "the model is the class Linear: give a torch.nn.Module"),
        (accuracy, "the model is a function"),
        (nn.Sequential(nn.Flatten(), nn.ReLU()), "no gradient"),
    ],
)
def test_models_that_cannot_be_trained_are_refused_unevaluated(model: nn.Module, said: str) -> None:
    message, calls = refusal(model=model)
    assert said in message
    assert calls == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"example": {0: X[:1]}}, "names are strings, not 0"),
        ({"example": torch.tensor(1.0)}, "must hold samples along its first axis"),
        ({"example": X[:1].to_sparse()}, "must here be dense tensors"),
        ({"target": None}, "target is a speed-up, above 1"),
        ({"target": 10**400}, "target is a speed-up, above 1"),
        ({"config": [("seed", 3)]}, "config is a dictionary of sections"),
        ({"config": {"latency": 3}}, "config is a dictionary of sections"),
        ({"directory": 123}, "a string or a pathlib.Path, not 123"),
        ({"directory": "a\0b"}, "holds a NUL"),
    ],
    ids=repr,
)
def test_other_arguments_that_cannot_be_meant_are_refused(given: dict[str, Any], said: str) -> None:
    message, calls = refusal(**given)
    assert said in message
    assert calls == 0


def test_a_target_is_a_number() -> None:
    with pytest.raises(ConfigError, match=r"target\.sparsity is a number, not 'much'"):
        autoprune.Target(sparsity="much")  # type: ignore[arg-type]


def test_what_is_pruned_is_trained_and_other_frozen_parts_stay_so() -> None:
    whole = unfreeze_(network(norm=True).requires_grad_(False))
    assert all(parameter.requires_grad for parameter in whole.parameters())
    part = network(norm=True)
    for layer in (part[3], part[4]):
        layer.requires_grad_(False)
    unfreeze_(part)
    assert [name for name, each in part.named_parameters() if not each.requires_grad] == [
        "3.bias",
        "4.weight",
        "4.bias",
    ]


COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old spectral norm": nn.utils.spectral_norm,
    "mask": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights_become_plain_and_trainable_in_the_copy(name: str) -> None:
    model = network()
    COMPUTED[name](model[3])
    wanted, before = model.eval()(X), everything(model)
    settled = copy_for_inference(model)
    layer = settled.get_submodule("3")
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.requires_grad
    assert not layer._forward_pre_hooks
    torch.testing.assert_close(settled(X), wanted)
    assert set(take_inventory(model, X).names) == {"0", "3"}
    assert everything(model) == before


@pytest.mark.parametrize("name", COMPUTED)
def test_hooks_refuse_weights_that_masks_would_not_hold_on(name: str) -> None:
    model = network()
    COMPUTED[name](model[3])
    before = everything(model)
    with pytest.raises(AutopruneError, match="the weight of 3 is computed from other tensors"):
        PruningHooks(model, X, sparsity=0.5)
    assert everything(model) == before
    assert PruningHooks(model, X, sparsity=0.5, keep_dense=["3"]).plan.layers.keys() == {"0"}


def test_hooks_refuse_to_prune_what_is_frozen() -> None:
    model = network()
    model[0].requires_grad_(False)
    with pytest.raises(AutopruneError, match=r"^0 would be pruned and never trained"):
        PruningHooks(model, X, sparsity=0.5)


def test_a_weight_that_is_a_buffer_stays_dense() -> None:
    model = network()
    weight = weight_of(model, "3").detach().clone()
    del model[3].weight
    model[3].register_buffer("weight", weight)
    assert [row.reason for row in take_inventory(model, X).dense if row.name == "3"] == [
        "its weight is no parameter, so that it cannot be trained"
    ]


def test_hooks_inside_a_wrapper_prune_under_its_names() -> None:
    model = nn.DataParallel(network())
    pruning = PruningHooks(model, X, "one_shot", sparsity=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruning.start(optimizer, 1)
    nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()
    pruning.after_step()
    masks = pruning.finish()
    assert masks.keys() == {"module.0", "module.3"}
    assert all(not model.get_parameter(f"{name}.weight")[~mask].any() for name, mask in masks.items())
    fast = autoprune.repack(copy.deepcopy(model).eval(), X, masks)
    torch.testing.assert_close(fast(X), model.eval()(X), rtol=1e-4, atol=1e-5)


class Named(nn.Module):
    """Takes its inputs by name, as models of text do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(36, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.body(pixels.flatten(1)) * mask))
        return y


def test_batches_may_hold_keyword_arguments() -> None:
    def named(*sizes: int) -> list[Any]:
        return [({"pixels": X[:size], "mask": torch.ones(size, 1)}, Y[:size]) for size in sizes]

    check_training("train", Named(), named(8, 8, 2), nn.functional.cross_entropy)
    with pytest.raises(AutopruneError, match="last batch of train holds one sample"):
        check_training("train", Named(), named(8, 8, 1), nn.functional.cross_entropy)
