"""`repack` on whole models: what is fused, chosen, undone and reported, and that the output stays the original's."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize, prune

from autoprune.errors import AutopruneError, ConfigError
from autoprune.latency.timer import Latency, Protocol
from autoprune.repack import LayerForm, RepackedModel, repack
from autoprune.repack import model as repack_module
from autoprune.repack.layers import PackedConv2d, PackedLayer, PackedLinear
from autoprune.repack.outputs import same_output
from autoprune.testing import FakeClock

QUICK = Protocol(samples=1, warmup=1, min_sample_ms=0.0)


def jit(name: str, form: LayerForm) -> str:
    return "jit"


def zeroed(model: nn.Module, sparsity: float = 0.6) -> nn.Module:
    """Zeros the smallest weights of every Conv2d and Linear, and gives the norms something to do. Eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.normal_(0, 0.3, generator=generator)
                module.weight.mul_(module.weight.abs() >= module.weight.abs().quantile(sparsity))
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                    assert tensor is not None
                    tensor.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


def image(*batch: int) -> Tensor:
    return torch.randn(*(batch or (2,)), 4, 12, 10, generator=torch.Generator().manual_seed(1))


def rows(fast: RepackedModel) -> dict[str, Any]:
    return {row.name: row for row in fast.report}


@torch.inference_mode()
def assert_same(fast: nn.Module, model: nn.Module, *inputs: Any, **named: Any) -> None:
    assert same_output(fast(*inputs, **named), model(*inputs, **named), tolerance=2e-4)


class Residual(nn.Module):
    """Norms and ReLUs that can be folded (c1, c2), and a stem whose output is read twice."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c1, self.b1, self.r1 = nn.Conv2d(8, 8, 3, bias=False, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace)
        self.c2, self.r2 = nn.Conv2d(8, 8, 1), nn.ReLU(inplace)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.c2(self.r1(self.b1(self.c1(self.norm(x)))))
        return self.head(self.r2(y).add(x).mean((2, 3)))


@pytest.mark.parametrize("inplace", [False, True])
def test_what_follows_a_layer_alone_is_folded_into_it(inplace: bool) -> None:
    model, x = zeroed(Residual(inplace)), image()
    before = copy.deepcopy(model.state_dict())
    fast = repack(model, x, choose=jit)
    assert_same(fast, model, x)
    assert_same(fast, model, image(5))
    fused = {name: row.fused for name, row in rows(fast).items()}
    assert fused == {"stem": "", "c1": "batch norm + relu", "c2": "relu", "head": ""}
    assert all(row.backend == "jit" for row in fast.report)
    assert isinstance(fast.model.b1, nn.Identity)
    assert isinstance(fast.model.r2, nn.Identity)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model.b1, nn.BatchNorm2d)
    assert rows(fast)["c1"].sparsity == pytest.approx(0.6, abs=0.01)


def test_a_dense_layer_takes_the_norm_and_leaves_the_relu() -> None:
    model, x = zeroed(Residual()), image()
    fast = repack(model, x, choose=lambda name, form: "dense")
    assert_same(fast, model, x)
    assert {name: row.fused for name, row in rows(fast).items()}["c1"] == "batch norm"
    assert isinstance(fast.model.r1, nn.ReLU)
    assert rows(fast)["c1"].backend == "dense"


class ReturnsBoth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x)
        return x, self.fc(self.norm(x))


def test_a_fold_that_changes_an_output_is_undone_and_said() -> None:
    model, x = zeroed(ReturnsBoth()), image()
    fast = repack(model, x, choose=jit)
    assert_same(fast, model, x)
    assert {row.fused for row in fast.report} == {""}
    assert {row.backend for row in fast.report} == {"jit"}
    assert "not fused" in rows(fast)["conv"].why
    assert "not fused" not in rows(fast)["fc"].why


def test_a_module_that_runs_twice_is_not_folded() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.norm(self.conv(self.relu(self.norm(self.conv(x))))))

    model, x = zeroed(Twice()), image()
    fast = repack(model, x, choose=jit)
    assert_same(fast, model, x)
    assert [row.fused for row in fast.report] == [""]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        out: Tensor = self.encoder(x, src_key_padding_mask=padding)
        return out if padding is None else out.masked_fill(padding[..., None], 0.0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the original's, in eval mode
@pytest.mark.parametrize("masked", [False, True])
def test_torchs_transformer_encoder_runs_packed(masked: bool) -> None:
    model, x = zeroed(Encoder()), torch.randn(3, 5, 16)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    inputs = (x, padding) if masked else (x,)
    fast = repack(model, inputs, choose=jit)
    assert_same(fast, model, x)
    assert_same(fast, model, x, padding=padding)
    for name, row in rows(fast).items():
        assert row.backend == ("dense" if "out_proj" in name else "jit")
        assert "never ran" in row.why or "out_proj" not in name


class ReadsWeight(nn.Module):
    """Runs one layer both ways, and one behind its back."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.behind = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x) + functional.linear(x, self.fc.weight, self.fc.bias)
        return functional.linear(x, self.behind.weight, self.behind.bias)


def test_a_weight_that_the_model_reads_itself_is_right() -> None:
    model, x = zeroed(ReadsWeight()), torch.randn(3, 16)
    fast = repack(model, x, choose=jit)
    assert_same(fast, model, x)
    assert rows(fast)["fc"].backend == "jit"
    assert rows(fast)["behind"].backend == "dense"
    assert "never ran" in rows(fast)["behind"].why


class NeedsType(nn.Module):
    """`picky` breaks with any other module in its place, in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.picky, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        factor = {nn.Linear: 1.0}[type(self.picky)]
        return self.last(self.picky(self.fc(x)) * factor)


def test_a_layer_that_its_model_does_not_accept_packed_stays_dense() -> None:
    model, x = zeroed(NeedsType()), torch.randn(3, 16)
    fast = repack(model, x, choose=jit)
    assert_same(fast, model, x)
    assert {name: row.backend for name, row in rows(fast).items()} == {"fc": "jit", "picky": "dense", "last": "jit"}
    assert "changes what this model computes" in rows(fast)["picky"].why


class Pair(NamedTuple):
    first: Tensor
    second: list[Any]


@dataclass
class Output:
    logits: Tensor
    name: str


SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda y: {"a": [y, None], "b": {"c": (y.argmax(1), "text", 3)}},
    "named tuple": lambda y: Pair(y, [y + 1, True]),
    "dataclass": lambda y: Output(y, "x"),
    "distribution": lambda y: torch.distributions.Categorical(logits=y.flatten(1)),
    "complex": torch.fft.fft,
    "nan": lambda y: y * float("nan"),
    "infinite": lambda y: y / 0.0,
    "empty": lambda y: y[:0],
    "strange": lambda y: object,
}


class Returns(nn.Module):
    def __init__(self, shape: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.shape = nn.Conv2d(4, 8, 3), shape

    def forward(self, x: Tensor) -> Any:
        return self.shape(self.conv(x))


@pytest.mark.parametrize("kind", SHAPES)
def test_any_output_is_compared(kind: str) -> None:
    model, x = zeroed(Returns(SHAPES[kind])), image()
    fast = repack(model, x, choose=jit)
    assert rows(fast)["conv"].backend == "jit"
    assert_same(fast, model, x)
    if kind not in ("nan", "empty", "strange"):
        assert not same_output(fast(x + 0.1), model(x))


def test_a_model_that_changes_its_input_leaves_the_example_alone() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x.mul_(0.5))
            return y

    model, x = zeroed(Halves()), image()
    before = x.clone()
    fast = repack(model, x, choose=jit)
    assert torch.equal(x, before)
    with torch.inference_mode():
        assert same_output(fast(x.clone()), model(x.clone()))


def test_a_random_model_is_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            return y + torch.randn_like(y)

    with pytest.raises(AutopruneError, match="not deterministic"):
        repack(Noisy(), torch.randn(2, 4), choose=jit)


def test_inputs_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(AutopruneError, match="does not run on its example inputs"):
        repack(Residual(), torch.randn(1, 3, 8, 8))


def with_hook() -> nn.Module:
    model = Residual()
    for layer in (model.c1, model.head):
        prune.l1_unstructured(layer, "weight", 0.7)
    return model


class Cut(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * (weight.abs() > weight.abs().median())


def with_parametrization() -> nn.Module:
    model = Residual()
    for layer in (model.c1, model.head):
        parametrize.register_parametrization(layer, "weight", Cut())
    return model


def with_shared_parts() -> nn.Module:
    model = Residual()
    model.c1.weight = nn.Parameter(model.c1.weight[:, :, :1, :1].clone())
    model.c1.kernel_size, model.c1.padding = (1, 1), (0, 0)
    model.c2.weight = model.c1.weight
    return model


@pytest.mark.parametrize("build", [with_hook, with_parametrization, with_shared_parts])
def test_models_pruned_or_tied_by_other_means(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = build().eval(), image()
    assert isinstance(model, Residual)
    nn.init.uniform_(model.b1.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    fast = repack(model, x, choose=jit)
    assert_same(fast, model, x)
    assert rows(fast)["c1"].backend == rows(fast)["head"].backend == "jit"
    assert rows(fast)["c1"].fused == ("batch norm + relu" if build is not with_shared_parts else "")
    assert prune.is_pruned(model) == (build is with_hook)
    assert parametrize.is_parametrized(model.c1) == (build is with_parametrization)
    model(x)  # the original still runs, and still prunes as it did


def test_masks_are_applied_to_the_copy() -> None:
    model, x = zeroed(Residual(), 0.0), image()
    mask = torch.zeros_like(model.c1.weight, dtype=torch.bool)
    mask[:4] = True
    fast = repack(model, x, {"c1": mask}, choose=jit)
    assert rows(fast)["c1"].sparsity == 0.5
    assert torch.count_nonzero(model.c1.weight) == model.c1.weight.numel()
    with torch.no_grad():
        model.c1.weight.mul_(mask)
    assert_same(fast, model, x)


def fake_times(times_ms: Mapping[str, float]) -> Callable[..., dict[str, Latency]]:
    @torch.inference_mode()
    def measure(candidates: Mapping[str, Callable[[], object]], *_: Any) -> dict[str, Latency]:
        for call in candidates.values():
            call()
        return {name: Latency.from_samples([times_ms[name]], 1) for name in candidates}

    return measure


@pytest.mark.parametrize(
    ("times_ms", "backend", "why"),
    [
        ({"dense": 1.0, "torch": 2.0, "jit": 0.5}, "jit", "2.00x faster than dense"),
        ({"dense": 1.0, "torch": 0.4, "jit": 0.5}, "torch", "2.50x faster than dense"),
        ({"dense": 1.0, "torch": 2.0, "jit": 0.98}, "dense", "no backend is faster here (jit: 980 us)"),
        ({"dense": 1.0, "torch": 1.0, "jit": 1.0}, "dense", "no backend is faster here (torch: 1000 us)"),
    ],
)
def test_the_fastest_backend_is_taken_if_it_beats_noise(
    times_ms: dict[str, float], backend: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repack_module, "measure_together", fake_times(times_ms))
    model, x = zeroed(Residual()), image()
    fast = repack(model, x)
    assert_same(fast, model, x)
    for row in fast.report:
        assert (row.backend, row.why) == (backend, why)
        assert row.dense_us == 1000.0
        assert row.packed_us == 1000 * min(times_ms["torch"], times_ms["jit"])


def test_the_clock_is_the_callers_and_a_tie_stays_dense() -> None:
    fast = repack(zeroed(Residual()), image(), protocol=QUICK, clock=FakeClock())
    for row in fast.report:
        assert row.backend == "dense"
        assert (row.dense_us, row.packed_us) == pytest.approx((1000.0, 1000.0))


def test_only_the_given_backends_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repack_module, "measure_together", fake_times({"dense": 1.0, "torch": 0.5}))
    fast = repack(zeroed(Residual()), image(), backends=["torch"])
    assert {row.backend for row in fast.report} == {"torch"}
    none = repack(zeroed(Residual()), image(), backends=[])
    assert {(row.backend, row.why) for row in none.report} == {("dense", "no other backend was allowed")}
    with pytest.raises(ConfigError, match="Did you mean 'torch'"):
        repack(Residual(), image(), backends=["torhc"])
    with pytest.raises(ConfigError, match="Did you mean 'jit'"):
        repack(zeroed(Residual()), image(), choose=lambda name, form: "jti")


def test_a_choice_is_asked_for_once_and_packs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choose(name: str, form: LayerForm) -> str:
        asked.append(name)
        assert "packed" not in vars(form)
        return "torch" if name == "c2" else "dense"

    monkeypatch.setattr(repack_module, "measure_together", lambda *_: pytest.fail("nothing is to be measured"))
    fast = repack(zeroed(Residual()), image(), choose=choose)
    assert asked == ["stem", "c1", "c2", "head"]
    assert [row.backend for row in fast.report] == ["dense", "dense", "torch", "dense"]
    assert {(row.dense_us, row.packed_us) for row in fast.report} == {(None, None)}


def test_a_choice_that_cannot_run_is_said() -> None:
    model = zeroed(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")))
    fast = repack(model, image(), choose=lambda name, form: "torch" if name == "0" else "jit")
    assert_same(fast, model, image())
    assert [row.backend for row in fast.report] == ["dense", "dense"]
    assert "grouped" in fast.report[0].why
    assert "reflect" in fast.report[1].why


def test_half_precision_stays_dense() -> None:
    model, x = zeroed(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))).double(), image().double()
    fast = repack(model, x, choose=jit)
    assert_same(fast, model, x)
    assert (fast.report[0].backend, fast.report[0].why) == ("dense", "it runs in torch.float64")
    assert fast.report[0].fused == "batch norm"


def test_a_model_that_is_one_layer() -> None:
    for model, x, kind in (
        (nn.Linear(8, 4), torch.randn(2, 8), PackedLinear),
        (nn.Conv2d(4, 8, 3), image(), PackedConv2d),
    ):
        fast = repack(zeroed(model), x, choose=jit)
        assert isinstance(fast.model, kind)
        assert_same(fast, model, x)


def test_a_repacked_model_stays_in_eval_mode_and_has_no_gradients() -> None:
    model, x = zeroed(Residual()), image()
    fast = repack(model, x, choose=jit)
    fast.train()
    assert not any(module.training for module in fast.modules())
    assert_same(fast, model, x)
    assert not fast(x).requires_grad
    with pytest.raises(AutopruneError, match="inference"):
        fast(x.requires_grad_())


def test_nothing_dense_of_a_packed_layer_lives_on() -> None:
    model, x = zeroed(Residual()), image()
    fast = repack(model, x, choose=jit)
    weights = weakref.WeakSet(model.parameters())
    del model
    gc.collect()
    assert not weights
    stored = sum(value.numel() * value.element_size() for value in fast.state_dict().values())
    dense = sum(value.numel() * value.element_size() for value in Residual().state_dict().values())
    assert stored < dense
    assert sum(isinstance(module, PackedLayer) for module in fast.modules()) == 4


def test_threads_share_a_model() -> None:
    model = zeroed(Residual())
    fast = repack(model, image(), choose=jit)

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for turn in range(20):
            x = torch.randn(1 + turn % 3, 4, 8 + seed, 9 + turn % 4, generator=generator)
            assert_same(fast, model, x)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_a_repacked_model_can_be_exported_for_any_batch() -> None:
    model, x = zeroed(Residual()), image()
    fast = repack(model, x, choose=jit).model
    program = torch.export.export(fast, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    assert sum("packed" in str(node.target) for node in program.graph.nodes if node.op == "call_function") == 4
    for batch in (2, 5):
        assert torch.equal(program.module()(image(batch)), fast(image(batch)))


def test_a_repacked_model_can_be_traced_and_copied() -> None:
    model, x = zeroed(Residual()), image()
    fast = repack(model, x, choose=jit)
    twin = copy.deepcopy(fast)
    assert twin.report == fast.report
    with torch.inference_mode():
        assert torch.equal(twin(x), fast(x))
    with torch.no_grad():
        compiled = torch.compile(fast, backend="eager", fullgraph=True)
        assert same_output(compiled(x), model(x))
