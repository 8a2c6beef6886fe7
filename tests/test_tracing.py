"""Threads beside one in which torch traces a model: right outputs, all messages, and flags as they were."""

from __future__ import annotations

import importlib
import io
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.fx._symbolic_trace as symbolic
from torch import Tensor, nn

from autoprune.repack import export_onnx, repack
from autoprune.repack.graph import torch_export
from autoprune.tracing import ByThread, quiet, tracing, unloadable
from benchmarks import threads

LOG = logging.getLogger("torch.onnx.test")


def elsewhere(work: Callable[[], object]) -> list[object]:
    """What `work` returns in another thread, or what it raises."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found


class Asking(nn.Module):
    """While it is traced, has something done in another thread."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self._work = [work]

    def forward(self, x: Tensor) -> Tensor:
        self.found = elsewhere(self._work[0])
        y: Tensor = self.linear(x)
        return y


def during_export(work: Callable[[], object]) -> object:
    model = Asking(work).eval()
    torch_export.export(model, (torch.randn(3, 4),), [(0,)], {})
    (found,) = model.found
    return found


@contextmanager
def heard(name: str) -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger(name).addHandler(handler)
    yield stream
    logging.getLogger(name).removeHandler(handler)


def test_another_thread_does_not_take_itself_for_traced() -> None:
    def flags() -> object:
        own = nn.Module()
        own.inner = nn.Linear(2, 2)
        return [
            bool(torch.compiler.is_compiling()),
            bool(torch.compiler.is_exporting()),
            bool(torch.fx._symbolic_trace.is_fx_tracing()),
            torch.backends.mha.get_fastpath_enabled() and True,
            type(own.inner) is nn.Linear,
        ]  # fmt: skip

    assert during_export(flags) == [False, False, False, True, True]
    assert torch.backends.mha.get_fastpath_enabled() is True
    assert torch.compiler._is_compiling_flag is False


@pytest.mark.slow
def test_no_flag_of_a_tracing_is_seen_elsewhere_at_any_moment(tmp_path: Path) -> None:
    seen: set[tuple[bool, ...]] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            flags = symbolic._is_fx_tracing_flag, torch.compiler.is_compiling(), torch.compiler.is_exporting()
            seen.add(tuple(map(bool, flags)))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that every moment is seen
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(3, 4)
        repack(model, x)
        export_onnx(model, x, tmp_path / "model.onnx")
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)
    assert seen == {(False, False, False)}


def test_the_thread_that_traces_takes_itself_for_exporting() -> None:
    class Flags(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            fine = torch.compiler.is_exporting() and torch.compiler.is_compiling()
            return x + 1 if fine and not torch.backends.mha.get_fastpath_enabled() else x

    (op,) = torch_export.export(Flags(), (torch.randn(3, 4),), [()], {}).graph.find_nodes(
        op="call_function", target=torch.ops.aten.add.Tensor
    )
    assert op.args[1] == 1


@pytest.mark.parametrize("form", ["program", "modules"])
def test_a_served_model_is_right_while_another_is_traced(form: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)).eval()
    x, more = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 5, 5)
    fast = repack(model, x, form=form, choose=(lambda *_: "jit") if form == "modules" else None)  # type: ignore[arg-type]
    with torch.inference_mode():
        wanted = model(more)
        traced = during_export(lambda: fast(more))
    assert isinstance(traced, Tensor)
    assert torch.allclose(traced, wanted, atol=1e-5)


def test_what_other_threads_say_is_heard() -> None:
    def say() -> None:
        LOG.error("logged elsewhere")
        logging.getLogger("service").error("of a service")
        print("written elsewhere", file=sys.stderr)
        warnings.warn("warned elsewhere", stacklevel=1)

    with heard("torch.onnx") as logged, heard("service") as service, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", io.StringIO())
        result = during_export(say)
        assert isinstance(sys.stderr, io.StringIO)
        assert sys.stderr.getvalue() == "written elsewhere\n"
    assert isinstance(result, UserWarning)  # warnings are errors in tests
    assert str(result) == "warned elsewhere"
    assert (logged.getvalue(), service.getvalue()) == ("logged elsewhere\n", "of a service\n")


def test_what_torch_says_of_a_tracing_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    class ByData(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            LOG.error("logged")
            logging.getLogger("torch.onnx.made_later").error("logged")
            warnings.warn("warned", stacklevel=1)
            return x if x.sum() > 0 else -x

    with heard("torch.onnx") as logged:
        with pytest.raises(torch_export.CaptureError, match="data-dependent"):
            torch_export.export(ByData(), (torch.randn(2, 4),), [()], {})
        assert logged.getvalue() == ""
        assert capfd.readouterr().err == ""
        LOG.error("afterwards")
    assert logged.getvalue() == "afterwards\n"
    with pytest.warns(UserWarning, match="afterwards"):
        warnings.warn("afterwards", stacklevel=1)


def test_quiet_within_quiet_ends_with_the_outer_one() -> None:
    before = list(warnings.filters)
    with quiet():
        with quiet():
            warnings.warn("inner", stacklevel=1)
        warnings.warn("outer", stacklevel=1)
    assert list(warnings.filters) == before


def test_without_torchs_compiler_a_model_is_repacked_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise FileNotFoundError("No usable temporary directory")

    unloadable.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", fail)
        assert unloadable() == "torch's compiler does not load: No usable temporary directory"
    try:
        model, x = nn.Linear(40, 20).eval(), torch.randn(2, 40)
        fast = repack(model, x)
        assert "No usable temporary directory" in fast.report[0].why
        with torch.inference_mode():
            assert torch.allclose(fast(x), model(x), atol=1e-5)
    finally:
        unloadable.cache_clear()


def test_one_thread_traces_at_a_time() -> None:
    inside = threading.Event()

    def trace() -> None:
        with tracing():
            inside.set()

    thread = threading.Thread(target=trace)
    with tracing(), tracing():
        thread.start()
        assert not inside.wait(0.05)
    thread.join()
    assert inside.is_set()


def test_a_flag_that_ended_is_what_it_was() -> None:
    flag = ByThread(True, lambda: False)
    assert flag
    assert elsewhere(lambda: bool(flag)) == [False]
    flag.end()
    assert not flag


@pytest.mark.slow
def test_mixed_work_in_threads() -> None:
    found = threads.run(threads=4, seconds=0.5, seed=3)
    assert [told for _, told in found.wrong] == []
    assert set(found.heard.values()) == {found.sent}
    assert min(found.done.values()) > 0


def test_the_structured_trace_that_nobody_asks_for_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it has a handler, torch describes every operator and guard to it."""
    from torch._logging._internal import LazyTraceHandler, trace_log

    monkeypatch.delenv("TORCH_TRACE", raising=False)
    handler = LazyTraceHandler(None)
    monkeypatch.setattr(trace_log, "handlers", [handler])
    repack(nn.Linear(4, 4).eval(), torch.zeros(2, 4), form="program")
    assert handler not in trace_log.handlers


def test_a_flag_by_thread_computes_like_a_bool() -> None:
    flag = ByThread(True, lambda: False)
    assert (flag | False) is True
    assert (False | flag) is True
    assert (flag & False) is False
    assert (True & flag) is True
