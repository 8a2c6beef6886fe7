"""LSTM and GRU weights as layers: found, scored, masked, trained, refitted; hidden units removed; states cut."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autoprune
from autoprune.criteria import CRITERIA
from autoprune.errors import AutopruneError, ConfigError
from autoprune.evaluation.recovery.reconstruct import reconstruct_
from autoprune.masks import apply_masks_, collect_statistics, make_masks
from autoprune.model.inventory import record_inputs, take_inventory
from autoprune.model.recurrent.modules import cut_states_
from autoprune.model.recurrent.names import GATES, by_unit, partner_of
from autoprune.model.weights import layer_at, weight_of
from autoprune.patterns import PATTERNS
from autoprune.patterns.layered import cells_of, mask_of, put_back, seen_by
from autoprune.plan import LayerPlan, Plan
from autoprune.registry import Choice
from autoprune.repack import ProgramModel, remaining_macs
from autoprune.repack.modules.sequences import PackedRecurrent
from autoprune.repack.outputs import same_output
from autoprune.training import TRAINING

HIDDEN, FEATURES, STEPS = 16, 6, 5


class Reader(nn.Module):
    """Two recurrent layers and a head on the last state."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU] = nn.LSTM, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.rnn, self.head = cell(FEATURES, hidden, 2, batch_first=True), nn.Linear(hidden, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x)[0][:, -1])
        return y


NAMES = [f"rnn.weight_{part}_l{layer}" for layer in (0, 1) for part in ("ih", "hh")]
CELLS = pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, STEPS, FEATURES), torch.randint(8, (8,))) for _ in range(count)]


@CELLS
def test_every_weight_is_a_layer(cell: Any) -> None:
    model = Reader(cell)
    inventory = take_inventory(model, torch.randn(3, STEPS, FEATURES))
    gates = GATES[cell.__name__.lower()]
    assert inventory.names == [*NAMES, "head"]
    assert [layer.weight_shape for layer in inventory.layers[:2]] == [
        (gates * HIDDEN, FEATURES),
        (gates * HIDDEN, HIDDEN),
    ]
    assert [(layer.calls, layer.positions) for layer in inventory.layers[:2]] == [(1, 3 * STEPS), (STEPS, 3 * STEPS)]
    assert all(layer.gates == gates and layer.kind == cell.__name__.lower() for layer in inventory.layers[:4])
    assert inventory["head"].gates == 1


def test_a_layer_shares_the_modules_parameters() -> None:
    model = Reader()
    for name in NAMES:
        layer = layer_at(model, name)
        assert layer.weight is model.get_parameter(name)
        assert layer.bias is model.get_parameter(name.replace("weight", "bias"))
    assert partner_of("rnn.weight_ih_l0_reverse") == "rnn.weight_hh_l0_reverse"
    assert partner_of("weight_hh_l1") == "weight_ih_l1"
    assert partner_of("head") is None


class Projected(nn.Module):
    def __init__(self, rnn: nn.LSTM) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(4, 20)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x)[0])
        return y


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projections_stay_dense_and_the_reason_is_told() -> None:
    model = nn.LSTM(FEATURES, HIDDEN, proj_size=4)
    with pytest.raises(AutopruneError, match="proj_size"):
        take_inventory(model, torch.randn(STEPS, 2, FEATURES))
    inventory = take_inventory(Projected(model), torch.randn(STEPS, 2, FEATURES))
    assert inventory.names == ["head"]
    assert [row.name for row in inventory.dense] == ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.weight_hr_l0"]
    with pytest.raises(ConfigError, match="projections"):
        cut_states_(model, keep=0.5)


def test_what_a_weight_reads_is_recorded() -> None:
    model = Reader().eval()
    x = torch.randn(3, STEPS, FEATURES)
    read = record_inputs(model, x, NAMES)
    with torch.no_grad():
        y, _ = model.rnn(x)
    assert torch.equal(read[NAMES[0]], x)
    assert torch.equal(read[NAMES[1]], torch.zeros(3, HIDDEN))
    assert read[NAMES[2]].shape == y.shape


@CELLS
@pytest.mark.parametrize("name", list(CRITERIA))
def test_every_criterion_scores_recurrent_weights(cell: Any, name: str) -> None:
    model = Reader(cell)
    inventory = take_inventory(model, torch.randn(2, STEPS, FEATURES))
    plan = Plan({each: LayerPlan(0.5, Choice("group", {"size": 4}), Choice(name)) for each in NAMES})
    needs = CRITERIA.get(name).needs
    statistics = collect_statistics(model, NAMES, batches(), functional.cross_entropy, needs)
    masks = make_masks(model, inventory, plan, statistics)
    for each, mask in masks.items():
        assert mask.float().mean().item() == pytest.approx(0.5, abs=0.05), each


def test_a_gradient_criterion_has_torchs_gradient() -> None:
    model = Reader()
    data = batches(1)
    found = collect_statistics(model, NAMES, data, functional.cross_entropy, ["gradient"])
    functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
    for name in NAMES:
        wanted = model.get_parameter(name).grad
        assert wanted is not None
        torch.testing.assert_close(found[name].gradient, wanted.abs(), atol=1e-6, rtol=1e-3)


PATTERN_CHOICES = [Choice(name) for name in PATTERNS] + [Choice("group", {"size": 16, "permute": True})]


@CELLS
@pytest.mark.parametrize("choice", PATTERN_CHOICES, ids=str)
def test_patterns_see_the_gates_of_a_unit_together(cell: Any, choice: Choice) -> None:
    inventory = take_inventory(Reader(cell), torch.randn(2, STEPS, FEATURES))
    pattern = PATTERNS.create(choice)
    for name in NAMES:
        layer = inventory[name]
        saliency = torch.rand(layer.weight_shape)
        seen = seen_by(pattern, layer, saliency)
        assert torch.equal(put_back(layer, seen), saliency)
        mask = mask_of(pattern, layer, saliency, 0.5)
        assert pattern.check(seen_by(pattern, layer, mask))
        cells = cells_of(pattern, layer)
        assert cells.shape == saliency.shape
        if choice == Choice("group"):
            unit = by_unit(cells, layer.gates).reshape(-1, layer.gates, cells.shape[1])
            assert (unit[:, :1] == unit).all() or layer.gates == 3  # groups of 8: of whole LSTM units


@CELLS
def test_filters_are_hidden_units_and_go_for_good(cell: Any) -> None:
    model = Reader(cell).eval()
    x = torch.randn(2, STEPS, FEATURES)
    inventory = take_inventory(model, x)
    plan = Plan({name: LayerPlan(0.5, Choice("filter")) for name in NAMES})
    apply_masks_(model, make_masks(model, inventory, plan, collect_statistics(model, NAMES, [], _loss, [])), inventory)
    gates = inventory[NAMES[0]].gates
    for one, other in (NAMES[:2], NAMES[2:]):
        alive = [by_unit(weight_of(model, name), gates).reshape(HIDDEN, -1).any(dim=1) for name in (one, other)]
        assert torch.equal(*alive)
        assert int(alive[0].sum()) == HIDDEN // 2
    fast = autoprune.repack(model, x, threads=1)
    assert isinstance(fast, ProgramModel)
    kept = [op.attributes["units"] for op in fast.program.graph.ops if op.kind == "recurrent"]
    assert [len(units) for units in kept] == [HIDDEN // 2] * 2
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-4)
    half, dense = HIDDEN // 2, Reader(cell)
    one_step = gates * half * (FEATURES + half) + gates * half * (half + half)
    assert remaining_macs(model, x) == 2 * (STEPS * one_step + 8 * half)
    assert remaining_macs(dense, x) > 2 * remaining_macs(model, x)


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target)


def test_a_row_cut_in_one_weight_alone_keeps_its_bias() -> None:
    model = Reader()
    inventory = take_inventory(model, torch.randn(2, STEPS, FEATURES))
    masks = {name: torch.ones_like(weight_of(model, name), dtype=torch.bool) for name in NAMES[:2]}
    masks[NAMES[1]][3] = False
    apply_masks_(model, masks, inventory)
    assert bool(model.get_parameter("rnn.bias_hh_l0")[3] != 0)
    masks[NAMES[0]][3] = False
    apply_masks_(model, masks, inventory)
    assert not torch.stack([model.get_parameter("rnn.bias_hh_l0")[3], model.get_parameter("rnn.bias_ih_l0")[3]]).any()


@pytest.mark.parametrize("name", list(TRAINING))
@pytest.mark.parametrize("pattern", ["group", "filter"])
@CELLS
def test_every_method_prunes_recurrent_weights(cell: Any, pattern: str, name: str) -> None:
    model = Reader(cell, 32)
    x = torch.randn(8, STEPS, FEATURES)
    choice = Choice("n:m") if name == "sr_ste" else Choice(pattern)
    pruning = autoprune.PruningHooks(
        model,
        x[:2],
        Choice(name, {"factor": 1.0} if name == "expand" else {}),
        sparsity=0.5,
        pattern=choice,
        batches=batches(),
        keep_dense=["head"],
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruning.start(optimizer, 20)
    for _ in range(20):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), torch.randint(8, (8,))).backward()
        optimizer.step()
        pruning.after_step()
    masks = pruning.finish()
    cut = sum(int((~mask).sum()) for mask in masks.values())
    assert cut / sum(mask.numel() for mask in masks.values()) >= 0.45
    for each, mask in masks.items():
        assert not weight_of(model, each)[~mask].any()
    fast = autoprune.repack(model.eval(), x, threads=1)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-4)


@CELLS
def test_reconstruction_brings_the_output_nearer(cell: Any) -> None:
    dense = Reader(cell, 32).eval()
    data = batches(4)
    masked = copy.deepcopy(dense)
    inventory = take_inventory(dense, data[0][0])
    name = NAMES[1]
    mask = mask_of(PATTERNS.create(Choice("unstructured")), inventory[name], weight_of(dense, name).detach().abs(), 0.5)
    apply_masks_(masked, {name: mask})

    def gap() -> float:
        with torch.no_grad():
            return float((masked(data[0][0]) - dense(data[0][0])).square().mean())

    before = gap()
    reconstruct_(masked, dense, name, mask, data)
    assert not weight_of(masked, name)[~mask].any()
    assert gap() < before


@pytest.mark.parametrize("wrong", [{"threshold": -1.0}, {"keep": 0.0}, {"keep": 2}, {"threshold": 0.1, "keep": 0.5}])
def test_a_cut_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"threshold|keep"):
        cut_states_(Reader(), **wrong)
    with pytest.raises(ConfigError, match=r"no nn\.LSTM"):
        cut_states_(nn.Linear(2, 2), keep=0.5)


@CELLS
def test_states_are_cut_in_training_and_in_use(cell: Any) -> None:
    model = Reader(cell)
    names = list(model.state_dict())
    assert cut_states_(model, keep=0.25) is model
    assert list(model.state_dict()) == names
    x = torch.randn(4, STEPS, FEATURES)
    for mode in (True, False):
        model.train(mode)
        y, _ = model.rnn(x)
        assert (y != 0).sum(dim=-1).unique().tolist() == [HIDDEN // 4]
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    cut_states_(model, threshold=0.1)
    y, _ = model.rnn(x)
    assert (y[y != 0].abs() >= 0.1).all()


@CELLS
def test_a_cut_deepens_while_the_model_trains(cell: Any) -> None:
    model = cut_states_(Reader(cell), keep=0.25, over=4)
    x = torch.randn(4, STEPS, FEATURES)

    def kept() -> int:
        return int((model.get_submodule("rnn")(x)[0] != 0).sum(dim=-1).max())

    model.eval()
    assert kept() == HIDDEN // 4  # whole in use, from the beginning
    model.train()
    seen = [kept() for _ in range(4)]
    assert seen[0] == HIDDEN
    assert seen == sorted(seen, reverse=True)
    again = cut_states_(Reader(cell), keep=0.25, over=4)
    again.load_state_dict(model.state_dict())  # a resumed run goes on where the other was
    assert int((again.get_submodule("rnn")(x)[0] != 0).sum(dim=-1).max()) == kept() == HIDDEN // 4
    with pytest.raises(ConfigError, match="over must be an integer >= 0"):
        cut_states_(model, keep=0.5, over=-1)


def test_a_cut_model_survives_a_copy() -> None:
    model = copy.deepcopy(cut_states_(Reader(), keep=0.5))
    y, _ = model.get_submodule("rnn")(torch.randn(2, STEPS, FEATURES))
    assert (y != 0).sum(dim=-1).unique().tolist() == [HIDDEN // 2]


def test_states_on_the_threshold_are_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch and a kernel may round such a state to different sides of it: then they are compared without cuts."""
    compared: list[bool] = []

    def same(output: Any, wanted: Any) -> bool:
        compared.append(same_output(output, wanted))
        return len(compared) > 1 and compared[-1]  # the first time a state lay on the threshold

    monkeypatch.setattr(sys.modules["autoprune.repack.model"], "same_output", same)
    x = torch.randn(2, STEPS, FEATURES)
    cut = cut_states_(Reader().eval(), threshold=0.1)
    assert isinstance(autoprune.repack(cut, x, threads=1, form="program"), ProgramModel)
    assert compared == [True, True]
    compared.clear()
    with pytest.raises(AutopruneError, match="does not reproduce"):
        autoprune.repack(Reader().eval(), x, threads=1, form="program")


@CELLS
def test_torch_compile_takes_a_packed_layer_as_it_is(cell: Any) -> None:
    model, x = Reader(cell).eval(), torch.randn(3, STEPS, FEATURES)
    apart = nn.ModuleDict({"rnn": PackedRecurrent.of(model.rnn), "head": model.head})
    model_of = torch.compile(lambda x: apart["head"](apart["rnn"](x)[0][:, -1]), backend="eager")
    with torch.no_grad():
        assert same_output(model_of(x), model(x))


class Continued(nn.Module):
    """A layer that begins with the states it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(FEATURES, HIDDEN, batch_first=True)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        y: Tensor = self.rnn(x, (h, c))[0]
        return y


def test_states_to_begin_with_are_no_sum() -> None:
    states = torch.zeros(1, 2, HIDDEN)
    fast = autoprune.repack(Continued(), (torch.randn(2, STEPS, FEATURES), states, states), form="program", threads=1)
    assert [row.fused for row in fast.report] == ["", ""]
