"""Code that asks a repacked model for what any module has: its device, its parameters, its state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import autoprune
from autoprune.errors import AutopruneError
from autoprune.repack import RepackedModel


@pytest.fixture(params=["program", "modules"], scope="module")
def fast(request: pytest.FixtureRequest) -> RepackedModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    choose = None if request.param == "program" else lambda *_: "jit"
    return autoprune.repack(model, torch.randn(2, 32), form=request.param, choose=choose)


def test_it_says_where_it_runs(fast: RepackedModel) -> None:
    assert fast.device == next(fast.parameters()).device == torch.device("cpu")
    assert fast.dtype == next(fast.parameters()).dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert sum(parameter.numel() for parameter in fast.parameters()) == 0  # all of it is packed


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.to("cpu"),
        lambda m: m.to(torch.device("cpu"), torch.float32),
        lambda m: m.cpu(),
        lambda m: m.float(),
        lambda m: m.eval(),
        lambda m: m.train(),
        lambda m: m.share_memory(),
        lambda m: m.requires_grad_(False),
        lambda m: m.to(memory_format=torch.channels_last),
        copy.deepcopy,
    ],
)
def test_what_changes_nothing_is_fine(fast: RepackedModel, call: Callable[[Any], Any]) -> None:
    x = torch.randn(3, 32)
    expected = fast(x)
    same = call(fast)
    assert not same.training
    torch.testing.assert_close(same(x), expected)
    torch.testing.assert_close(fast(x), expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("meta"),
        lambda m: m.to("cuda"),
        lambda m: m.to_empty(device="meta"),
        lambda m: nn.Sequential(m).half(),
        lambda m: m.requires_grad_(),
    ],
)
def test_what_it_cannot_become_is_an_error(fast: RepackedModel, call: Callable[[Any], Any]) -> None:
    x = torch.randn(3, 32)
    expected = fast(x)
    with pytest.raises(AutopruneError, match=r"float32 on the CPU|for inference"):
        call(fast)
    torch.testing.assert_close(fast(x), expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.state_dict(),
        lambda m: m.load_state_dict({}),
        lambda m: nn.Sequential(m).state_dict(),
        pickle.dumps,
    ],
)
def test_a_program_has_no_state_dict_and_is_no_pickle(call: Callable[[Any], Any]) -> None:
    fast = autoprune.repack(nn.Linear(32, 8).eval(), torch.randn(2, 32), form="program")
    with pytest.raises(AutopruneError, match=r"autoprune\.(save|load)"):
        call(fast)
