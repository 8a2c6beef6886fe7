"""Damaged and hostile files of every kind that autoprune reads: an error in words, or what was written; nothing else.

    python -m benchmarks fuzz --mutants 2000 --packed 20000

Each mutant of a real sample is read, and then used, by the product's own code, in a process that may take 5 s of the
processor and 1 GiB more than it has. A third is damage to bytes; the others say something else in well-formed JSON or
tensors, half of them under a right checksum, as somebody who means harm would write them. Right is:

- an AutopruneError;
- what the sample gives, where the mutant means the same (a blank in place of another);
- something else, only where the checksum is right or the file is one that people edit;
- the first lines of a log: that is what a killed process leaves, and no checksum can tell.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import random
import resource
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from autoprune.errors import AutopruneError
from autoprune.latency.machine import machine_identity
from autoprune.report.table import markdown_table
from autoprune.version import __version__
from benchmarks.fuzz_kinds import KINDS, Kind
from benchmarks.fuzz_mutants import damaged
from benchmarks.lib.command_line import command_line
from benchmarks.lib.page import page, write_page
from benchmarks.lib.provenance import commit

CPU_S, WALL_S = 5.0, 120.0  # of one mutant: what it may take, and after which its process is ended
MEMORY = 2**30  # bytes of address space
NAMES = [kind.name for kind in KINDS]
BAD = ("accepted", "wrong error", "too much memory", "too long", "crash")
OUTCOMES = ("refused", "the same", "another", "first lines", *BAD)


def sample(kind: Kind, folder: Path) -> bytes:
    """Makes a kind's sample and returns the bytes of the file that is mutated."""
    torch.manual_seed(0)
    kind.make(folder)
    return (folder / kind.file).read_bytes()


def outcome(kind: Kind, folder: Path, sound: bytes, expected: Any, seed: int) -> tuple[str, str]:
    """What becomes of one mutant, and what is to be said of it."""
    rng, path = random.Random(f"{kind.name} {seed}"), folder / kind.file
    action, right = seed % 3, False
    if action == 0:
        mutant = damaged(sound, rng)
        path.write_bytes(mutant)
    else:
        path.write_bytes(sound)
        right = action == 2
        kind.change(path, rng, right)
        mutant = path.read_bytes()
    start = time.process_time()
    try:
        found = kind.read(folder)
    except AutopruneError:
        found = None
    except MemoryError:
        return "too much memory", "MemoryError"
    except Exception as error:  # that is what is looked for
        return "wrong error", f"{type(error).__name__}: {error}"[:200]
    if (took := time.process_time() - start) > CPU_S:
        return "too long", f"{took:.1f} s"
    if found is None or mutant == sound:
        return "refused" if found is None else "the same", ""
    if repr(found) == repr(expected):
        return "the same", ""
    if path.suffix == ".jsonl" and repr(found) == repr(expected[: len(found)]):
        return "first lines", ""
    return "another" if right or kind.by_hand else "accepted", ""


def ready(pipes: Sequence[Connection]) -> list[Connection]:
    """Those with something to read, after a second at most."""
    return [each for each in wait(pipes, timeout=1.0) if isinstance(each, Connection)]


def work(kinds: list[Kind], scratch: str, pipe: Connection) -> None:
    """A process that takes (kind, first seed, last seed) and tells of each seed before and after."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known: dict[str, tuple[Path, bytes, Any]] = {}
    while (job := pipe.recv()) is not None:
        number, first, last = job
        kind = kinds[number]
        if kind.name not in known:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            folder = Path(tempfile.mkdtemp(dir=scratch))
            sound = sample(kind, folder)
            known[kind.name] = folder, sound, kind.read(folder)
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.RLIM_INFINITY))
        for seed in range(first, last):
            pipe.send((number, seed, None))
            pipe.send((number, seed, outcome(kind, *known[kind.name], seed)))
        pipe.send(None)


class Pool:
    """Processes that are started anew where a mutant ends or holds up one."""

    def __init__(self, kinds: list[Kind], scratch: str, processes: int) -> None:
        self._kinds, self._scratch = kinds, scratch
        self._context = multiprocessing.get_context("fork")
        self._processes: dict[Connection, Any] = {}
        for _ in range(processes):
            self._start()

    def _start(self) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=work, args=(self._kinds, self._scratch, theirs), daemon=True)
        process.start()
        theirs.close()
        self._processes[ours] = process
        return ours

    def run(self, jobs: list[tuple[int, int, int]], tell: Any) -> None:
        """Does all jobs; `tell` gets (kind, seed, outcome, words) of each mutant."""
        waiting, busy = list(reversed(jobs)), {}
        begun: dict[Connection, tuple[int, int, int, float]] = {}

        def give(pipe: Connection) -> None:
            if waiting:
                busy[pipe] = job = waiting.pop()
                begun[pipe] = (job[0], job[1], job[2], time.monotonic())
                pipe.send(job)

        for pipe in list(self._processes):
            give(pipe)
        while busy:
            for pipe in ready(list(busy)):
                try:
                    said = pipe.recv()
                except EOFError:
                    self._lost(pipe, "crash", busy, begun, waiting, tell, give)
                    continue
                if said is None:
                    del busy[pipe]
                    give(pipe)
                elif said[2] is None:
                    begun[pipe] = (said[0], said[1], busy[pipe][2], time.monotonic())
                else:
                    tell(said[0], said[1], *said[2])
            for pipe in [pipe for pipe in busy if time.monotonic() - begun[pipe][3] > WALL_S]:
                self._processes[pipe].kill()
                self._lost(pipe, "too long", busy, begun, waiting, tell, give)

    def _lost(self, pipe: Connection, what: str, busy: Any, begun: Any, waiting: Any, tell: Any, give: Any) -> None:
        number, seed, last, _ = begun.pop(pipe)
        process = self._processes.pop(pipe)
        process.join()
        del busy[pipe]
        tell(number, seed, what, f"exit code {process.exitcode}")
        if seed + 1 < last:
            waiting.append((number, seed + 1, last))
        give(self._start())

    def close(self) -> None:
        for pipe, process in self._processes.items():
            pipe.send(None)
            process.join()


def fuzz(kinds: list[Kind], mutants: list[int], processes: int, first: int = 0) -> dict[str, Counter[str]]:
    """Counts outcomes of so many mutants of each kind; what is wrong is printed with its seed."""
    counts = {kind.name: Counter[str]() for kind in kinds}

    def tell(number: int, seed: int, what: str, words: str) -> None:
        name = kinds[number].name
        counts[name][what] += 1
        if counts[name].total() == mutants[number]:
            print(f"{name}: {mutants[number]} mutants", flush=True)
        if what in BAD:
            print(f"{kinds[number].name}, seed {seed}: {what} {words}", flush=True)

    step = 100
    jobs = [
        (number, at, min(at + step, first + count))
        for number, count in enumerate(mutants)
        for at in range(first, first + count, step)
    ]
    scratch = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    try:
        pool = Pool(kinds, scratch, processes)
        pool.run(jobs, tell)
        pool.close()
    finally:
        shutil.rmtree(scratch)
    return counts


def table(counts: dict[str, Counter[str]]) -> str:
    rows = [[name, str(count.total()), *(str(count[each]) for each in OUTCOMES)] for name, count in counts.items()]
    total: Counter[str] = sum(counts.values(), Counter())
    rows.append(["all", str(total.total()), *(str(total[each]) for each in OUTCOMES)])
    return markdown_table(("file", "mutants", *OUTCOMES), rows)


def main(argv: Sequence[str]) -> int:
    parser = command_line("fuzz", __doc__)
    parser.add_argument("--mutants", type=int, default=2000, help="of each kind that is no packed file")
    parser.add_argument("--packed", type=int, default=20_000, help="of all kinds of packed files together")
    parser.add_argument("--kinds", nargs="*", choices=NAMES, default=NAMES, metavar="KIND", help="as in the table")
    parser.add_argument("--first", type=int, default=0, help="seed of the first mutant")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/fuzz.md")
    given = parser.parse_args(argv)
    kinds = [kind for kind in KINDS if kind.name in given.kinds]
    packs = sum(kind.name.startswith("packed") for kind in KINDS)
    mutants = [given.packed // packs if kind.name.startswith("packed") else given.mutants for kind in kinds]
    start = time.monotonic()
    counts = fuzz(kinds, mutants, given.processes, given.first)
    bad = sum(count[each] for count in counts.values() for each in BAD)
    told = f"{bad} failures; {time.monotonic() - start:.0f} s in {given.processes} processes."
    if given.write:
        versions = f"autoprune {__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        versions += f"safetensors {safetensors.__version__}, numpy {np.__version__}, commit {commit() or 'unknown'}"
        about = f"With {versions}; {machine_identity()['cpu']}, seeds from {given.first}."
        write_page(given.output, "fuzz", page("Mutants of files", "fuzz --write", about, table(counts), told))
    else:
        print(table(counts), told, sep="\n")
    return int(bad > 0)
