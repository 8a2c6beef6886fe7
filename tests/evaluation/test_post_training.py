"""Post-training pruning: cut, refitted and corrected layer after layer, on what the pruned model gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.criteria import CRITERIA, LayerStatistics
from autoprune.criteria.least_squares import LeastSquares
from autoprune.errors import AutopruneError, ConfigError, GivenError, NumericalError
from autoprune.evaluation.recovery import RECOVERIES
from autoprune.masks import make_masks, sparsity
from autoprune.model.inventory import take_inventory
from autoprune.model.weights import weight_of
from autoprune.patterns import PATTERNS
from autoprune.plan import LayerPlan, Plan
from autoprune.post_training import PostTrained, prune_post_training
from autoprune.registry import Choice

STEPS = Choice("obs", {"steps": 4})
PATTERN_CHOICES = [
    Choice("unstructured"), Choice("group", {"size": 4}), Choice("group", {"size": 4, "permute": True}),
    Choice("group", {"size": 4, "block": 2}), Choice("n:m"), Choice("n:m", {"n": 1, "m": 8}), Choice("block"),
    Choice("channel"), Choice("filter"),
]  # fmt: skip


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, stride=2, groups=2), nn.ReLU(inplace=True),
        nn.Flatten(2), nn.Linear(4, 16), nn.Flatten(), nn.Linear(256, 10),
    ).eval()  # fmt: skip


def images(count: int = 96) -> list[Tensor]:
    x = torch.randn(2, count, 4, 6, 6, generator=torch.Generator().manual_seed(1)) + 0.5
    x[..., 1:] += x[..., :-1]  # neighbours are alike: there is something to make up for
    return list(x)


def off(model: nn.Module, dense: nn.Module, batches: list[Tensor]) -> float:
    """How far a model is from the dense one, over what that gives."""
    with torch.no_grad():
        pairs = [(model(x), dense(x)) for x in batches]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


class Sequences(nn.Module):
    """An LSTM and what reads its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 16, batch_first=True)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x)[0][:, -1])
        return out


class Encoder(nn.Module):
    """A layer of a transformer, whose projections are one parameter, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(x).mean(dim=1))
        return out


def small(kind: str) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(2)
    if kind == "cnn":
        return network(), images()
    model = Sequences() if kind == "lstm" else Encoder()
    x = torch.randn(2, 64, 5, 6 if kind == "lstm" else 16, generator=torch.Generator().manual_seed(3))
    return model.eval(), [part + part.flip(1) for part in x]


# ---------------------------------------------------------------------------------------- least squares, by brute force


def fit_of(columns: int = 6, samples: int = 40) -> tuple[LeastSquares, Tensor, Tensor]:
    """A fit of one row of a layer, its inputs and the outputs that are wanted."""
    generator = torch.Generator().manual_seed(4)
    c = torch.randn(columns, samples, dtype=torch.float64, generator=generator)
    c = c + 0.9 * c.roll(1, dims=0)
    w = torch.randn(1, 1, columns, dtype=torch.float64, generator=generator)
    y = w[0] @ c + 0.1 * torch.randn(1, samples, dtype=torch.float64, generator=generator)
    return LeastSquares(w, (c @ c.T / samples)[None], (y @ c.T / samples)[None], 1e-9), c, y


def least_error(c: Tensor, y: Tensor, kept: Tensor) -> float:
    solution = torch.linalg.lstsq(c[kept].T, y[0][:, None]).solution[:, 0]
    return float((solution @ c[kept] - y[0]).square().mean())


@pytest.mark.parametrize("cells", [[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 1, 2], [0, 1, 0, 2, 1, 2], [0, 0, 0, 0, 0, 0]])
def test_errors_are_what_a_cell_costs_when_all_that_is_left_makes_the_best_of_it(cells: list[int]) -> None:
    fit, c, y = fit_of()
    kept = torch.tensor([True, True, True, True, True, len(set(cells)) == 1])
    cell = torch.tensor(cells)
    errors = fit.errors(kept[None, None], cell[None, None])[0, 0]
    before = least_error(c, y, kept)
    for each in cell[kept].unique():
        left = kept & (cell != each)
        after = least_error(c, y, left) if bool(left.any()) else float(y.square().mean())
        assert float(errors[(cell == each) & kept].sum()) == pytest.approx(after - before, rel=1e-5, abs=1e-9)
    assert not errors[~kept].any()


def test_rows_that_keep_the_same_share_a_system_and_others_do_not_disturb_them() -> None:
    fit, c, y = fit_of()
    start = fit.start.repeat(1, 3, 1)
    several = LeastSquares(start, fit.moments, fit.cross.repeat(1, 3, 1), 1e-9)
    kept = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 1]], dtype=torch.bool)
    rows = several.fitted(kept[None])[0]
    assert not rows[~kept].any()
    torch.testing.assert_close(rows[0], rows[2])
    assert float((rows[0] @ c - y[0]).square().mean()) == pytest.approx(least_error(c, y, kept[0]), rel=1e-6)


# ---------------------------------------------------------------------------------------------- criterion in steps


def masks_by(criterion: Choice, pattern: Choice, amount: float = 0.5) -> tuple[Tensor, LeastSquares]:
    """A mask of a Linear with inputs that are much alike, and the fit of its rows."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(24, 8))
    x = torch.randn(200, 24)
    x[:, 12:] = x[:, :12] + 0.1 * x[:, 12:]  # each input has a twin: either of them can go, but not both
    inventory = take_inventory(model, x, min_weights=1)
    moments = (x.T @ x / len(x)).double()[None]
    plan = Plan({"0": LayerPlan(amount, pattern, criterion)})
    mask = make_masks(model, inventory, plan, {"0": LayerStatistics(input_moments=moments)})["0"]
    rows = weight_of(model, "0").detach().double()[None]
    return mask, LeastSquares(rows, moments, rows @ moments, 0.01)


def error_left(mask: Tensor, fit: LeastSquares) -> float:
    gone = fit.start - fit.fitted(mask[None])
    return float((gone @ fit.moments * gone).sum())


@pytest.mark.parametrize(
    ("pattern", "less"),
    [(PATTERN_CHOICES[0], 0.3), (PATTERN_CHOICES[1], 0.3), (Choice("channel"), 0.3), (Choice("n:m"), 0.95)],
    ids=str,
)
def test_steps_see_what_one_cut_makes_another_one_cost(pattern: Choice, less: float) -> None:
    (once, fit), (stepwise, _) = (masks_by(Choice("obs", {"steps": steps}), pattern) for steps in (1, 16))
    assert sparsity(stepwise) == pytest.approx(0.5, abs=0.01)
    assert error_left(stepwise, fit) < less * error_left(once, fit)


def test_a_sparsity_that_an_n_of_m_layer_cannot_have_leaves_it_whole_in_steps_too() -> None:
    mask, _ = masks_by(STEPS, Choice("n:m", {"n": 4, "m": 8}), 0.2)
    assert mask.all()


@pytest.mark.parametrize("pattern", PATTERN_CHOICES, ids=str)
def test_steps_reach_the_sparsity_that_one_cut_does(pattern: Choice) -> None:
    once, _ = masks_by(Choice("obs"), pattern, 0.75)
    stepwise, _ = masks_by(STEPS, pattern, 0.75)
    assert sparsity(stepwise) == pytest.approx(sparsity(once))
    assert PATTERNS.create(pattern).check(stepwise)


@pytest.mark.parametrize("steps", [0, 257, 2.0, True, "4"])
def test_refuses_steps(steps: Any) -> None:
    with pytest.raises(ConfigError, match="steps must be an integer from 1 to 256"):
        CRITERIA.create(Choice("obs", {"steps": steps}))


# ------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("pattern", PATTERN_CHOICES, ids=str)
@pytest.mark.parametrize("kind", ["cnn", "lstm", "encoder"])
def test_every_pattern_on_every_kind_of_model(kind: str, pattern: Choice) -> None:
    model, batches = small(kind)
    before = copy.deepcopy(model.state_dict())
    pruned = prune_post_training(model, batches, 0.5, pattern=pattern, criterion="obs")
    inventory, rule = take_inventory(model, batches[0]), PATTERNS.create(pattern)
    assert [fit.name for fit in pruned.layers] == inventory.names == list(pruned.masks)
    for fit in pruned.layers:
        weight = weight_of(pruned.model, fit.name)
        assert not weight[~pruned.masks[fit.name]].any()
        assert sparsity(pruned.masks[fit.name]) == fit.sparsity
        layer = inventory[fit.name]
        if layer.gates == 1:
            assert rule.check(pruned.masks[fit.name], layer.conv_groups)
            assert fit.sparsity == pytest.approx(rule.feasible(layer.weight_shape, 0.5, layer.conv_groups))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.isfinite(pruned.model(batches[0])).all()


@pytest.mark.parametrize("kind", ["cnn", "lstm", "encoder"])
def test_every_part_brings_the_model_nearer_the_dense_one(kind: str) -> None:
    model, batches = small(kind)

    def distance(criterion: str | Choice, **how: Any) -> float:
        choice = Choice("group", {"size": 4})
        return off(
            prune_post_training(model, batches, 0.5, pattern=choice, criterion=criterion, **how).model, model, batches
        )

    whole = distance(STEPS)
    assert whole < distance("magnitude")
    bare = distance("magnitude", reconstruct="none", correct_bias=False)
    assert distance("magnitude", reconstruct="none") < bare
    own = distance("magnitude", reconstruct="own")
    assert own < bare
    assert distance("magnitude") < own


def test_units_of_a_recurrent_layer_go_from_both_its_weights() -> None:
    model, batches = small("lstm")
    masks = prune_post_training(model, batches, 0.5, pattern="filter", keep_dense=["head"]).masks
    units = [mask.reshape(4, 16, -1).all(dim=2) for mask in masks.values()]
    assert torch.equal(units[0], units[1])
    assert units[0].sum() == 32


def test_what_is_cut_as_a_whole_stays_silent() -> None:
    model, batches = small("cnn")
    pruned = prune_post_training(model, batches, 0.5, pattern="filter").model
    dead = ~weight_of(pruned, "3").flatten(1).any(dim=1)
    assert int(dead.sum()) == 8
    assert not pruned.get_parameter("3.bias")[dead].any()


def test_the_same_arguments_give_the_same_model() -> None:
    model, batches = small("cnn")
    first, second = (prune_post_training(model, iter(batches), 0.5).model.state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_biases_make_up_for_means_and_targets_are_not_read() -> None:
    model, batches = network(), images()
    with_targets = [(x, torch.full((len(x),), float("nan"))) for x in batches]
    pruned = prune_post_training(model, with_targets, 0.75, reconstruct="none", criterion="magnitude").model
    assert isinstance(pruned, nn.Sequential)
    x = torch.cat(batches)
    with torch.no_grad():
        for end in (4, 9):  # behind the grouped convolution, and the last layer
            own, wanted = pruned[:end](x).transpose(0, 1).flatten(1), model[:end](x).transpose(0, 1).flatten(1)
            torch.testing.assert_close(own.mean(1), wanted.mean(1), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(x, y) for x, (y, _) in zip(batches, with_targets, strict=True))


def test_an_error_of_a_layer_is_that_of_its_output() -> None:
    model, batches, kept = network(), images(), ["3", "6", "8"]
    result = prune_post_training(model, batches, 0.5, keep_dense=kept)
    (fit,) = result.layers
    assert set(kept) <= set(result.kept_dense)
    x = torch.cat(batches)
    with torch.no_grad():
        own, wanted = (each.get_submodule("0")(x).transpose(0, 1).flatten(1).double() for each in (result.model, model))
    missed = (own - own.mean(1, keepdim=True) - wanted + wanted.mean(1, keepdim=True)).square().sum()
    variance = (wanted - wanted.mean(1, keepdim=True)).square().sum()
    assert fit.error == pytest.approx(float(missed / variance), rel=1e-3)
    assert (fit.positions, fit.columns) == (2 * 96 * 6 * 6, 4 * 3 * 3)


def test_a_plan_says_layer_by_layer() -> None:
    model, batches = small("cnn")
    plan = Plan({"3": LayerPlan(0.75, Choice("unstructured"), STEPS), "6": LayerPlan(0.0, Choice("unstructured"))})
    result = prune_post_training(model, batches, plan=plan)
    assert list(result.masks) == ["3"]
    assert torch.equal(weight_of(result.model, "6"), weight_of(model, "6"))


# ------------------------------------------------------------------------------------------- odd models and odd data


class Twice(nn.Module):
    """A layer that is called twice, one whose weight it shares, one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.tied, self.idle = (nn.Linear(16, 16) for _ in range(4))
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(torch.relu(self.first(x))))
        out: Tensor = self.tied(torch.relu(self.second(x)))
        return out


def test_layers_called_twice_tied_and_never() -> None:
    torch.manual_seed(6)
    model, x = Twice(), [torch.randn(200, 16)]
    result = prune_post_training(model, x, 0.5, pattern="unstructured")
    assert list(result.masks) == ["first", "second"], "a tied weight is pruned once"
    assert {"tied", "idle"} <= set(result.kept_dense)
    assert result.model.get_submodule("tied").weight is result.model.get_submodule("first").weight
    assert torch.equal(result.model.get_parameter("tied.bias"), model.tied.bias), "no bias of its own: two layers' "
    plain = prune_post_training(model, x, 0.5, pattern="unstructured", criterion="magnitude", reconstruct="none")
    assert off(result.model, model, x) < off(plain.model, model, x)


class ByValue(nn.Module):
    """Runs its layer once more where a value is large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y if float(self.first.weight.count_nonzero()) == 256 else self.second(y)


def test_a_layer_that_runs_as_often_as_values_say_is_refused() -> None:
    with pytest.raises(AutopruneError, match="second runs 2 times in the pruned model and 1 times in the dense one"):
        prune_post_training(ByValue(), [torch.randn(32, 16)], 0.5)


@pytest.mark.parametrize("criterion", ["magnitude", "activation", "random", "obs", STEPS], ids=str)
@pytest.mark.parametrize("kind", ["dead", "constant", "few"])
def test_inputs_that_say_little(kind: str, criterion: str | Choice) -> None:
    """Dead inputs, constant ones, and fewer samples than weights: singular moments."""
    model = network()
    batches = {"dead": [torch.zeros(8, 4, 6, 6)], "constant": [torch.full((8, 4, 6, 6), 3.0)], "few": images(1)}[kind]
    result = prune_post_training(model, batches, 0.5, criterion=criterion)
    assert all(torch.isfinite(value).all() for value in result.model.state_dict().values())
    assert all(fit.sparsity == pytest.approx(0.5, abs=0.02) for fit in result.layers)
    if kind == "few":
        return
    # what never varies is given back as it was: biases make up for it, and batch norms are no obstacle
    torch.testing.assert_close(result.model(batches[0]), model(batches[0]), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "0 reads or gives values that are not finite on the calibration data"),
        (float("inf"), "0 reads or gives values that are not finite on the calibration data"),
        (1e30, "look for NaN and huge values in the data"),
    ],
)
def test_data_that_is_not_finite_is_refused(value: float, said: str) -> None:
    batches = images()
    batches[1][3, 0, 0, 0] = value
    with pytest.raises(NumericalError, match=said):
        prune_post_training(network(), batches, 0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"sparsity": 0.5, "criterion": "gradient"}, ConfigError, "reads gradients of a loss"),
        ({"sparsity": 0.5, "criterion": "fisher"}, ConfigError, "Take one of magnitude, activation, obs, random"),
        ({"sparsity": 50}, ConfigError, r"sparsity is a fraction in \(0, 1\)"),
        ({}, AutopruneError, "give a sparsity or a plan"),
        ({"sparsity": 0.5, "reconstruct": "all"}, ConfigError, "reconstruct is one of dense, own, none, not 'all'"),
        ({"sparsity": 0.5, "correct_bias": 1}, ConfigError, "correct_bias must be true or false"),
        ({"sparsity": 0.5, "damping": 0.0}, ConfigError, "damping must be a number > 0"),
        ({"sparsity": 0.5, "pattern": "grup"}, ConfigError, "Did you mean 'group'"),
        ({"sparsity": 0.5, "batches": []}, AutopruneError, "no calibration data"),
        ({"sparsity": 0.5, "batches": [3]}, GivenError, "batch 1 of the calibration data must be"),
        ({"sparsity": 0.5, "batches": [images()[0], torch.zeros(4, 5, 6, 6)]}, GivenError, "does not run on batch 2"),
        ({"plan": Plan({"9": LayerPlan(0.5, Choice("n:m"))})}, ConfigError, "names a layer the model does not have"),
    ],
)
def test_bad_input_is_said(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    given = {"model": network(), "batches": images(), **arguments}
    with pytest.raises(error, match=said):
        prune_post_training(**given)


def test_it_is_a_public_name_and_its_result_can_be_repacked() -> None:
    model, batches = small("cnn")
    pruned = autoprune.prune_post_training(model, batches, 0.75)
    assert isinstance(pruned, PostTrained)
    fast = autoprune.repack(pruned.model, batches[0][:1])
    torch.testing.assert_close(fast(batches[0][:1]), pruned.model(batches[0][:1]), atol=1e-3, rtol=1e-3)


def test_the_recovery_has_the_same_arguments() -> None:
    with pytest.raises(ConfigError, match="reconstruct is one of"):
        RECOVERIES.create(Choice("post_training", {"reconstruct": "some"}))
