"""A program at work: threads, processes, shapes, memory, what it refuses, and what tuning remembers."""

from __future__ import annotations

import copy
import ctypes
import functools
import gc
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite.ir as ir
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.documents import parse_json
from autoprune.errors import AutopruneError
from autoprune.files import read_json, write_json
from autoprune.model.weights import weight_of
from autoprune.repack import Graph, ProgramModel, capture, load, repack, save
from autoprune.repack.graph.passes import simplify
from autoprune.repack.kernels.compiler import Kernel, host
from autoprune.repack.lowering.buffers import Buffer, place
from autoprune.repack.lowering.steps import ARENA, NativeStep, TorchStep
from autoprune.repack.lowering.weights import Weights
from autoprune.repack.native.op import NativeOp
from autoprune.repack.native.sequence import NativeSequence, give_way, runner
from autoprune.repack.outputs import same_output
from autoprune.repack.runtime import program as program_module
from autoprune.repack.runtime.program import Program
from autoprune.repack.runtime.recent import Recent
from autoprune.repack.runtime.thread_pool import Job, Team, team
from autoprune.repack.tuning import tuning
from autoprune.repack.tuning.tuning import TuningCache
from autoprune.repack.weights.packed import pack
from autoprune.testing import FakeClock

Model = TypeVar("Model", bound=nn.Module)


class Mixed(nn.Module):
    """Native ops with torch's between them, values that live long, and every kind of output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.wide = nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.Conv2d(8, 12, 1)
        self.pool, self.fc, self.last = nn.MaxPool2d(3, 2, 1), nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        stem = self.norm(self.stem(x)).relu()
        y = self.pool(self.deep(stem))
        y = self.wide(torch.roll(y, 1, 2)) + torch.zeros(x.shape[0], 12, 1, 1)
        tokens = y.flatten(2).transpose(1, 2)
        y = self.last(self.fc(tokens).cumprod(1).relu())
        return {
            "y": y,
            "views": [y[:, 0], stem],
            "rows": y.softmax(-1),
            "image": x,
            "count": (x.shape[0], self.last.bias),
        }


def pruned(model: Model, sparsity: float = 0.5) -> Model:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.normal_(0, 0.4, generator=generator)
                module.weight.mul_(torch.rand(module.weight.shape, generator=generator) >= sparsity)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 2.0, generator)  # type: ignore[arg-type]
    return model.eval()


def image(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 16, 14, generator=torch.Generator().manual_seed(seed))


def program_of(model: nn.Module, x: Any, **more: Any) -> ProgramModel:
    fast = repack(model, x, form="program", **more)
    assert isinstance(fast, ProgramModel)
    return fast


@pytest.fixture(scope="module")
def mixed() -> tuple[nn.Module, ProgramModel]:
    model = pruned(Mixed())
    return model, program_of(model, image())


@pytest.fixture
def fast(mixed: tuple[nn.Module, ProgramModel]) -> ProgramModel:
    """Of the same weights, with plans and memory of its own."""
    return copy.deepcopy(mixed[1])


def with_threads(fast: ProgramModel, threads: int | None) -> ProgramModel:
    made = fast.program
    return ProgramModel(
        Program(made.graph, made.weights, made.tilings, threads, made.target), fast.report, fast.signature
    )


def identical(one: Any, other: Any) -> bool:
    return same_output(one, other, tolerance=0.0)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


# Threads and processes -----------------------------------------------------------------------------------------------


def test_a_program_is_the_model_for_any_batch(mixed: tuple[nn.Module, ProgramModel]) -> None:
    model, fast = mixed
    for batch in (2, 1, 0, 7, 2):
        assert same_output(fast(image(batch)), model(image(batch)))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_a_program(mixed: tuple[nn.Module, ProgramModel], threads: int) -> None:
    fast = with_threads(mixed[1], threads)
    inputs = [image(1 + seed % 5, seed) for seed in range(10)]
    wanted = [mixed[1](x) for x in inputs]

    @torch.inference_mode()
    def work(seed: int) -> bool:
        rng = random.Random(seed)
        order = [rng.randrange(len(inputs)) for _ in range(25)]
        return all(identical(fast(inputs[i]), wanted[i]) for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_several_programs_run_at_once() -> None:
    models = [pruned(nn.Sequential(nn.Conv2d(3, 4 + i, 3), nn.ReLU(), nn.Conv2d(4 + i, 3, 1))) for i in range(3)]
    made = [program_of(model, image(), threads=2) for model in models]

    @torch.inference_mode()
    def work(seed: int) -> bool:
        x = image(1 + seed % 3, seed)
        return all(same_output(fast(x), model(x)) for _ in range(15) for fast, model in zip(made, models, strict=True))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


def test_the_number_of_threads_does_not_change_a_bit(mixed: tuple[nn.Module, ProgramModel]) -> None:
    wanted = mixed[1](image())
    for threads in (1, 2, 3, 5):
        assert identical(with_threads(mixed[1], threads)(image()), wanted)


def test_a_program_follows_torchs_threads(
    mixed: tuple[nn.Module, ProgramModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counted(size: int) -> Team:
        asked.append(size)
        return team(size)

    monkeypatch.setattr(program_module, "team", counted)
    free, fixed = with_threads(mixed[1], None), with_threads(mixed[1], 3)
    wanted = free(image())
    assert asked == []
    torch.set_num_threads(2)
    try:
        assert identical(free(image()), wanted)
        assert set(asked) == {2}
        asked.clear()
        assert identical(fixed(image()), wanted)
        assert set(asked) == {3}
    finally:
        torch.set_num_threads(1)
    asked.clear()
    assert identical(free(image()), wanted)
    assert asked == []


class LateTeam:
    """Helpers that begin when the call they were asked for is long over, or never."""

    def __init__(self, comes: bool) -> None:
        self.comes = comes
        self.waiting: list[LateTicket] = []

    def join_in(self, job: Job, keep: object) -> list[LateTicket]:
        if self.comes:
            for ticket in self.waiting:
                ticket.come()
        self.waiting = [LateTicket(number, job, keep) for number in (1, 2)]
        return self.waiting


class LateTicket:
    def __init__(self, number: int, job: Job, keep: object) -> None:
        self.number, self.job, self.keep, self.over = number, job, keep, False

    def come(self) -> None:
        table, ops, slots, counters, threads = self.job
        runner()(table, 0, ops, slots, counters, self.number, threads, give_way())
        self.over = True

    def forget(self) -> None:
        pass


@pytest.mark.parametrize("comes", [True, False])
def test_a_late_helper_disturbs_nobody(
    mixed: tuple[nn.Module, ProgramModel], comes: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, known = mixed
    wanted = [known(image(2, seed)) for seed in range(4)]
    team = LateTeam(comes)
    monkeypatch.setattr(program_module, "team", lambda size: team)
    fast = with_threads(known, 3)
    for seed in (0, 1, 2, 3, 0):
        assert identical(fast(image(2, seed)), wanted[seed])
    tuned = program_of(model, image(), threads=3, cache=TuningCache(tmp_path / "tuning.json"))
    assert same_output(tuned(image()), wanted[0])


class Called(Kernel):
    """An op that is a Python function."""

    def __init__(self, work: Callable[[int], None]) -> None:
        super().__init__("called", host(), ir.Module)
        self._called = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(lambda fields, slots, item, thread: work(thread))

    @property
    def address(self) -> int:
        return ctypes.cast(self._called, ctypes.c_void_p).value or 0


def one_op(work: Callable[[int], None]) -> tuple[NativeSequence, Any]:
    """A sequence of one item, `work(thread)`, and its counters for two threads."""
    sequence = NativeSequence([NativeOp("op", Called(work), np.zeros(1, np.int64), 1)])
    return sequence, sequence.new_counters(2)


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("pause", [0.0, 0.2])
def test_a_helper_does_one_job_after_the_other(pause: float) -> None:
    team, came = Team(2), list[int]()
    sequence, counters = one_op(came.append)
    for number in range(1, 5):
        counters[:] = 0
        (ticket,) = team.join_in(sequence.job(0, counters.ctypes.data, 2), None)
        until(lambda ticket=ticket: ticket.over)  # type: ignore[misc]
        assert came == [1] * number
        time.sleep(pause)  # long enough for it to go to sleep


def test_a_helper_of_a_call_that_goes_on_is_left_alone() -> None:
    team, came, hold = Team(2), threading.Event(), threading.Event()

    def work(_: int) -> None:
        came.set()
        hold.wait(30)

    sequence, counters = one_op(work)
    job = sequence.job(0, counters.ctypes.data, 2)
    (ticket,) = team.join_in(job, None)
    assert came.wait(30)
    assert not ticket.over
    assert team.join_in(job, None) == []
    hold.set()
    until(lambda: ticket.over)
    assert len(team.join_in(job, None)) == 1


def test_a_helper_keeps_what_its_job_needs_until_it_is_over() -> None:
    class Kept:
        pass

    team, hold, kept = Team(2), threading.Event(), Kept()

    def work(_: int) -> None:
        hold.wait(30)

    sequence, counters = one_op(work)
    alive = weakref.ref(kept)
    (ticket,) = team.join_in(sequence.job(0, counters.ctypes.data, 2), kept)
    del kept
    ticket.forget()
    assert alive() is not None
    hold.set()
    until(lambda: ticket.over)
    ticket.forget()
    assert alive() is None


@pytest.mark.slow
def test_a_process_ends_while_helpers_look_out_for_work() -> None:
    code = """
import torch, autoprune
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
fast = autoprune.repack(model, torch.zeros(1, 3, 9, 9), threads=3)
with torch.inference_mode():
    fast(torch.zeros(1, 3, 9, 9))
"""
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_a_program_survives_a_fork(mixed: tuple[nn.Module, ProgramModel]) -> None:
    fast = with_threads(mixed[1], 2)
    wanted = [fast(image(batch)) for batch in (2, 3)]  # its helpers are the parent's
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons dislike a fork of several threads
        child = os.fork()
    if child == 0:
        signal.alarm(30)
        right = all(identical(fast(image(batch)), y) for batch, y in zip((2, 3), wanted, strict=True))
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert identical(fast(image(2)), wanted[0])


def test_a_deep_copy_is_a_program_of_its_own(mixed: tuple[nn.Module, ProgramModel]) -> None:
    model = nn.Sequential(mixed[1])
    wanted = model(image())
    twin = copy.deepcopy(model)
    assert identical(twin(image()), wanted)
    copied = twin[0]
    assert isinstance(copied, ProgramModel)
    assert copied.program is not mixed[1].program
    assert copied.report == mixed[1].report


def test_a_program_is_no_pickle(mixed: tuple[nn.Module, ProgramModel]) -> None:
    with pytest.raises(AutopruneError, match=r"autoprune\.save"):
        pickle.dumps(mixed[1])


# Shapes and memory ---------------------------------------------------------------------------------------------------


def test_ever_new_shapes_do_not_fill_the_memory(
    mixed: tuple[nn.Module, ProgramModel], fast: ProgramModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = fast.program.plan(((3, 3, 16, 14),))
    monkeypatch.setattr(program_module, "ROOM", 3 * one.size + 1)
    monkeypatch.setattr(program_module, "ARENAS", 2 * one.lowered.arena.size * 4)
    program = copy.deepcopy(fast.program)
    for batch in range(1, 12):
        assert program(image(batch))["y"].shape == (batch, 16, 5)
        assert len(program._plans) <= 4
        assert program._chosen.taken <= program._chosen.room or len(program._chosen) == 1
        idle = [plan for plan, _ in program._plans._held.values() if plan._free]
        assert {*idle} <= {plan for plan, _ in program._chosen._held.values()}
    assert identical(program(image(3)), mixed[1](image(3)))


def test_shapes_that_come_again_are_planned_once(fast: ProgramModel) -> None:
    program = copy.deepcopy(fast.program)
    plans = [program.plan_for((image(batch),)) for batch in range(1, 160)]
    assert plans == [program.plan_for((image(batch),)) for batch in range(1, 160)]


def test_what_was_asked_for_last_is_kept() -> None:
    gone: list[str] = []
    recent = Recent[int, str](10, gone.append)
    recent.add(1, "a", 4)
    recent.add(2, "b", 4)
    assert recent.get(1) == "a"
    recent.add(3, "c", 4)
    assert (recent.get(1), recent.get(2), recent.get(3), gone, recent.taken) == ("a", None, "c", ["b"], 8)
    recent.add(3, "d", 40)
    assert (recent.get(1), recent.get(3), len(recent), recent.taken) == (None, "d", 1, 40)


def test_what_was_returned_stays_as_it_was(mixed: tuple[nn.Module, ProgramModel], fast: ProgramModel) -> None:
    first = fast(image(2, 0))
    kept = copy.deepcopy(first)
    fast(image(2, 1))
    first["rows"].zero_()
    first["views"][1].fill_(float("nan"))
    again = fast(image(2, 0))
    assert identical(again, kept)
    assert identical({**first, "rows": kept["rows"], "views": kept["views"]}, kept)


@pytest.mark.parametrize("place", [(0, 0), (3, 3), (5, 4), (15, 13)])
def test_a_maximum_over_nan_is_nan(place: tuple[int, int]) -> None:
    model, x = nn.MaxPool2d(3, 2, 1).eval(), image()
    fast = program_of(model, x)
    x[0, 1, place[0], place[1]] = float("nan")
    assert torch.equal(fast(x).isnan(), model(x).isnan())


class Turned(nn.Module):
    """What native ops computed, seen through a view: it lies in the memory that the next call writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.pool(x).transpose(2, 3))


def test_a_view_that_was_returned_stays_as_it_was() -> None:
    model = Turned().eval()
    fast = program_of(model, image())
    first = fast(image())
    fast(image(seed=1))
    assert torch.equal(first, model(image()))


def test_an_input_is_never_written_to(fast: ProgramModel) -> None:
    x = image()
    before = x.clone()
    fast(x)
    assert torch.equal(x, before)


def test_any_memory_layout_is_read_right(mixed: tuple[nn.Module, ProgramModel]) -> None:
    model, fast = mixed
    whole = torch.randn(4, 6, 32, 28, generator=torch.Generator().manual_seed(3))
    for x in (
        image().contiguous(memory_format=torch.channels_last),
        image().transpose(2, 3).contiguous().transpose(2, 3),
        whole[1:3, ::2, ::2, 1::2],
        whole[:1, :3, :16, :14].expand(3, -1, -1, -1),
        whole[3:, 3:, 16:, 14:],
    ):
        assert same_output(fast(x), model(x))


def test_a_deep_net_lives_in_the_memory_of_a_few_maps() -> None:
    layers = [each for _ in range(20) for each in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    net, x = pruned(nn.Sequential(nn.Conv2d(3, 8, 1), *layers), 0.3), image(4)
    fast = program_of(net, x)
    assert same_output(fast(x), net(x))
    steps = fast.program.plan((tuple(x.shape),)).lowered.steps
    places = {step.writes.offset for step in steps if isinstance(step, NativeStep) and step.writes.slot == ARENA}
    assert len(steps) > 20
    assert len(places) <= 4  # the input, two in turns, and a last one without a border


def test_places_are_shared_in_turn_and_never_at_once() -> None:
    rng = random.Random(0)
    for _ in range(200):
        buffers = []
        for _ in range(rng.randrange(1, 12)):
            first = rng.randrange(20)
            buffers.append(Buffer(rng.choice([1, 16, 100, 1000]), first=first, last=first + rng.randrange(6)))
        arena = place(buffers, 1)
        for one in buffers:
            assert one.slot == 1
            assert 0 <= one.offset <= arena.size * 4 - one.size * 4
            assert one.offset % 64 == 0
            for other in buffers:
                apart = one.offset >= other.offset + other.size * 4 or other.offset >= one.offset + one.size * 4
                assert one is other or apart or one.first > other.last or other.first > one.last


# Refusals ------------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "dtype": (lambda: (image().double(),), r"float32 on the CPU.*float64"),
    "device": (lambda: (image().to("meta"),), r"float32 on the CPU.*meta"),
    "channels": (
        lambda: (torch.zeros(2, 4, 16, 14),),
        r"\(2, 3, 16, 14\) \(any extent of axis 0, 2, 3\), not \(2, 4, 16",
    ),
    "extent": (
        lambda: (torch.zeros(2, 3, 1, 14),),
        r"shapes \[\(2, 3, 1, 14\)\]: .* the model asks that .*axis 2 of 'x'",
    ),
    "dimensions": (lambda: (image()[0],), r"not \(3, 16, 14\)"),
    "none": (lambda: (), "takes x, not nothing"),
    "two": (lambda: (image(), image()), "takes x, not <0>, <1>"),
    "list": (lambda: ([1.0],), "dense tensors, not list"),
    "array": (lambda: (image().numpy(),), "dense tensors, not ndarray"),
    "sparse": (lambda: (image().to_sparse(),), r"dense tensors, not one of layout torch\.sparse_coo"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("seen", [False, True])
def test_a_wrong_input_is_told_from_what_is_expected(fast: ProgramModel, case: str, seen: bool) -> None:
    build, told = WRONG[case]
    if seen:
        fast(image())  # the shape alone is no reason to accept the input
    with torch.inference_mode(False), torch.no_grad(), pytest.raises(AutopruneError, match=told):
        fast(*build())


def test_a_wrong_keyword_is_told(fast: ProgramModel) -> None:
    assert identical(fast(x=image()), fast(image()))
    for named in ({"y": image()}, {"x": image(), "y": image()}):
        with pytest.raises(AutopruneError, match="takes x, not"):
            fast(**named)
    with pytest.raises(AutopruneError, match="takes x, not <0>, x"):
        fast(image(), x=image())


def test_batches_must_agree() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            y: Tensor = self.fc(a) + b
            return y

    fast = program_of(pruned(Two()), (torch.randn(2, 4), torch.randn(2, 4)))
    assert fast(torch.zeros(5, 4), torch.zeros(5, 4)).shape == (5, 4)
    with pytest.raises(AutopruneError, match=r"batch sizes differ: \[1, 5\]"):
        fast(torch.zeros(5, 4), torch.zeros(1, 4))


def test_training_through_a_program_is_an_error(fast: ProgramModel) -> None:
    with torch.inference_mode(False):
        x = image().requires_grad_()
        for _ in range(2):
            with pytest.raises(AutopruneError, match="inference"):
                fast(x)
            with torch.no_grad():
                fast(x)
        assert not fast(image())["y"].requires_grad


def test_what_torch_cannot_compute_is_an_error() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Parameter(torch.randn(10)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(torch.take(self.table, x))
            return y

    model = pruned(Lookup())
    fast = program_of(model, torch.randint(0, 10, (2, 4)))
    x = torch.randint(0, 10, (3, 4))
    for _ in range(2):
        assert same_output(fast(x), model(x))
        with pytest.raises(AutopruneError, match="does not take these values"):
            fast(x + 10)


def test_what_torch_assumes_elsewhere_does_not_matter(mixed: tuple[nn.Module, ProgramModel], tmp_path: Path) -> None:
    x, wanted = image(), mixed[1](image())
    with torch.device("meta"):
        assert identical(copy.deepcopy(mixed[1])(x), wanted)
    torch.set_default_dtype(torch.float64)
    try:
        model = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3, bias=False), nn.LayerNorm(12, elementwise_affine=False))
        model = pruned(model.extend([nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)])).float()
        made = program_of(model, x, cache=TuningCache(tmp_path / "tuning.json"))
        save(made, tmp_path / "model.safetensors")
        assert same_output(made(x), model(x))
        assert identical(load(tmp_path / "model.safetensors")(x), made(x))
    finally:
        torch.set_default_dtype(torch.float32)


def test_autocast_gives_no_wrong_result() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.spread = nn.ConvTranspose1d(6, 6, 1)  # run by torch

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(self.spread(x))
            return y

    model, x = pruned(Product()), torch.randn(2, 6, 6)
    fast = program_of(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(AutopruneError, match="bfloat16"):
        fast(x)
    assert same_output(fast(x), model(x))


# Tuning --------------------------------------------------------------------------------------------------------------


def net() -> nn.Module:
    return pruned(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 12, 6)))


@functools.cache
def graph() -> Graph:
    with torch.inference_mode(False):
        return capture(net(), (image(),))


def timed(path: Path | None, threads: int = 1, model: nn.Module | None = None) -> float:
    """How often the clock is read while a model is repacked."""
    clock = FakeClock(step_s=1.0)
    cache = TuningCache(path) if path is not None else None
    made = net() if model is None else model
    fast = program_of(made, image(), threads=threads, clock=clock, cache=cache, graph=graph())
    assert same_output(fast(image()), made(image()))
    return clock.now_s


def test_a_second_repack_times_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    first = timed(path)
    assert first >= 2 * 2 * 4  # two layers, two candidates at least, four rounds
    written = path.read_bytes()
    assert timed(path) == 0
    assert path.read_bytes() == written
    assert timed(path, threads=2) > 0
    assert timed(path) == 0
    with torch.no_grad():
        sparser = net()
        weight_of(sparser, "3")[:, 100:] = 0
    assert timed(path, model=sparser) > 0  # the Linear alone
    assert timed(path, model=sparser) == 0


def test_a_file_is_parsed_anew_only_where_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, parsed = tmp_path / "tuning.json", list[str]()
    timed(path)

    def counted(text: str) -> Any:
        parsed.append(text)
        return parse_json(text)

    monkeypatch.setattr(tuning, "parse_json", counted)
    found = TuningCache(path).found
    layers = len(found)
    assert layers > 0
    found.clear()  # a cache's own
    assert len(TuningCache(path).found) == layers
    assert parsed == []
    data = read_json(path, "the cache")
    data["found"].popitem()
    write_json(path, data)
    assert len(TuningCache(path).found) == len(TuningCache(path).found) == layers - 1
    assert parsed == [path.read_text()]


@pytest.mark.parametrize(("unsaved_s", "saved_before"), [(60.0, 0), (-1.0, 1)])
def test_what_was_tuned_before_a_repack_is_stopped_is_kept(
    unsaved_s: float, saved_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "UNSAVED_S", unsaved_s)
    path = tmp_path / "tuning.json"
    cache = TuningCache(path)

    def stop(_: str) -> None:
        if cache.found:
            assert len(TuningCache(path).found) == saved_before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        program_of(net(), image(), clock=FakeClock(step_s=1.0), cache=cache, graph=graph(), progress=stop)
    assert len(TuningCache(path).found) == 1


def test_the_cache_lies_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_of_its_own: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "own"))
    assert timed(None) > 0
    assert timed(None) == 0
    assert (tmp_path / "own" / "tuning.json").exists()
    assert not (tmp_path / "home").exists()
    monkeypatch.delenv("AUTOPRUNE_CACHE")
    assert TuningCache().path == tmp_path / "home" / ".cache" / "autoprune" / "tuning.json"
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(cache_of_its_own))
    assert TuningCache().path.parent == cache_of_its_own


BROKEN = ["", "{", "null", "[]", "7", '"x"', "{}", "[" * 100_000, "\x00\xff", '{"machine": {}, "found": {}}']


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: repr(text[:20]))
def test_a_broken_or_foreign_cache_is_started_anew(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(text, encoding="latin-1")
    assert TuningCache(path).found == {}
    assert timed(path) > 0
    assert timed(path) == 0


def test_another_machines_cache_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    timed(path)
    data = read_json(path, "the cache")
    for key in data["machine"]:
        write_json(path, {**data, "machine": {**data["machine"], key: "another"}})
        assert TuningCache(path).found == {}


WILD: list[Any] = [-1, 3, 2**31, 10**30, 1e9, 4.0, True, None, "8", [], {}]


@pytest.mark.parametrize("field", ["group_size", "block", "chunk", "inputs_first", "panel"])
def test_a_hostile_cache_is_started_anew(tmp_path: Path, field: str) -> None:
    path = tmp_path / "tuning.json"
    timed(path)
    data = read_json(path, "the cache")
    fine: tuple[Any, ...] = {"inputs_first": (True,), "group_size": ()}.get(field, (3,))
    for wild in WILD:
        for row in data["found"].values():
            row[field] = wild
        write_json(path, data)
        known = any(type(wild) is type(each) and wild == each for each in fine)
        assert bool(TuningCache(path).found) == known
        if known or wild is None:
            assert (timed(path) == 0) == known


@pytest.mark.parametrize(
    "change", [lambda row: row.clear(), lambda row: row.update(more=1), lambda row: row.pop("block")]
)
def test_rows_of_another_form_are_not_used(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = tmp_path / "tuning.json"
    timed(path)
    data = read_json(path, "the cache")
    change(next(iter(data["found"].values())))
    write_json(path, data)
    timed(path)


def test_any_valid_tiling_is_right(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    timed(path)
    data = read_json(path, "the cache")
    rng = random.Random(0)
    for _ in range(20):
        for row in data["found"].values():
            row["group_size"] = rng.choice([0, 1, 2, 4, 8, 16])
            row["block"], row["chunk"] = rng.choice([1, 7, 192, 2**31 - 1]), rng.choice([0, 1, 5, 2**31 - 1])
            row["inputs_first"], row["panel"] = rng.random() < 0.5, rng.choice([0, 1, 5, 2**31 - 1])
        write_json(path, data)
        assert timed(path) == 0


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    assert timed(tmp_path / "file" / "tuning.json") > 0
    path = tmp_path / "tuning.json"
    timed(path)
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        assert timed(path, threads=2) > 0
    assert path.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "tuning.json"]


def test_threads_may_repack_at_once(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    models = [pruned(nn.Sequential(nn.Linear(6 + i, 4), nn.ReLU(), nn.Linear(4, 3))) for i in range(4)]
    inputs = [torch.randn(2, 6 + i) for i in range(4)]

    @torch.inference_mode()
    def save(turn: int) -> None:
        for _ in range(10):
            cache = TuningCache(path)
            cache.found |= TuningCache(path).found
            cache.changed = True
            cache.save()

    made = [program_of(model, x, cache=TuningCache(path)) for model, x in zip(models, inputs, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(4)))
    assert TuningCache(path).found
    assert [each.name for each in tmp_path.iterdir()] == ["tuning.json"]
    assert all(same_output(fast(x), model(x)) for fast, model, x in zip(made, models, inputs, strict=True))


class Residual(nn.Module):
    """Sums that are written over what they add, and one that may not be: it is read again."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.three = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x).relu()
        once = (self.one(stem) + stem).relu()
        twice = (self.two(once) + once).relu()
        return cast("Tensor", self.three(twice) + once)


@pytest.mark.parametrize("channels", [12, 16, 32])
@pytest.mark.parametrize("side", [7, 14, 30])
def test_a_sum_lies_where_what_it_adds_lay_only_if_nobody_reads_that_again(channels: int, side: int) -> None:
    torch.manual_seed(0)
    model = pruned(Residual(channels))
    x = torch.randn(2, channels, side, side)
    fast = program_of(model, x, threads=2)
    assert same_output(fast(x), model(x))


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("dead", [0, 3, 16])
def test_a_sum_whose_filters_fill_no_groups_lies_elsewhere(dead: int, size: int) -> None:
    """A row that stands in for a missing filter is computed twice: what it adds must still be there."""
    torch.manual_seed(0)
    model = Residual(32).eval().requires_grad_(False)
    for layer in (model.one, model.two, model.three):
        layer.weight[5 : 5 + dead] = 0.0
        layer.bias.normal_()  # type: ignore[union-attr]  # all that a dead filter adds
    x = torch.randn(2, 32, 14, 6)
    graph = simplify(capture(model, (x,)))
    layers = {
        op.output: [graph.constants[op.tensors[role]] for role in ("weight", "bias")] for op in graph.ops if op.tensors
    }
    weights = {name: Weights.of(pack(weight, size=size), bias) for name, (weight, bias) in layers.items()}
    fast = Program(graph, weights, {}, 1)
    assert same_output(fast(x), model(x))


@pytest.mark.slow
def test_maps_take_the_place_of_maps_of_other_sizes() -> None:
    """And find their own border clear, whatever lay there before."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels, stride in ((8, 1), (8, 2), (24, 1), (24, 2), (40, 1)):
        layers += [nn.Conv2d(layers[-3].out_channels if layers else 4, channels, 3, stride, 1), nn.SiLU(),  # type: ignore[arg-type]
                   nn.AvgPool2d(3, 1, 1)]  # fmt: skip
    model, x = pruned(nn.Sequential(*layers)), torch.randn(1, 4, 41, 37)
    fast = program_of(model, x, threads=1)
    for seed in range(3):
        y = torch.randn(1, 4, 41, 37, generator=torch.Generator().manual_seed(seed))
        assert same_output(fast(y), model(y))
    lowered = fast.program.plan((tuple(x.shape),)).lowered
    steps = [step for step in lowered.steps if isinstance(step, NativeStep)]
    assert lowered.arena.size < sum(step.writes.size for step in steps) / 2


def test_what_is_returned_twice_shares_no_memory() -> None:
    """A result may be written to by the caller without changing another, nor what the next call computes."""
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y, (h, c) = self.rnn(x)
            return y, h, c

    x = torch.randn(1, 2, 4)
    fast = repack(Twice().eval(), x, form="program", threads=1)
    with torch.inference_mode():
        y, h, c = fast(x)
        before = [each.clone() for each in (y, h, c)]
        y.zero_()
        assert torch.equal(h, before[1])
        assert torch.equal(c, before[2])
        for one, other in zip(fast(x), before, strict=True):
            assert torch.equal(one, other)


class Positions(nn.Module):
    """Counts its input's rows, and returns what is the same at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("kept", torch.ones(1, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        steps = torch.arange(x.shape[0])
        return self.fc(x) + steps[:, None], steps, self.get_buffer("kept")[0]


def test_what_depends_on_shapes_alone_is_computed_once() -> None:
    """For each shape; and a caller may write to it, once returned."""
    model, x = pruned(Positions()), torch.randn(3, 4)
    fast = program_of(model, x)
    for rows in (3, 5, 3):
        x = torch.randn(rows, 4)
        lowered = fast.program.plan((tuple(x.shape),)).lowered
        assert not any(isinstance(step, TorchStep) and "arange" in step.op.attributes["op"] for step in lowered.steps)
        got = fast(x)
        assert same_output(got, model(x))
        for result in got:
            result.fill_(7)


class Taken(nn.Module):
    """Takes rows of what it computed by numbers that it computed."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.fc, self.axis = nn.Linear(4, 20), axis

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        y = self.fc(x)
        index = (numbers - 1).unsqueeze(-1).expand(*numbers.shape, y.shape[-1])
        return cast("Tensor", y.gather(self.axis, index) + 1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4), (3, 1, 4), (1, 40, 4)])
def test_rows_are_taken_by_computed_numbers(shape: tuple[int, ...], threads: int) -> None:
    torch.manual_seed(0)
    model, x = pruned(Taken(-2)), torch.randn(shape)
    for taken in (1, 3, 70):
        numbers = torch.randint(1, shape[-2] + 1, (*shape[:-2], taken))
        fast = repack(model, (x, numbers), form="program", threads=threads)
        assert torch_steps(fast, x, numbers) == []
        assert same_output(fast(x, numbers), model(x, numbers))
        assert isinstance(fast, ProgramModel)
        bound = fast.bind(x, numbers)
        for wrong in (0, shape[-2] + 1, 2**40, -(2**62)):
            with pytest.raises(AutopruneError, match="no entry's"):
                fast(x, torch.where(torch.arange(taken) == taken - 1, wrong, numbers))
            bound.inputs[1].fill_(wrong)
            with pytest.raises(AutopruneError, match="no entry's"):
                bound()
            bound.inputs[1].copy_(numbers)
            assert same_output(fast(x, numbers), model(x, numbers))
            assert same_output(bound(), model(x, numbers))


def torch_steps(fast: Any, *inputs: Tensor) -> list[TorchStep]:
    lowered = fast.program.plan(tuple(tuple(x.shape) for x in inputs)).lowered
    return [step for step in lowered.steps if isinstance(step, TorchStep)]


class Gathered(nn.Module):
    """Takes entries that are no whole rows, along any axis."""

    def __init__(self, axis: int, whole: bool) -> None:
        super().__init__()
        self.fc, self.axis, self.whole = nn.Linear(4, 6), axis, whole

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        y = self.fc(x).transpose(1, 2) if self.whole else self.fc(x)
        return cast("Tensor", y.gather(self.axis, numbers))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_what_is_taken_otherwise_is_right_too(axis: int, whole: bool) -> None:
    torch.manual_seed(0)
    x, numbers = torch.randn(2, 3, 4), torch.randint(0, 2, (2, 2, 3))
    for index in (numbers, numbers[..., :1], numbers[:1], numbers[..., :1].expand(2, 2, 3)):
        model = pruned(Gathered(axis, whole))
        fast = repack(model, (x, index), form="program", threads=1)
        assert same_output(fast(x, index), model(x, index))
