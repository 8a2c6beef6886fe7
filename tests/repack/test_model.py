"""`repack` on whole models: that the output stays the original's in either form, what is reported, fused and undone."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize, prune

from autoprune.errors import AutopruneError, ConfigError
from autoprune.latency.timer import Latency, Protocol
from autoprune.model.weights import weight_of
from autoprune.repack import CaptureError, LayerForm, ProgramModel, RepackedModel, SwappedModel, capture, load, repack
from autoprune.repack import model as repack_module
from autoprune.repack.graph.ir import Graph
from autoprune.repack.graph.passes import simplify
from autoprune.repack.modules import replacement
from autoprune.repack.modules.layers import PackedConv2d, PackedLayer, PackedLinear
from autoprune.repack.outputs import same_output
from autoprune.repack.tuning.tuning import TuningCache
from autoprune.testing import FakeClock

QUICK = Protocol(samples=1, warmup=1, min_sample_ms=0.0)
Form = Literal["program", "modules"]
Model = TypeVar("Model", bound=nn.Module)
BOTH = pytest.mark.parametrize("form", ["program", "modules"])


def jit(name: str, form: LayerForm) -> str:
    return "jit"


def packed(model: nn.Module, inputs: Any, form: Form, masks: dict[str, Tensor] | None = None) -> RepackedModel:
    """Repacks in one form; every layer runs packed that can."""
    if form == "program":
        fast = repack(model, inputs, masks, form=form)
        assert isinstance(fast, ProgramModel)
        return fast
    return swapped(model, inputs, masks)


def swapped(model: nn.Module, inputs: Any, masks: dict[str, Tensor] | None = None) -> SwappedModel:
    fast = repack(model, inputs, masks, choose=jit)
    assert isinstance(fast, SwappedModel)
    return fast


def zeroed(model: Model, sparsity: float = 0.6) -> Model:
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
        return cast("Tensor", self.head(self.r2(y).add(x).mean((2, 3))))


@BOTH
@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_is_the_same_faster_for_any_batch_and_left_as_it_is(form: Form, inplace: bool) -> None:
    model, x = zeroed(Residual(inplace)), image()
    before = copy.deepcopy(model.state_dict())
    fast = packed(model, x, form)
    for batch in (2, 1, 5, 0):
        assert_same(fast, model, image(batch))
    assert [row.name for row in fast.report] == ["stem", "c1", "c2", "head"]
    assert [row.kind for row in fast.report] == ["conv2d", "conv2d", "conv2d", "linear"]
    assert all(row.backend == "jit" for row in fast.report)
    assert rows(fast)["c1"].sparsity == pytest.approx(0.6, abs=0.01)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model.b1, nn.BatchNorm2d)


def test_what_follows_a_layer_alone_is_folded_into_it() -> None:
    model = zeroed(Residual())
    fast = swapped(model, image())
    assert isinstance(fast.model.b1, nn.Identity)
    assert isinstance(fast.model.r2, nn.Identity)
    fused = {name: row.fused for name, row in rows(fast).items()}
    assert fused == {"stem": "", "c1": "batch norm + relu", "c2": "relu", "head": ""}


@pytest.mark.slow
def test_a_program_fuses_sums_too() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c1, self.b1, self.c2, self.b2 = (
                nn.Conv2d(4, 4, 1),
                nn.BatchNorm2d(4),
                nn.Conv2d(4, 4, 1),
                nn.Identity(),
            )
            self.norm, self.unused = nn.BatchNorm2d(4), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.c1(x)
            return functional.silu(self.norm(self.c2(functional.relu(self.b1(x)))) + x)

    model, x = zeroed(Sum()), image()
    fast = packed(model, x, "program")
    assert_same(fast, model, x)
    assert [row.fused for row in fast.report] == ["", "sum + silu", ""]
    assert [row.backend for row in fast.report] == ["jit", "jit", "dense"]
    assert fast.report[2].why == "the program does not call it"


def test_a_programs_report_says_what_was_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = zeroed(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(384, 4)))
    with torch.no_grad():
        weight = weight_of(model, "0")
        weight[4:] = weight[:4]
    told: list[str] = []
    cache = TuningCache(tmp_path / "tuning.json")
    fast = repack(model, image(), form="program", clock=FakeClock(), cache=cache, progress=told.append)
    assert_same(fast, model, image())
    conv, depthwise, linear = fast.report
    assert told[0] == "capturing the model"
    assert len(told) == 6  # and the two layers that were timed, for the batch and for a sample, and these two
    assert [row.packed_us for row in fast.report] == [pytest.approx(1000.0), None, pytest.approx(1000.0)]
    assert {row.dense_us for row in fast.report} == {None}
    assert conv.group_size in (1, 2, 4, 8, 16)
    assert linear.why == "packed"
    assert depthwise.why == "depthwise: not packed"


def test_a_dense_layer_takes_the_norm_and_leaves_the_relu() -> None:
    model, x = zeroed(Residual()), image()
    fast = repack(model, x, choose=lambda name, form: "dense")
    assert_same(fast, model, x)
    assert {name: row.fused for name, row in rows(fast).items()}["c1"] == "batch norm"
    assert isinstance(fast, SwappedModel)
    assert isinstance(fast.model.get_submodule("r1"), nn.ReLU)
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
            return cast("Tensor", self.relu(self.norm(self.conv(self.relu(self.norm(self.conv(x)))))))

    model, x = zeroed(Twice()), image()
    fast = repack(model, x, choose=jit)
    assert_same(fast, model, x)
    assert [row.fused for row in fast.report] == [""]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        out: Tensor = self.encoder(x, src_key_padding_mask=padding)
        return out if padding is None else out.masked_fill(padding[..., None], 0.0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the original's, in eval mode
@BOTH
@pytest.mark.parametrize("masked", [False, True])
def test_torchs_transformer_encoder_runs_packed(form: Form, masked: bool) -> None:
    model, x = zeroed(Encoder()), torch.randn(3, 5, 16)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    inputs = (x, padding) if masked else (x,)
    fast = packed(model, inputs, form)
    if masked or form == "modules":
        assert_same(fast, model, x, padding=padding)
        assert_same(fast, model, x, padding)
    if not masked or form == "modules":
        assert_same(fast, model, x)
    for name, row in rows(fast).items():
        dense = "self_attn" in name and form == "modules"  # torch reads these weights behind their modules' backs
        assert row.backend == ("dense" if dense else "jit")
        assert "never ran" in row.why or "only a program packs it" in row.why or not dense


class ReadsWeight(nn.Module):
    """Runs one layer both ways, and one behind its back."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.behind = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x) + functional.linear(x, self.fc.weight, self.fc.bias)
        return functional.linear(x, self.behind.weight, self.behind.bias)


@BOTH
def test_a_weight_that_the_model_reads_itself_is_right(form: Form) -> None:
    model, x = zeroed(ReadsWeight()), torch.randn(3, 16)
    fast = packed(model, x, form)
    assert_same(fast, model, x)
    assert rows(fast)["fc"].backend == "jit"
    assert rows(fast)["behind"].backend == ("jit" if form == "program" else "dense")
    assert "never ran" in rows(fast)["behind"].why or form == "program"


class Tied(nn.Module):
    """A language model's embedding and head: one weight, packed and read whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.mix(self.embed(x)))
        return y


@BOTH
def test_a_weight_shared_with_an_embedding_is_packed_and_kept(form: Form) -> None:
    model, x = zeroed(Tied()), torch.randint(0, 20, (3, 5))
    fast = packed(model, x, form)
    assert_same(fast, model, x)
    assert_same(fast, model, torch.randint(0, 20, (7, 5)))
    assert [row.backend for row in fast.report] == ["jit", "jit"]


class NeedsType(nn.Module):
    """`picky` breaks with any other module in its place, in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.picky, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        factor = {nn.Linear: 1.0}[type(self.picky)]
        return cast("Tensor", self.last(self.picky(self.fc(x)) * factor))


def test_a_layer_that_its_model_does_not_accept_packed_stays_dense() -> None:
    model, x = zeroed(NeedsType()), torch.randn(3, 16)
    fast = swapped(model, x)
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
    "nested": lambda y: {"a": [y, None], "b": {"c": (y.argmax(1), 0.5, 3, True)}, "d": ()},
    "text": lambda y: {"a": [y, None], "b": {"c": (y.argmax(1), "text", 3)}},
    "named tuple": lambda y: Pair(y, [y + 1, True]),
    "dataclass": lambda y: Output(y, "x"),
    "distribution": lambda y: torch.distributions.Categorical(logits=y.flatten(1), validate_args=False),
    "complex": torch.fft.fft,
    "nan": lambda y: y * float("nan"),
    "infinite": lambda y: y / 0.0,
    "empty": lambda y: y[:0],
    "strange": lambda y: object,
}


WHOLE = (
    "nested",
    "text",
    "named tuple",
    "dataclass",
    "distribution",
    "nan",
    "infinite",
    "empty",
)  # that a program can return


class Returns(nn.Module):
    def __init__(self, shape: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.shape = nn.Conv2d(4, 8, 3), shape

    def forward(self, x: Tensor) -> Any:
        return self.shape(self.conv(x))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("choose", [None, jit])
def test_any_output_is_compared(kind: str, choose: Callable[[str, LayerForm], str] | None) -> None:
    model, x = zeroed(Returns(SHAPES[kind])), image()
    fast = repack(model, x, choose=choose, protocol=QUICK)
    assert isinstance(fast, ProgramModel) == (choose is None and kind in WHOLE)
    if choose or isinstance(fast, ProgramModel):  # else timings decide
        assert rows(fast)["conv"].backend == "jit"
    assert_same(fast, model, x)
    if kind not in ("nan", "empty", "strange"):
        with torch.inference_mode():
            assert not same_output(fast(x + 0.1), model(x))


@pytest.mark.parametrize("choose", [None, jit])
def test_a_model_that_changes_its_input_leaves_the_example_alone(
    choose: Callable[[str, LayerForm], str] | None,
) -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x.mul_(0.5))
            return y

    model, x = zeroed(Halves()), image()
    before = x.clone()
    fast = repack(model, x, choose=choose, protocol=QUICK)
    assert torch.equal(x, before)
    assert isinstance(fast, SwappedModel)
    with torch.inference_mode():
        assert same_output(fast(x.clone()), model(x.clone()))


@pytest.mark.parametrize("form", [None, "modules", "program"])
def test_a_random_model_is_refused(form: Form | None) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            return y + torch.randn_like(y)

    with pytest.raises(AutopruneError, match="rand" if form == "program" else "not deterministic"):
        repack(Noisy(), torch.randn(2, 4), form=form, protocol=QUICK)


@BOTH
def test_inputs_that_do_not_fit_are_an_error(form: Form) -> None:
    with pytest.raises(AutopruneError, match="does not run on its example inputs"):
        repack(Residual(), torch.randn(1, 3, 8, 8), form=form)
    with pytest.raises(AutopruneError, match="does not run on its example inputs"):
        repack(Residual(), (), form=form)


@BOTH
@pytest.mark.parametrize("threads", [0, -1, True, 2.0, "2"])
def test_a_wrong_number_of_threads_is_an_error(form: Form, threads: Any) -> None:
    with pytest.raises(AutopruneError, match="positive integer"):
        repack(Residual(), image(), form=form, threads=threads)
    with pytest.raises(AutopruneError, match="positive integer"):
        load("nowhere", threads=threads)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 8, 3), nn.Linear(6, 8)

    def forward(self, picture: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(picture).mean((2, 3))
        return x + self.fc(words), words


@BOTH
def test_several_inputs_come_by_place_or_by_name(form: Form) -> None:
    model, x, words = zeroed(TwoInputs()), image(), torch.randn(2, 6)
    for inputs in ((x, words), [x, words]):
        fast = packed(model, inputs, form)
        assert_same(fast, model, x, words)
        assert_same(fast, model, image(5), torch.randn(5, 6))
        assert_same(fast, model, x, words=words)
        assert_same(fast, model, words=words, picture=x)


class Branches(nn.Module):
    """Control flow on data: no graph holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y if y.sum() > 0 else -y


def test_a_model_that_cannot_be_captured_is_repacked_layer_by_layer() -> None:
    model, x = zeroed(Branches()), image()
    fast = repack(model, x, protocol=QUICK)
    assert isinstance(fast, SwappedModel)
    assert_same(fast, model, x)
    assert_same(fast, model, -x)
    assert "layer by layer, since torch.export cannot capture the model" in fast.report[0].why
    with pytest.raises(CaptureError, match="cannot capture"):
        repack(model, x, form="program")


def test_a_program_that_computes_something_else_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: Graph) -> Graph:
        made = simplify(graph)
        return replace(made, constants={name: value * 1.01 for name, value in made.constants.items()})

    monkeypatch.setattr(repack_module, "simplify", wrong)
    model, x = zeroed(Residual()), image()
    with pytest.raises(CaptureError, match="does not reproduce"):
        repack(model, x, form="program")
    fast = repack(model, x, protocol=QUICK)
    assert isinstance(fast, SwappedModel)
    assert_same(fast, model, x)
    assert "does not reproduce" in fast.report[0].why


def test_a_program_that_cannot_run_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AutopruneError("a feature map is too large")

    monkeypatch.setattr(repack_module, "build_program", fail)
    model, x = zeroed(Residual()), image()
    with pytest.raises(CaptureError, match="cannot run: a feature map is too large"):
        repack(model, x, form="program")
    fast = repack(model, x, protocol=QUICK)
    assert isinstance(fast, SwappedModel)
    assert "too large" in fast.report[0].why


def test_a_known_graph_saves_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = zeroed(Residual()), image()
    graph = capture(Residual().eval(), (x,))
    with monkeypatch.context() as patch:
        patch.setattr(repack_module, "capture", lambda *_: pytest.fail("it is captured already"))
        assert_same(repack(model, x, form="program", graph=graph), model, x)
    other = zeroed(TwoInputs())
    assert_same(repack(other, (x, torch.randn(2, 6)), form="program", graph=graph), other, x, torch.randn(2, 6))


@BOTH
def test_a_zero_model_and_a_dense_one(form: Form) -> None:
    for sparsity in (0.0, 1.0):
        model, x = zeroed(Residual(), sparsity), image()
        if sparsity == 1.0:
            for layer in (model.stem, model.c1, model.c2, model.head):
                nn.init.zeros_(layer.weight)
        fast = packed(model, x, form)
        assert_same(fast, model, x)
        assert {row.sparsity for row in fast.report} == {sparsity}


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


@BOTH
@pytest.mark.parametrize("build", [with_hook, with_parametrization, with_shared_parts])
def test_models_pruned_or_tied_by_other_means(build: Callable[[], nn.Module], form: Form) -> None:
    torch.manual_seed(0)
    model, x = build().eval(), image()
    assert isinstance(model, Residual)
    nn.init.uniform_(model.b1.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    fast = packed(model, x, form)
    assert_same(fast, model, x)
    assert rows(fast)["c1"].backend == rows(fast)["head"].backend == "jit"
    if form == "modules":
        assert rows(fast)["c1"].fused == ("batch norm + relu" if build is not with_shared_parts else "")
    assert prune.is_pruned(model) == (build is with_hook)
    assert parametrize.is_parametrized(model.c1) == (build is with_parametrization)
    model(x)  # the original still runs, and still prunes as it did


@BOTH
def test_masks_are_applied_to_the_copy(form: Form) -> None:
    model, x = zeroed(Residual(), 0.0), image()
    mask = torch.zeros_like(model.c1.weight, dtype=torch.bool)
    mask[:4] = True
    fast = packed(model, x, form, {"c1": mask})
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
    monkeypatch.setattr(replacement, "measure_together", fake_times(times_ms))
    model, x = zeroed(Residual()), image()
    fast = repack(model, x, form="modules")
    assert_same(fast, model, x)
    for row in fast.report:
        assert (row.backend, row.why) == (backend, why)
        assert row.dense_us == 1000.0
        assert row.packed_us == 1000 * min(times_ms["torch"], times_ms["jit"])


def test_the_clock_is_the_callers_and_a_tie_stays_dense() -> None:
    fast = repack(zeroed(Residual()), image(), form="modules", protocol=QUICK, clock=FakeClock())
    for row in fast.report:
        assert row.backend == "dense"
        assert (row.dense_us, row.packed_us) == pytest.approx((1000.0, 1000.0))


def test_only_the_given_backends_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replacement, "measure_together", fake_times({"dense": 1.0, "torch": 0.5}))
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

    monkeypatch.setattr(replacement, "measure_together", lambda *_: pytest.fail("nothing is to be measured"))
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
    whole = packed(model, x, "program")
    assert_same(whole, model, x)
    assert (whole.report[0].backend, whole.report[0].why) == ("dense", "it runs in torch.float64")


def test_a_model_that_is_one_layer() -> None:
    for model, x, kind in (
        (nn.Linear(8, 4), torch.randn(2, 8), PackedLinear),
        (nn.Conv2d(4, 8, 3), image(), PackedConv2d),
    ):
        fast = swapped(zeroed(model), x)
        assert isinstance(fast.model, kind)
        assert_same(fast, model, x)
        assert_same(packed(model, x, "program"), model, x)


@BOTH
def test_a_repacked_model_stays_in_eval_mode_and_has_no_gradients(form: Form) -> None:
    model, x = zeroed(Residual()), image()
    fast = packed(model, x, form)
    fast.train()
    assert not any(module.training for module in fast.modules())
    assert_same(fast, model, x)
    assert not fast(x).requires_grad
    with pytest.raises(AutopruneError, match="inference"):
        fast(x.requires_grad_())


@BOTH
def test_nothing_of_the_model_lives_on(form: Form) -> None:
    model, x = zeroed(Residual()), image()
    fast = packed(model, x, form)
    weights = weakref.WeakSet([*model.parameters(), *model.modules()])
    del model
    gc.collect()
    assert not weights
    assert fast(x).shape == (2, 5)


def test_packed_layers_keep_nothing_dense() -> None:
    fast = swapped(zeroed(Residual()), image())
    stored = sum(value.numel() * value.element_size() for value in fast.state_dict().values())
    dense = sum(value.numel() * value.element_size() for value in Residual().state_dict().values())
    assert stored < dense
    assert sum(isinstance(module, PackedLayer) for module in fast.modules()) == 4


def test_threads_share_a_model() -> None:
    model = zeroed(Residual())
    fast = swapped(model, image())

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for turn in range(20):
            x = torch.randn(1 + turn % 3, 4, 8 + seed, 9 + turn % 4, generator=generator)
            assert_same(fast, model, x)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_a_repacked_model_can_be_exported_for_any_batch() -> None:
    model, x = zeroed(Residual()), image()
    fast = swapped(model, x).model
    program = torch.export.export(fast, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    assert sum("packed" in str(node.target) for node in program.graph.nodes if node.op == "call_function") == 4
    for batch in (2, 5):
        assert torch.equal(program.module()(image(batch)), fast(image(batch)))


@BOTH
def test_a_repacked_model_can_be_copied(form: Form) -> None:
    model, x = zeroed(Residual()), image()
    fast = packed(model, x, form)
    twin = copy.deepcopy(fast)
    assert twin.report == fast.report
    with torch.inference_mode():
        wanted = fast(x)
        assert torch.equal(twin(x), wanted)
        del fast
        gc.collect()
        assert torch.equal(twin(x), wanted)


@BOTH
def test_torch_compile_takes_a_repacked_model(form: Form) -> None:
    model, x = zeroed(Residual()), image()
    fast = packed(model, x, form)
    with torch.no_grad():
        compiled = torch.compile(fast, backend="eager", fullgraph=form == "modules")
        assert same_output(compiled(x), model(x))
        assert same_output(compiled(image(3)), model(image(3)))
