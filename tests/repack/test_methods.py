"""A repacked model keeps the methods and attributes of its own; objects of state go in and come out."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.model.arguments import is_state
from autoprune.repack import ProgramModel, SwappedModel, load, repack, save
from autoprune.repack.modules.layers import PackedLinear
from autoprune.repack.weights.packed import pack


class Layer:
    """Keys of the steps so far."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.dtype = torch.float32
        self.seen: Any = None

    def update(self, keys: Tensor) -> Tensor:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], 1)
        return self.keys


class Cache:
    """Those of every layer, as decoders keep them."""

    def __init__(self, layers: int) -> None:
        self.layers = [Layer() for _ in range(layers)]


class Decoder(nn.Module):
    """One layer of causal attention, and greedy steps by a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(steps=5)
        self.table, self.key, self.out = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> dict[str, Any]:
        x = self.table(ids)
        cache = Cache(1) if cache is None else cache
        keys = cache.layers[0].update(self.key(x))
        weights = (x @ keys.transpose(1, 2) + keys.sum(-1)[:, None] * 0.1).softmax(-1)
        return {"logits": self.out(weights @ keys), "cache": cache}

    @torch.no_grad()
    def generate(self, ids: Tensor) -> Tensor:
        found, cache = [ids], None
        for _ in range(self.config.steps):
            given = self(found[-1], cache)
            cache = given["cache"]
            found.append(given["logits"][:, -1:].argmax(-1))
        return torch.cat(found, 1)


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(4)
    made = Decoder().eval()
    with torch.no_grad():
        for layer in (made.key, made.out):
            layer.weight[torch.rand_like(layer.weight) < 0.7] = 0.0
    return made


IDS = torch.tensor([[3, 7, 1], [2, 2, 5]])


def step(model: Decoder, tokens: int = 3) -> dict[str, Any]:
    with torch.no_grad():
        cache = model(IDS.repeat(1, 3)[:, :tokens])["cache"]
    return {"ids": IDS[:, :1], "cache": cache}


def test_a_step_with_a_cache_is_a_program_for_any_length_of_it(model: Decoder) -> None:
    fast = repack(model, step(model), form="program", threads=1)
    for tokens in (3, 5, 8):
        given = step(model, tokens)
        before = given["cache"].layers[0].keys
        got = fast(**given)
        assert given["cache"].layers[0].keys is before  # what a call is given stays as it is
        wanted = model(**copy.deepcopy(given))
        torch.testing.assert_close(got["logits"], wanted["logits"], rtol=1e-4, atol=1e-4)
        assert type(got["cache"]) is Cache
        assert got["cache"].layers[0].dtype is torch.float32
        torch.testing.assert_close(got["cache"].layers[0].keys, wanted["cache"].layers[0].keys, rtol=1e-4, atol=1e-4)


def test_another_state_than_the_example_s_is_refused(model: Decoder) -> None:
    fast = repack(model, step(model), form="program", threads=1)
    given = step(model)
    given["cache"].layers[0].seen = 1
    with pytest.raises(AutopruneError, match="seen"):
        fast(**given)
    given["cache"].layers[0].seen, given["cache"].layers[0].dtype = None, torch.float64
    with pytest.raises(AutopruneError, match="dtype"):
        fast(**given)


def test_a_program_from_a_file_takes_the_state_it_gave(model: Decoder, tmp_path: Path) -> None:
    save(repack(model, step(model), form="program", threads=1), tmp_path / "fast.safetensors")
    loaded = load(tmp_path / "fast.safetensors", threads=1)
    first = loaded(**step(model))
    then = loaded(ids=IDS[:, 1:2], cache=first["cache"])
    given = step(model)
    model(**given)
    wanted = model(ids=IDS[:, 1:2], cache=given["cache"])
    torch.testing.assert_close(then["logits"], wanted["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["program", "modules"])
def test_methods_and_attributes_are_the_model_s(model: Decoder, form: Any) -> None:
    example = step(model) if form == "program" else (IDS,)
    for fast in (made := repack(model, example, form=form, threads=1), copy.deepcopy(made)):
        assert torch.equal(fast.generate(IDS), model.generate(IDS))
        assert fast.config.steps == 5
        with pytest.raises(AttributeError, match="no_such"):
            fast.no_such  # noqa: B018


def test_the_calls_of_methods_run_the_program_where_it_takes_them(model: Decoder, monkeypatch: Any) -> None:
    fast = repack(model, step(model), form="program", threads=1)
    assert isinstance(fast, ProgramModel)
    calls: list[bool] = []
    takes = ProgramModel.takes

    def noted(*args: Any, **kwargs: Any) -> bool:
        calls.append(takes(*args, **kwargs))
        return calls[-1]

    monkeypatch.setattr(ProgramModel, "takes", noted)
    fast.generate(IDS)
    assert calls == [False, True, True, True, True]


def test_methods_share_the_program_s_packed_weights(model: Decoder) -> None:
    fast = repack(model, step(model), form="program", threads=1)
    assert isinstance(fast, ProgramModel)
    layer = fast.key
    assert isinstance(layer, PackedLinear)
    addresses = {weights.packed.values.ctypes.data for weights in fast.program.weights.values()}
    assert layer.values.data_ptr() in addresses
    assert not [name for name in dict(fast.named_modules()) if name]


def test_a_layer_s_dense_weight_is_there_for_those_who_read_it() -> None:
    weight = torch.randn(16, 8)
    weight[weight < 0.3] = 0.0
    layer = PackedLinear(pack(weight), None)
    assert (layer.weight.dtype, layer.weight.shape, layer.weight.device) == (weight.dtype, weight.shape, weight.device)
    assert torch.equal(layer.weight * 2, weight * 2)
    assert torch.equal(layer.weight.detach(), weight)
    assert layer.weight.tolist() == weight.tolist()
    assert (layer.weight.numpy() == weight.numpy()).all()
    assert repr(layer.weight) == repr(weight)


def test_asking_a_weight_for_its_type_rebuilds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = PackedLinear(pack(torch.eye(8)), None)
    monkeypatch.setattr(type(layer.packed), "unpack", None)
    assert layer.weight.dtype == torch.float32
    assert layer.weight.shape == (8, 8)


class Picks(nn.Module):
    """No program, and no layer."""

    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0].sum() + x


def test_the_summary_says_why_it_is_no_program_and_what_is_gained() -> None:
    fast = repack(Picks(), torch.randn(3, 4), threads=1)
    assert isinstance(fast, SwappedModel)
    assert not fast.report
    assert "ms a call" in fast.summary
    assert "picks values by a mask" in fast.summary


def test_only_objects_that_hold_data_alone_are_state() -> None:
    own, config = Cache(2), SimpleNamespace(sizes=[1, 2.0, "x"], dtype=torch.int8, kind=Cache)
    assert is_state(own)
    assert is_state(config)
    own.layers[1].seen = own
    assert not is_state(own)  # it holds itself
    for other in (nn.Linear(2, 2), torch.ones(2), [own], {"a": 1}, SimpleNamespace(call=print), Cache, object()):
        assert not is_state(other)
