"""Threads that repack, export, save, load, call and train at once: is every output right, is every message heard?

    python -m benchmarks threads --seconds 60

Every thread takes one job after another by chance; what a job computes is compared with what was computed before the
threads began. After each job its thread logs a line, warns, and writes a line to stderr. Ends with 1 if anything was
wrong or lost. Writes benchmarks/results/threads.md.
"""

from __future__ import annotations

import copy
import io
import logging
import random
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from autoprune.repack import load, repack, save
from autoprune.repack.outputs import same_output
from autoprune.report.table import markdown_table
from benchmarks.lib.command_line import command_line
from benchmarks.lib.page import page, write_page
from benchmarks.lib.provenance import Provenance

BATCHES = (1, 2, 5)
LOG = logging.getLogger("benchmark.service")


@dataclass(frozen=True)
class Subject:
    """A model and what it computes."""

    name: str
    model: nn.Module
    known: list[tuple[tuple[Any, ...], Any]]

    @classmethod
    def of(cls, name: str, model: nn.Module, inputs: list[tuple[Any, ...]]) -> Subject:
        model.eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[torch.rand(parameter.shape) < 0.7] = 0.0
        return cls(name, model, [(given, model(*given)) for given in inputs])


class Steps(nn.Module):
    """A GRU and a Linear over whole sequences, packed ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 16, batch_first=True)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Any) -> Tensor:
        _, last = self.gru(x)
        y: Tensor = self.out(last[0])
        return y


def subjects() -> list[Subject]:
    torch.manual_seed(0)
    images = [(torch.randn(batch, 3, 12, 12),) for batch in BATCHES]
    sequences = [(torch.randn(batch, 6, 8),) for batch in BATCHES]
    cnn = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10)
    )
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    )
    lengths = torch.tensor([6, 3, 1])
    packed = pack_padded_sequence(torch.randn(3, 6, 8), lengths, batch_first=True)
    return [
        Subject.of("convolutions", cnn, images),
        Subject.of("encoder", encoder, sequences),
        Subject.of("recurrent", Steps(), sequences),
        Subject.of("recurrent, packed", Steps(), [(packed,)]),
    ]


def compare(call: Callable[..., Any], subject: Subject) -> None:
    with torch.inference_mode():
        for given, wanted in subject.known:
            if not same_output(call(*given), wanted):
                raise AssertionError("another output than the model's")


def programs(subject: Subject) -> bool:
    return isinstance(subject.known[0][0][0], Tensor)


@dataclass
class Jobs:
    """What a thread may do; some of it with models that all threads share."""

    folder: Path
    subjects: list[Subject] = field(default_factory=subjects)

    def __post_init__(self) -> None:
        self.served = [
            (self.repacked(each, form), each) for form in ("modules", "program") for each in self.all_of(form)
        ]
        self.trained = self.training()

    def all_of(self, form: str) -> list[Subject]:
        return [each for each in self.subjects if form == "modules" or programs(each)]

    def repacked(self, subject: Subject, form: str) -> Any:
        choose = (lambda name, layer: "jit") if form == "modules" else None
        return repack(subject.model, subject.known[0][0], form=form, choose=choose)  # type: ignore[arg-type]

    def named(self) -> dict[str, Callable[[random.Random], None]]:
        jobs: dict[str, Callable[[random.Random], None]] = {
            "train a model": self.train,
            "call dense models": self.dense,
        }
        jobs |= {"call shared models": self.call, "call a bound program": self.bound}
        for form in ("program", "modules"):
            jobs[f"repack, save, load, call: {form}"] = partial(self.cycle, form)
        return jobs

    def cycle(self, form: str, draws: random.Random) -> None:
        subject = draws.choice(self.all_of(form))
        fast = self.repacked(subject, form)
        compare(fast, subject)
        path = self.folder / f"{threading.get_ident()}.safetensors"
        save(fast, path)
        compare(load(path, None if form == "program" else subject.model), subject)

    def call(self, draws: random.Random) -> None:
        for _ in range(20):
            compare(*draws.choice(self.served))

    def dense(self, draws: random.Random) -> None:
        for _ in range(20):
            subject = draws.choice(self.subjects)
            compare(subject.model, subject)

    def bound(self, draws: random.Random) -> None:
        fast, subject = draws.choice([each for each in self.served if hasattr(each[0], "bind")])
        first = subject.known[0][0]
        step = fast.bind(*(torch.zeros_like(x) for x in first))
        for x, given in zip(step.inputs, first, strict=True):
            x.copy_(given)
        for _ in range(20):
            compare(lambda *_: step(), Subject("", subject.model, subject.known[:1]))

    def train(self, _: random.Random) -> None:
        if not same_output(self.training(), self.trained):
            raise AssertionError("training ended with other weights")

    def training(self) -> list[Tensor]:
        model = copy.deepcopy(self.subjects[0].model).requires_grad_()
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(5):
            optimizer.zero_grad()
            model(self.subjects[0].known[2][0][0]).square().sum().backward()
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]


@dataclass
class Found:
    """What was seen."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    sent: int = 0
    heard: dict[str, int] = field(default_factory=dict)

    @property
    def fine(self) -> bool:
        return not self.wrong and set(self.heard.values()) == {self.sent} and min(self.done.values()) > 0


def run(threads: int, seconds: float, seed: int = 0) -> Found:
    """Lets threads work for some seconds."""
    found, lock = Found(), threading.Lock()
    with tempfile.TemporaryDirectory() as folder, listening() as heard:
        jobs = Jobs(Path(folder)).named()
        found.done.update(dict.fromkeys(jobs, 0))
        end = time.monotonic() + seconds

        def work(number: int) -> None:
            draws, count = random.Random(f"{seed} {number}"), 0
            mine = [*jobs] if number == 0 else []  # so that each is done at least once
            while mine or time.monotonic() < end:
                name = mine.pop() if mine else draws.choice([*jobs])
                try:
                    jobs[name](draws)
                    told = None
                except Exception:  # whatever it is, it is to be shown
                    told = traceback.format_exc()
                with lock:
                    found.done[name] += 1
                    found.wrong += [] if told is None else [(name, told)]
                text = f"thread {number} line {count}"
                LOG.warning(text)
                warnings.warn(text, stacklevel=1)
                print(text, file=sys.stderr)
                count += 1
            with lock:
                found.sent += count

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        found.heard = {name: len(lines()) for name, lines in heard.items()}
    return found


@contextmanager
def listening() -> Iterator[dict[str, Callable[[], set[str]]]]:
    """The lines of the threads that were heard so far, by the way they went."""
    logged, warned, written = io.StringIO(), io.StringIO(), io.StringIO()

    def lines(stream: io.StringIO) -> set[str]:
        return {line for line in stream.getvalue().splitlines() if line.startswith("thread ")}

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        warned.write(f"{message}\n")

    handler = logging.StreamHandler(logged)
    with ExitStack() as after:
        after.enter_context(warnings.catch_warnings())
        after.enter_context(redirect_stderr(written))
        warnings.simplefilter("always")
        warnings.showwarning = show
        LOG.addHandler(handler)
        after.callback(LOG.removeHandler, handler)
        yield {"logged": partial(lines, logged), "warned": partial(lines, warned), "stderr": partial(lines, written)}


def report(found: Found, threads: int, seconds: float) -> str:
    wrong = Counter(name for name, _ in found.wrong)
    rows = [[name, f"{count:,}", f"{wrong[name]:,}"] for name, count in found.done.items()]
    messages = [[name, f"{found.sent:,}", f"{found.sent - count:,}"] for name, count in found.heard.items()]
    return page(
        "Threads",
        f"threads --seconds {seconds:g}",
        f"{threads} threads, jobs by chance.",
        markdown_table(("job", "done", "wrong"), rows),
        markdown_table(("lines of the threads", "sent", "lost"), messages),
        str(Provenance.here()),
    )


def main(argv: Sequence[str]) -> int:
    parser = command_line("threads", __doc__)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = run(given.threads, given.seconds)
    for name, told in found.wrong[:3]:
        print(f"\n{name}:\n{told}", file=sys.stderr)
    write_page(given.output, "threads", report(found, given.threads, given.seconds))
    return int(not found.fine)
