"""Gates: what they are put on, how they learn, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.errors import AutopruneError, ConfigError
from autoprune.latency.timer import Protocol
from autoprune.model.channel_gates import (
    ChannelGate,
    GatedConv2d,
    Gating,
    gate_channels_,
    gates,
    live_shares,
    saliency,
    scaled,
    winners,
    with_gate_penalty,
)
from autoprune.model.inventory import take_inventory
from autoprune.repack import ProgramModel, capture, repack
from autoprune.repack.graph.passes import simplify
from autoprune.repack.tuning.layer_memory import layer_memory
from autoprune.repack.tuning.layer_times import layer_times
from autoprune.settings import TrainingSettings
from autoprune.tasks.zoo import build_model
from autoprune.training.loop import train_


def net() -> nn.Module:
    torch.manual_seed(0)
    return build_model("residual_cnn", {"widths": [8, 16]}, in_channels=3, size=12, classes=4, seed=0).eval()


X = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(1))
INNER = ["1.conv1", "2.conv1"]


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(96, 3, 12, 12, generator=generator)
    return [(x[at : at + 32], x[at : at + 32].mean((1, 2, 3)).gt(0).long()) for at in range(0, 96, 32)]


def test_open_gates_of_factor_one_change_nothing() -> None:
    model = net()
    wanted = model(X)
    made = gate_channels_(model, X, gating=Gating(4, 1.0))
    assert list(made) == ["1.conv1", "1.conv2", "2.conv1", "2.conv2", "2.shortcut.0"]  # all behind the first
    for each in made.values():
        nn.init.zeros_(each.gate.weight)
        assert isinstance(each.norm, nn.BatchNorm2d)
    assert torch.allclose(model(X), wanted, atol=1e-6)


def test_a_gate_silences_and_scales() -> None:
    conv, norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
    nn.init.uniform_(norm.bias, 1.0, 2.0)
    gated = GatedConv2d(conv, norm, ChannelGate(3, 6, Gating(2, 0.5))).eval()
    factors = winners(saliency(X, gated.gate.weight, gated.gate.bias), 0.0, 2)
    assert (factors > 0).sum(dim=1).tolist() == [2] * len(X)
    assert torch.equal(gated(X), scaled(norm(conv(X)), factors))
    assert (gated(X)[:, ::2].abs().amax(dim=(2, 3)) > 0).sum(dim=1).tolist() == [2] * len(X)


def test_what_loses_still_learns() -> None:
    model = net().train()
    gate_channels_(model, X, INNER, Gating(4, 0.25))
    with_gate_penalty(model, F.cross_entropy, 0.1)(model(X), torch.arange(5) % 4).backward()
    for gate in gates(model).values():
        assert gate.weight.grad is not None
        assert (gate.weight.grad.abs().sum(dim=1) > 0).all()


def test_a_ramp_ends_at_the_share_and_a_threshold_is_found() -> None:
    model = net()
    gate_channels_(model, X, INNER, Gating(2, 0.5, adaptive=True, ramp=6))
    settings = TrainingSettings(epochs=20, learning_rate=0.02)
    loss = with_gate_penalty(model, F.cross_entropy, 1e-3)
    first = [gate.share for gate in gates(model).values()]
    train_(model, batches(), loss, settings, seed=0)
    assert first == [1.0, 1.0]
    for gate in gates(model).values():
        assert gate.share == 0.5
        assert gate.kept == 0
        assert float(gate.threshold) > 0.0
    x = torch.cat([given for given, _ in batches()])
    for share in live_shares(model, x).values():
        assert 0.25 < float(share.mean()) < 0.75


def test_the_penalty_is_for_training_alone() -> None:
    model = net()
    gate_channels_(model, X, INNER)
    loss = with_gate_penalty(model, F.cross_entropy, 10.0)
    target = torch.zeros(5, dtype=torch.long)
    assert torch.equal(loss(model(X), target), F.cross_entropy(model(X), target))
    model.train()
    output = model(X)
    assert loss(output, target) > F.cross_entropy(output, target)
    copy.deepcopy(model)  # though it remembers what was computed


@pytest.mark.slow
def test_gated_layers_are_pruned_and_repacked_like_any() -> None:
    model = net()
    gate_channels_(model, X, INNER, Gating(4, 0.5))
    inventory = take_inventory(model, X)
    assert "1.conv1.conv" in inventory.names
    assert inventory["1.conv1.conv"].norm == "1.conv1.norm"
    assert not any("gate" in name for name in inventory.names)
    kinds = [op.kind for op in simplify(capture(model, (X,))).ops]
    assert kinds.count("gated_conv2d") == 4  # each gated one, and the one that reads it
    assert kinds.count("gate") == 2
    assert "torch" not in kinds
    with torch.inference_mode():
        for form in ("program", "modules"):
            fast = repack(model, X, form=form, choose=(lambda *_: "jit") if form == "modules" else None)
            assert (fast(X) - model(X)).abs().max() <= 1e-4 * model(X).abs().max()


def test_a_gated_program_tells_its_times_and_its_memory() -> None:
    model = net()
    gate_channels_(model, X, INNER, Gating(4, 0.5))
    fast = repack(model, X, form="program")
    assert isinstance(fast, ProgramModel)
    times = {row.kind: row for row in layer_times(fast, model, X, Protocol(samples=3))}
    assert times["gated_conv2d"].backend == times["gate"].backend == "jit"
    assert {"1.conv1.conv", "1.conv2"} <= {row.name for row in layer_memory(fast, X)}
    report = {row.name: row.fused for row in fast.report}
    assert report["1.conv1.conv"] == "gate + relu"
    assert report["1.conv2"] == "live + sum + relu"


@pytest.mark.parametrize("seen", [0, 2, 6])
def test_a_model_is_captured_with_what_its_ramp_has_reached(seen: int) -> None:
    model = net()
    for each in gate_channels_(model, X, INNER, Gating(2, 0.5, ramp=6)).values():
        each.gate.seen.fill_(seen)
    gate = {op.output: op for op in capture(model, (X,)).ops}["channel_gate"]
    assert gate.attributes["keep"] == {0: 4, 2: 3, 6: 2}[seen]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Gating(0), "a gate: group_size must be an integer >= 1, not 0"),
        (lambda: Gating(4, 0.0), r"a gate: keep must be a number in \(0, 1\], not 0.0"),
        (lambda: Gating(4, 0.5, ramp=-1), "a gate: ramp must be an integer >= 0, not -1"),
        (lambda: ChannelGate(3, 10, Gating(4)), r"10 channels .* groups of 4: choose one of \[1, 2, 5, 10\]"),
        (lambda: gate_channels_(net(), X, ["1.conv3"]), "'1.conv3' cannot be gated.*'1.conv"),
        (lambda: with_gate_penalty(net(), F.cross_entropy, 1.0), "has no gates: call gate_channels_"),
        (lambda: ChannelGate(4, 4, Gating(4)).penalty(), "after a forward pass in training mode"),
    ],
)
def test_what_cannot_be_is_refused(make: object, said: str) -> None:
    assert callable(make)
    with pytest.raises(AutopruneError, match=said):
        make()


def test_nothing_is_gated_when_one_name_is_wrong() -> None:
    model = net()
    before = repr(model)
    with pytest.raises(ConfigError):
        gate_channels_(model, X, ["1.conv1", "6"])
    with pytest.raises(ConfigError):
        gate_channels_(model, X, ["1.conv1", "2.conv1"], Gating(16))
    assert repr(model) == before
