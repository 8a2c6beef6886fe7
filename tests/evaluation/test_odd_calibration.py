"""Calibration batches without samples, and layers that read as many rows as values say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.errors import AutopruneError, GivenError
from autoprune.masks import collect_statistics
from autoprune.post_training import prune_post_training
from autoprune.training.batch_norm import recalibrate_batch_norm_

NOTHING = torch.zeros(0, 3, 8, 8)


class Experts(nn.Module):
    """Each row by the expert that its values ask for, or all by the first one."""

    def __init__(self, routed: bool) -> None:
        super().__init__()
        self.routed = routed
        self.first = nn.Linear(16, 16)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        which = (x[:, 0] > 0.0) & self.routed
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            y[which == bool(number)] = expert(x[which == bool(number)])
        return y


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()


@pytest.mark.parametrize("batches", [[NOTHING], [torch.ones(4, 3, 8, 8), NOTHING]])
def test_a_batch_without_samples_is_refused_wherever_it_is_read(batches: list[Tensor]) -> None:
    said, model = f"batch {len(batches)} of the calibration data has no samples", network()
    with pytest.raises(GivenError, match=said):
        prune_post_training(model, batches, 0.5)
    with pytest.raises(GivenError, match=said):
        recalibrate_batch_norm_(model, batches)
    pairs = [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches]
    with pytest.raises(GivenError, match=said):
        collect_statistics(model, ["0"], pairs, functional.cross_entropy, {"input_moments"})


def test_a_layer_that_reads_as_many_rows_as_values_say_is_refused_unless_it_stays_dense() -> None:
    torch.manual_seed(0)
    model, batches = Experts(routed=True).eval(), list(torch.randn(3, 64, 16))
    with pytest.raises(AutopruneError, match=r"experts\.0 gives .* hangs on values. Keep it dense \(keep_dense\)"):
        prune_post_training(model, batches, 0.5)
    pruned = prune_post_training(model, batches, 0.5, keep_dense=["experts.*"])
    assert [each.name for each in pruned.layers] == ["first"]


def test_a_layer_that_only_ever_reads_no_rows_was_not_reached() -> None:
    torch.manual_seed(0)
    with pytest.raises(AutopruneError, match=r"calibration never reached experts\.1"):
        prune_post_training(Experts(routed=False).eval(), list(torch.randn(3, 64, 16)), 0.5)


@pytest.mark.parametrize("need", ["input_norm", "input_moments", "squared_gradient"])
def test_statistics_of_a_layer_that_reads_no_rows_of_some_batches(need: str) -> None:
    torch.manual_seed(0)
    model, rows = Experts(routed=True).eval(), torch.randn(2, 64, 16)
    with torch.no_grad():
        of_second = [x[model.first(x)[:, 0] > 0.0] for x in rows]
        of_first = [x[model.first(x)[:, 0] <= 0.0] for x in rows]

    def found(batches: list[Tensor]) -> Tensor:
        pairs = [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches]
        statistics = collect_statistics(model, ["experts.0"], pairs, functional.cross_entropy, {need})
        value = getattr(statistics["experts.0"], need)
        assert isinstance(value, Tensor)
        return value if need != "squared_gradient" else value * sum(map(len, of_first))

    alone = found(of_first)
    assert bool((alone > 0.0).any())
    torch.testing.assert_close(found([of_second[0], *of_first]), alone)
