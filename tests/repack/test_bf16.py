"""Layers in bfloat16: their kernels against the same roundings in numpy and torch, what they refuse, and files."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import llvmlite.ir as ir
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.errors import AutopruneError, FileError
from autoprune.files import read_tensors, write_tensors
from autoprune.patterns import PATTERNS
from autoprune.registry import Choice
from autoprune.repack import int8 as wishes
from autoprune.repack import load, pack, repack, save
from autoprune.repack.graph.ir import Graph, Input
from autoprune.repack.graph.ops import Conv2d, LayerOp, Linear
from autoprune.repack.graph.reference import reference
from autoprune.repack.kernels import bf16
from autoprune.repack.kernels.compiler import compile_function, host, narrowed
from autoprune.repack.kernels.ir import FLOATS, load_vector, store_vector
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.runtime import program as programs
from autoprune.repack.runtime.program import Program
from autoprune.repack.tuning import both_precisions
from autoprune.repack.tuning.both_precisions import gains
from autoprune.repack.tuning.tuning import Tuned, TuningCache
from autoprune.repack.weights.pairs import LEAST, bits_of, from_bits, paired, to_bf16
from tests.repack import test_kernels
from tests.repack.rounded import in_bf16, needs_bf16

ROUNDING = 2.0**-24  # of a float32 sum, as a share of it
SIZES = (1, 2, 4, 8, 16)


def pruned(weight: Tensor, size: int, sparsity: float, groups: int = 1) -> Tensor:
    mask = PATTERNS.create(Choice("group", {"size": size})).mask(weight.abs(), sparsity, groups)
    return to_bf16(weight.detach() * mask).float()


def program_of(op: LayerOp, weight: Tensor, bias: Tensor, tiling: Tiling, x: Tensor) -> tuple[Graph, Program]:
    """One layer in bf16, packed in groups of the tiling's size."""
    graph = Graph((Input("x", tuple(x.shape), "float32"),), (op,), "y", {"w": weight, "b": bias})
    packed = pack(weight, op.conv_groups, tiling.group_size).to_bf16().validate()
    return graph, Program(graph, {"y": Weights.of(packed, bias)}, {"y": tiling}, threads=1)


def assert_within_roundings(op: LayerOp, weight: Tensor, bias: Tensor, tiling: Tiling, x: Tensor) -> None:
    """As far from the exact sums of rounded numbers as float32 sums of so many products can be, in any order."""
    graph, program = program_of(op, weight, bias, tiling, x)
    exact, sizes = (
        replace(graph, constants={"w": w, "b": b})
        for w, b in ((weight.double(), bias.double()), (weight.double().abs(), bias.double().abs()))
    )
    rounded = x.to(torch.bfloat16).double()
    with torch.inference_mode():
        got, wanted = program(x), reference(exact, (rounded,))
        bound = reference(sizes, (rounded.abs(),)) * ROUNDING * (4 + weight[0].numel())
    assert got.shape == wanted.shape
    assert bool(((got.double() - wanted).abs() <= bound).all())


# Roundings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
def test_rounding_is_torchs_for_any_bits(lanes: int) -> None:
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [FLOATS, FLOATS]), "round")
    b = ir.IRBuilder(function.append_basic_block("entry"))
    store_vector(b, bf16.rounded(b, load_vector(b, function.args[0], lanes), lanes), function.args[1], lanes)
    b.ret_void()
    call = compile_function(module, "round", host() if lanes == 16 else narrowed(max(4, lanes)), 2)
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, np.uint32)
    ends = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x17FFF, 0x18000, 0x18001]
    tops = [0, 0x3F800000, 0x7F000000, 0x7F7F0000, 0x7F800000, 0x80000000, 0xFF7F0000, 0xFF800000]
    bits[: len(ends) * len(tops)] = [(top + end) % 2**32 for top, end in itertools.product(tops, ends)]
    x = torch.from_numpy(bits.view(np.float32).copy())
    y = torch.empty_like(x)
    for start in range(0, len(x), lanes):
        call(x[start:].data_ptr(), y[start:].data_ptr())
    wanted = x.to(torch.bfloat16).float()
    assert torch.equal(y.isnan(), wanted.isnan())
    known = ~wanted.isnan()
    assert torch.equal(y[known].view(torch.int32), wanted[known].view(torch.int32))
    assert not bool((y.view(torch.int32) & 0xFFFF).any())


def test_weights_are_the_nearest_and_tiny_ones_zero() -> None:
    weight = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -3.14159, LEAST, LEAST * 0.99, -1e-40, 0.0, -0.0])
    made = to_bf16(weight)
    assert made.tolist()[:4] == [1.0, 1.0, 1 + 2**-6, -3.140625]
    assert made[4] == LEAST
    assert bits_of(made[5:]).tolist() == [0] * 4


def test_the_last_of_an_odd_list_is_read_twice_with_half_its_weight() -> None:
    counts = np.array([[3, 0], [1, 2]])
    made = paired(counts)
    assert made.counts.tolist() == [[2, 0], [1, 1]]
    assert made.places.tolist() == [[0, 1], [2, 2], [3, 3], [4, 5]]
    values = to_bf16(torch.randn(6, 4))
    words = from_bits(made.values(bits_of(values)).view(np.uint16).reshape(4, 4, 2)).float()
    sums = torch.stack([values[0] + values[1], values[2], values[3], values[4] + values[5]])
    assert torch.equal(words.sum(dim=2).to(torch.bfloat16), sums)
    assert torch.equal(words[1, :, 0], words[1, :, 1])


# Kernels -------------------------------------------------------------------------------------------------------------


@needs_bf16
@pytest.mark.parametrize("size", SIZES)
def test_a_convolution_is_equal_to_numpy_to_the_last_bit(size: int) -> None:
    """Pair after pair, the second product first, each sum rounded to float32."""
    torch.manual_seed(size)
    weight, bias, x = pruned(torch.randn(16, 5, 3, 3), size, 0.5), torch.randn(16), torch.randn(1, 5, 6, 47)
    op = Conv2d(
        "y", ("x",), {"weight": "w", "bias": "b"}, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1,
        activation=None, bf16=True,
    )  # fmt: skip
    _, program = program_of(op, weight, bias, Tiling(size), x)
    weights = program.weights["y"]
    pointer, index, _ = weights.pairs
    around = np.pad(x.to(torch.bfloat16).float().numpy()[0], ((0, 0), (1, 1), (1, 1)))
    dense, wanted = weight.numpy().reshape(16, -1), np.empty((16, 6, 47), np.float32)
    for group, rows in enumerate(weights.packed.out_index):
        for row in rows[rows >= 0]:
            total = np.full((6, 47), bias[row].item(), np.float32)
            for one, two in index[pointer[group] : pointer[group + 1]]:
                for place in (two, one):
                    channel, tap = divmod(int(place), 9)
                    read = around[channel, tap // 3 : tap // 3 + 6, tap % 3 : tap % 3 + 47]
                    total += read * np.float32(dense[row, place] / (2 if one == two else 1))
            wanted[row] = total
    with torch.inference_mode():
        assert np.array_equal(program(x)[0].numpy(), wanted)


@needs_bf16
@pytest.mark.parametrize("size", SIZES)
def test_convolutions_of_any_geometry_are_within_their_roundings(size: int) -> None:
    rng = random.Random(size)
    torch.manual_seed(size)
    for _ in range(10):
        groups, kernel = rng.choice([1, 1, 2]), rng.choice([(1, 1), (3, 3), (1, 5), (2, 3)])
        stride, padding, dilation = ((rng.randint(a, b), rng.randint(a, b)) for a, b in ((1, 2), (0, 2), (1, 2)))
        channels, filters = rng.randint(1, 5) * groups, rng.randint(1, 20) * groups
        weight = pruned(torch.randn(filters, channels // groups, *kernel), size, rng.choice([0.0, 0.5, 0.9]), groups)
        op = Conv2d(
            "y", ("x",), {"weight": "w", "bias": "b"}, stride=stride, padding=padding, dilation=dilation, groups=groups,
            activation=rng.choice([None, "relu"]), bf16=True,
        )  # fmt: skip
        side = rng.choice([3, 5, 7, 8, 14]) if kernel == (3, 3) and padding[1] == 1 else rng.randint(9, 70)
        x = torch.randn(rng.randint(1, 2), channels, rng.randint(6, 30), max(side, 5))
        tiling = Tiling(
            size, rng.choice([48, 192, 10**6]), rng.choice([0, 1, 3]), rng.random() < 0.5, rng.choice([0, 0, 7, 96]),
            serpentine=rng.random() < 0.3,
        )  # fmt: skip
        assert_within_roundings(op, weight, torch.randn(filters), tiling, x)


@needs_bf16
@pytest.mark.parametrize("size", SIZES)
def test_a_linear_is_within_its_roundings_for_any_number_of_tokens(size: int) -> None:
    torch.manual_seed(size)
    for tokens, features, out in itertools.product(((), (1,), (7,), (2, 3), (16,), (2, 20)), (5, 33), (3, 17, 32)):
        weight = pruned(torch.randn(out, features), size, 0.5)
        op = Linear("y", ("x",), {"weight": "w", "bias": "b"}, activation="relu", bf16=True)
        assert_within_roundings(op, weight, torch.randn(out), Tiling(size), torch.randn(*tokens, features))


@needs_bf16
@needs_bf16
@pytest.mark.parametrize("order", ["lc", "cl", "lcs", "scl", "cs"])
@pytest.mark.parametrize("rows", [(1, 4), (2, 4), (3, 20)])
def test_layers_of_any_kind_read_one_rounded_value(order: str, rows: tuple[int, int]) -> None:
    weights = {"linear": torch.randn(24, 32), "conv": torch.randn(5, 3, 3, 3)}
    constants = {name: to_bf16(weight).float() for name, weight in weights.items()}

    def conv(name: str, stride: int) -> Conv2d:
        return Conv2d(
            name, ("x",), {"weight": "conv"}, stride=(stride, stride), padding=(1, 1), dilation=(1, 1), groups=1,
            activation=None, bf16=True,
        )  # fmt: skip

    made = {
        "l": Linear("l", ("x",), {"weight": "linear"}, activation=None, bf16=True),
        "c": conv("c", 1),
        "s": conv("s", 2),
    }
    ops, x = [made[each] for each in order], torch.randn(rows[0], 3, rows[1], 32)
    packed = {op.output: Weights.of(pack(constants[op.tensors["weight"]]).to_bf16(), None) for op in ops}
    for op in ops:
        graph = Graph((Input("x", tuple(x.shape), "float32"),), tuple(ops), op.output, constants)
        with torch.inference_mode():
            got, wanted = Program(graph, packed, {}, threads=1)(x), reference(graph, (x,))
        assert torch.allclose(got, wanted, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("size", [1, 8, 16])
def test_what_multiplies_pairs_stays_inside_its_buffers(size: int) -> None:
    """Half of a pair is read two bytes behind where floats are."""
    torch.manual_seed(size)
    tensors = {"weight": "w", "bias": "b"}
    for turn, (kernel, window, groups, extent) in enumerate(test_kernels.CONVOLUTIONS):
        channels, filters = (8, 24) if groups < 8 else (16, 16)
        weight = pruned(torch.randn(filters, channels // groups, *np.broadcast_to(kernel, 2)), 2, 0.5, groups)
        more = {"groups": groups, "activation": (None, "relu")[turn % 2], "bf16": True, "tensors": tensors}
        op = test_kernels.window_op("conv2d", "y", ("x0",), window, **more)
        constants, x = {"w": weight, "b": torch.randn(filters)}, torch.randn(2, channels, *extent)
        for tiling in (Tiling(), (*test_kernels.PANELS, *test_kernels.BLOCKS)[turn % 3]):
            program = test_kernels.program_of([op], constants, [x], size, 16, tiling)
            test_kernels.assert_stays_inside(program, [x])
    for tokens in (1, 7, 40):
        linear = Linear("y", ("x0",), tensors, activation=None, bf16=True)
        constants, x = {"w": pruned(torch.randn(24, 33), 2, 0.5), "b": torch.randn(24)}, torch.randn(tokens, 33)
        test_kernels.assert_stays_inside(test_kernels.program_of([linear], constants, [x], size, 16), [x])


@needs_bf16
def test_infinite_and_undefined_inputs_go_where_they_are_read() -> None:
    """An odd number of weights, none of them zero: nothing infinite becomes undefined by being read twice."""
    weight = to_bf16(torch.rand(8, 3, 1, 1) + 0.5).float()
    x = torch.randn(1, 3, 4, 20)
    x[0, 2, 1, 3], x[0, 2, 2, 5], x[0, 0, 3, 7] = float("inf"), 3.4e38, float("nan")
    op = Conv2d(
        "y", ("x",), {"weight": "w", "bias": "b"}, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1,
        activation=None, bf16=True,
    )  # fmt: skip
    graph, program = program_of(op, weight, torch.zeros(8), Tiling(8), x)
    with torch.inference_mode():
        got, wanted = program(x), reference(graph, (x,))
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.isinf(), wanted.isinf())
    assert int(wanted.isnan().sum()) == 8
    assert int(wanted.isinf().sum()) == 16  # one was rounded to it


# Models --------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Every sort of layer: packed with a residual and strides, depthwise, of few tokens, recurrent."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1, 2)
        self.one, self.two = nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.deep, self.cell, self.head = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.LSTM(16, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.deep(self.down(x) + self.two(self.one(x).relu())).relu()
        states, _ = self.cell(x.flatten(2))
        y: Tensor = self.head(states.mean(dim=1))
        return y


def net() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    for layer in (model.one, model.two, model.head):
        with torch.no_grad():
            layer.weight.copy_(pruned(layer.weight, 2, 0.5))
    return model


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@needs_bf16
def test_a_model_is_rounded_and_its_report_says_where_and_why() -> None:
    model = net()
    made = in_bf16(model, X)
    rows = {row.name: row for row in made.report}
    rounded = {"stem", "down", "one", "two", "cell.weight_ih_l0", "head"}  # of the LSTM what meets its input
    assert {name for name, row in rows.items() if row.precision == "bf16"} == rounded
    for name in rounded:
        assert 35 < (rows[name].snr_db or 0) < 70
        assert rows[name].why == "packed; 2.00 times as fast as in float32"
    assert rows["deep"].why.endswith("float32: only packed layers have kernels for bf16")
    assert "has no kernel for bf16" in rows["cell.weight_hh_l0"].why
    with torch.inference_mode():
        wanted = model(X)
        assert 0 < float((made(X) - wanted).norm() / wanted.norm()) < 0.02
        assert made(X).shape == wanted.shape


@needs_bf16
def test_layers_that_gain_nothing_stay_as_they_are() -> None:
    model = net()
    made, plain = in_bf16(model, X, gain=0.5), repack(model, X, threads=1)
    told = "packed; float32: bf16 takes 2.00 of its time, and would have to take 0.97"
    assert {row.precision for row in made.report} == {"float32"}
    assert {row.name: row.why for row in made.report}["one"] == told
    with torch.inference_mode():
        assert torch.equal(made(X), plain(X))


@needs_bf16
def test_gains_are_measured_once_and_remembered(tmp_path: Path) -> None:
    model, seen = nn.Sequential(nn.Linear(64, 32)).eval(), []
    cache = TuningCache(tmp_path / "tuning.json")
    ticks = itertools.count()

    def clock() -> float:
        seen.append(next(ticks))
        return float(seen[-1])

    repack(model, torch.randn(1, 64), form="program", precision="bf16", cache=cache)
    assert len(cache.bf16_gains) == 1
    known = TuningCache(tmp_path / "tuning.json")
    assert known.bf16_gains == cache.bf16_gains
    (key,) = known.bf16_gains
    first, second = (Tuned({}, {}, {}, {"y": text}) for text in json.loads(key))
    program = Program(Graph((), (), (), {}), {})
    found = gains((program, program), (first, second), ["y"], (), known, clock)
    assert found == {"y": known.bf16_gains[key]}
    assert not seen


def test_data_and_grids_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wishes, "host", lambda: replace(host(), lanes=16, features="+avx512bf16,+avx512vl"))
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    with pytest.raises(AutopruneError, match="bf16 needs none"):
        repack(model, torch.randn(1, 8), precision="bf16", calibration=[torch.randn(4, 8)])
    with pytest.raises(AutopruneError, match="packed modules are float32"):
        repack(model, torch.randn(1, 8), precision="bf16", form="modules")
    autoprune.quantize_(model, torch.randn(1, 8), [torch.randn(4, 8)])
    with pytest.raises(AutopruneError, match="fake-quantised"):
        repack(model, torch.randn(1, 8), precision="bf16")


# Machines ------------------------------------------------------------------------------------------------------------

LACKING = r"needs the instruction vdpbf16ps \(AVX512_BF16\), which .* lacks: use precision='float32', or 'int8'"


def test_a_machine_without_the_instruction_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wishes, "host", lambda: narrowed(8))
    with pytest.raises(AutopruneError, match=LACKING):
        repack(nn.Linear(8, 8).eval(), torch.randn(1, 8), precision="bf16")


def test_what_is_not_of_layers_or_of_fake_quantisation_is_refused() -> None:
    with pytest.raises(AutopruneError, match="layer 'one': its precision is one of"):
        repack(net(), X, precision={"one": "bf16"})  # type: ignore[dict-item]
    with pytest.raises(AutopruneError, match="fake quantisation is int8 or mixed"):
        autoprune.quantize_(net(), X, [X], precision="bf16")  # type: ignore[arg-type]


@needs_bf16
def test_what_is_timed_of_a_layer_begins_with_what_is_given() -> None:
    model = nn.Conv2d(8, 8, 1, 2).eval()
    program = in_bf16(model, X.repeat(1, 3, 1, 1)[:, :8]).program
    form = both_precisions._Form(program, (X.repeat(1, 3, 1, 1)[:, :8],))
    [layer] = [op.output for op in program.graph.ops]
    own = next(number for number, step in enumerate(form._steps) if step.layer is not None)
    assert own > 1  # every point is rounded, a quarter of them is taken
    assert len(form.layer(layer).ops) == own + 1


def test_a_program_for_another_target_is_refused() -> None:
    weight, x = to_bf16(torch.randn(8, 8)).float(), torch.randn(1, 8)
    op = Linear("y", ("x",), {"weight": "w"}, activation=None, bf16=True)
    graph = Graph((Input("x", (1, 8), "float32"),), (op,), "y", {"w": weight})
    weights = {"y": Weights.of(pack(weight).to_bf16(), None)}
    with pytest.raises(AutopruneError, match=LACKING):
        Program(graph, weights, target=narrowed(8))(x)


@needs_bf16
@pytest.mark.parametrize("target", ["x86-64-v4", "aarch64", "wasm32"])
def test_it_is_not_built_for_other_targets(target: str, tmp_path: Path) -> None:
    made = in_bf16(nn.Sequential(nn.Linear(16, 16)).eval(), torch.randn(1, 16))
    with pytest.raises(AutopruneError, match=LACKING):
        autoprune.build(made, target, out=tmp_path / "made")
    assert not (tmp_path / "made").exists()


# Files ---------------------------------------------------------------------------------------------------------------


@needs_bf16
def test_a_file_holds_bfloat16_numbers_and_gives_the_same_program(tmp_path: Path) -> None:
    made, path = in_bf16(net(), X), tmp_path / "net.safetensors"
    save(made, path)
    tensors, _ = read_tensors(path, "it")
    assert {name: tensors[f"layer|{name}|values"].dtype for name in made.program.weights} == {
        name: torch.bfloat16 if weights.packed.in_bf16 else torch.float32
        for name, weights in made.program.weights.items()
    }
    again = load(path, threads=1)
    assert again.report == made.report
    with torch.inference_mode():
        assert torch.equal(again(X), made(X))


@needs_bf16
@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=needs_bf16), "int8"])
def test_a_model_whose_rounding_makes_no_error_is_saved(precision: str, tmp_path: Path) -> None:
    dead = nn.Linear(16, 16)
    nn.init.zeros_(dead.weight)
    nn.init.zeros_(dead.bias)
    model = nn.Sequential(dead, nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(3, 16)
    made = in_bf16(model, x) if precision == "bf16" else repack(model, x, precision="int8", calibration=[x])
    assert {row.name: row.snr_db for row in made.report}["0"] is None
    save(made, tmp_path / "dead.safetensors")
    with torch.inference_mode():
        assert torch.equal(load(tmp_path / "dead.safetensors")(x), made(x))


def test_a_file_is_refused_where_the_instruction_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.safetensors"
    save(in_bf16(net(), X), path)
    monkeypatch.setattr(programs, "host", lambda: narrowed(8))
    with pytest.raises(AutopruneError, match=LACKING):
        load(path)


@needs_bf16
def test_a_file_whose_layer_and_weight_differ_in_precision_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save(in_bf16(net(), X), path)
    tensors, about = read_tensors(path, "it")
    rounded = [row for row in about["graph"]["ops"] if row["attributes"].get("bf16")]
    del rounded[0]["attributes"]["bf16"]
    write_tensors(path, tensors, about)
    with pytest.raises(FileError, match="one is in bf16 and one is not"):
        load(path)
