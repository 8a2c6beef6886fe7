"""Commands that are killed again and again, and what is left: ``python -m benchmarks kills [--kills 100]``.

`run` of a small config, `train` of a small generalist and `compare` are each done once undisturbed. Then the same
commands are killed (SIGKILL of the main process) at random moments and given again, until they end; in new directories
as long as kills are left. All that is random comes from a seed. Latency tables are of the clock: those of the
undisturbed commands are given to the killed ones before they search, after which all is deterministic; before, it is
seen that a table goes on where it was. Stopped, the benchmark goes on where it was; ``--fresh`` starts it anew. About
25 minutes on two free cores. Writes benchmarks/results/kills.md.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprune.files import cache_folder, read_lines, write_text
from autoprune.report.table import markdown_table
from benchmarks.lib.command_line import among, command_line
from benchmarks.lib.page import page, write_page
from benchmarks.lib.provenance import Provenance
from benchmarks.lib.sweep import Row, Rows

KEPT = cache_folder() / "benchmarks" / "kills"
MARK = "AUTOPRUNE_KILLS"  # in the environment of all that is started
GRACE_S = 5.0
EARLY = 0.15  # of the kills come while the process starts; the others after it has written something
MEAN_S = 2.0  # from the first thing written to the kill
TASKS = 8 + 3  # of the family: drawn, and held out

RUN = """
seed = 0
task = {name = "digits", widths = [8, 16]}
dense = {epochs = 6, learning_rate = 0.1}
target = {accuracy_drop = 0.3}
latency = {samples = 10, profile_samples = 15, engines = ["eager"]}
env = {actions = ["sparsity", "group_size"], min_saving = 0.0, timing = "table", recovery = {name = "train", steps = 9}}
search = {agent = {name = "ppo", net = [8], episodes_per_update = 4}, episodes = 48}
finetune = {settings = {epochs = 6, learning_rate = 0.05, distillation_weight = 0.5}}
"""
COMPARE = """
seed = 0
task = {name = "digits", widths = [8, 16]}
dense = {epochs = 6, learning_rate = 0.1}
target = {speedup = 1.3}
latency = {samples = 5, profile_samples = 5, engines = ["eager"]}
env = {actions = ["mix", {name = "coefficient", reach = 1.0}], timing = "table", min_saving = 0.0}
"""  # the actions and the timing that compare sets itself, so that profile may come before it

FAMILY = """
seed = 0
family = {tasks = 8, data = ["digits"], plans = 20}
agent = {name = "ppo", net = [16], episodes_per_update = 4}
learning = {updates = 60, envs = 4, judge_every = 5, measured_share = 0.1}
latency = {profile_samples = 3, search_samples = 3}
"""
SHARES = {"run": 0.5, "train": 0.35, "compare": 0.15}  # of the kills
STAGES = {"run": 6, "train": 3, "compare": 5}  # see `Job.stage`; the start is one, too
CONFIGS = {"run": RUN, "train": FAMILY, "compare": COMPARE}


@dataclass(frozen=True)
class Kill(Row):
    """One kill.

    Attributes:
        command: which.
        attempt: the directory's number.
        stage: what the command was at, by what it had written.
        after_s: since its start.
        alive_s: how long after the kill the last process of the command lived; None: beyond `GRACE_S`.
    """

    command: str
    attempt: int
    stage: str
    after_s: float
    alive_s: float | None

    @property
    def key(self) -> Kill:
        return self


class Job:
    """A command in a folder of its own: the run directory, the cache, the config."""

    def __init__(self, command: str, folder: Path) -> None:
        self.command, self.folder = command, folder
        self.directory, self.cache = folder / "run", folder / "cache"

    def start(self, verb: str | None = None) -> subprocess.Popen[bytes]:
        config = self.folder / f"{self.command}.toml"
        if not config.exists():
            write_text(config, CONFIGS[self.command])
        more = {"run": ["--workers", "2"], "train": ["--workers", "2"], "compare": []}[self.command]
        if self.command == "compare":
            more = [
                "--agents",
                "uniform,knapsack,random,cma_es",
                "--evaluations",
                "1,20",
                "--seeds",
                "2",
                "--no-finetune",
            ]
        more = [] if verb == "profile" else more
        threads = {"OMP_NUM_THREADS": "1", "AUTOPRUNE_CACHE": str(self.cache), MARK: str(self.folder)}
        command = [sys.executable, "-m", "autoprune", verb or self.command, str(config)]
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                [*command, "--run-dir", str(self.directory), *more],
                stdout=log, stderr=log, env={**os.environ, **threads}, start_new_session=True,
            )  # fmt: skip

    def written(self) -> dict[str, tuple[int, int]]:
        """Size and time of all that is there, but for locks."""
        found = {}
        for root in (self.directory, self.cache):
            for path in root.rglob("*"):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                if not path.name.endswith(".lock") and path.is_file():
                    found[str(path)] = status.st_size, status.st_mtime_ns
        return found

    def stage(self) -> str:
        """What comes next, by what is there."""
        there = {path.name for path in self.directory.glob("*")}
        if self.command == "train":
            made = len(list(self.cache.glob("family/*/prepared.json")))
            return "learning" if "agent.json" in there or made == TASKS else "tasks"
        if not list(self.cache.glob("dense-*.safetensors")):
            return "dense training"
        if "latency.json" not in there:
            return "latency table"
        if self.command == "compare":
            return "outcomes" if "outcomes.jsonl" in there else "searches"
        if "plan.json" not in there:
            return "search"
        return "fine-tuning" if "masked.safetensors" not in there else "repacking, measuring, report"

    def processes(self) -> set[int]:
        """All that run for this job, whoever started them."""
        mark, found = f"{MARK}={self.folder}".encode(), set()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and mark in (path / "environ").read_bytes().split(b"\0"):
                    found.add(int(path.name))
            except OSError:
                continue
        return found

    def cells(self) -> list[Any]:
        path = self.directory / "latency.cells.jsonl"
        return read_lines(path, "the cells") if path.exists() else []


def killed(
    job: Job, process: subprocess.Popen[bytes], draws: random.Random, attempt: int, full: Collection[str]
) -> Kill | None:
    """Kills the command at a random moment of a stage that is not `full` of kills; None where it ended before."""
    start = time.monotonic()
    early, wait = draws.random() < EARLY and "start" not in full, draws.expovariate(1 / MEAN_S)
    if not early:
        before = job.written()
        while process.poll() is None and (job.stage() in full or job.written() == before):
            time.sleep(0.1)
    end = time.monotonic() + wait
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    if process.poll() is not None:
        if process.returncode:
            raise SystemExit(f"it failed: see {job.folder / 'log.txt'}")
        return None
    stage = "start" if early else job.stage()
    process.kill()
    process.wait()
    after_s = time.monotonic() - start
    return Kill(job.command, attempt, stage, after_s, alive_after(job))


def alive_after(job: Job) -> float | None:
    """How long the last process of a command lives on that was killed just now, seconds; None: beyond `GRACE_S`."""
    died = time.monotonic()
    while job.processes():
        if time.monotonic() > died + GRACE_S:
            return None
        time.sleep(0.05)
    return time.monotonic() - died


def finish(process: subprocess.Popen[bytes], job: Job) -> None:
    if process.wait():
        raise SystemExit(f"it failed: see {job.folder / 'log.txt'}")


def undisturbed(command: str) -> Job:
    """The command, done once; from the folder when it is done."""
    job = Job(command, KEPT / f"{command}-undisturbed")
    if not (job.folder / "done").exists():
        job.folder.mkdir(parents=True, exist_ok=True)
        print(f"{command}, undisturbed", flush=True)
        finish(job.start(), job)
        (job.folder / "done").touch()
    return job


def give_tables(job: Job, model: Job) -> None:
    """The undisturbed command's latency tables, in place of those measured here or yet to be measured."""
    if job.command == "train":
        for path in model.cache.glob("family/*/latency.json"):
            target = job.cache / "family" / path.parent.name / "latency.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    else:
        shutil.copy(model.directory / "latency.json", job.directory / "latency.json")


def attempt(command: str, number: int, kills: int, seed: int, log: Rows[Kill], model: Job) -> int:
    """Kills one command until it ends, or so often; returns how often. Then it is left to end, and looked at."""
    job = Job(command, KEPT / f"{command}-{number}")
    of = [each for each, _ in log.read() if each.command == command]
    count = sum(each.attempt == number for each in of)
    before: list[Any] = job.cells()
    job.folder.mkdir(parents=True, exist_ok=True)
    profiling = command != "train" and not (job.folder / "table given").exists()
    if command == "train":
        give_tables(job, model)
    while True:
        draws = random.Random(f"{seed} {command} {number} {count}")
        process = job.start("profile" if profiling else None)
        kill = None
        if count < kills:
            here = Counter(each.stage for each in of if each.attempt == number)
            share = math.ceil(kills / STAGES[command])
            kill = killed(job, process, draws, number, {stage for stage in here if here[stage] >= share})
        else:
            finish(process, job)
        if kill is None and profiling:
            give_tables(job, model)
            (job.folder / "table given").touch()
            profiling, before = False, []
            continue
        if kill is None:
            break
        if profiling and not (job.directory / "latency.json").exists():  # which takes the cells' place
            now = job.cells()
            keys = [line["key"] for line in now[1:]]
            if now[: len(before)] != before or len(keys) != len(set(keys)):
                raise SystemExit(f"the latency table lost measurements: {job.folder}")
            before = now
        log.add(kill)
        of.append(kill)
        count += 1
        print(
            f"{command} {number}: kill {count}, {kill.stage}, {kill.after_s:.1f} s; alive for {kill.alive_s}",
            flush=True,
        )
    return count


# What is looked at when all has ended ---------------------------------------------------------------------------------


def findings(job: Job, model: Job) -> dict[str, int]:
    """What is wrong, counted."""
    lines = {path.relative_to(job.folder): _data(path) for path in job.folder.rglob("*.jsonl")}
    keys = [[line["key"] for line in of if "key" in line] for of in lines.values()]
    return {
        "lost or doubled": sum(len(of) - len(set(of)) for of in keys)
        + sum(_unlike(path, job, model) for path in _deterministic(job.command, model)),
        "files half written": sum(1 for _ in job.folder.rglob("*.part")),
        "processes left": len(job.processes()),
    }


def _deterministic(command: str, model: Job) -> Iterator[Path]:
    """What must be as it is undisturbed, byte by byte but for the time of day."""
    if command == "run":
        names = ("plan.json", "masked.safetensors", "sensitivity.json", "search/trials.jsonl")
        yield from (model.directory / name for name in names)
    elif command == "train":
        yield from (model.directory / name for name in ("judgements.jsonl", "policy/policy.safetensors"))
        yield from model.cache.glob("family/*/prepared.json")
        yield from model.cache.glob("family/*/search/evaluations.jsonl")
    else:
        yield model.directory / "outcomes.jsonl"
        yield model.directory / "search" / "evaluations.jsonl"
    yield from model.cache.glob("dense-*.safetensors")


def _unlike(path: Path, job: Job, model: Job) -> bool:
    other = job.folder / path.relative_to(model.folder)
    if not other.exists():
        return True
    if path.suffix != ".jsonl":
        return path.read_bytes() != other.read_bytes()
    same, sorted_ = _data(path), _data(other)
    if path.name == "trials.jsonl" or path.name == "judgements.jsonl":
        return same != sorted_
    by: Callable[[Mapping[str, Any]], str] = lambda line: json.dumps(line, sort_keys=True)  # noqa: E731
    return sorted(same, key=by) != sorted(sorted_, key=by)


def _data(path: Path) -> list[dict[str, Any]]:
    """The lines without what the clock says, nor how they are chained."""
    clocked = (
        {"checksum", "seconds", "speedup", "measured_reward", "score", "plan"}
        if path.name == "outcomes.jsonl"
        else {"checksum"}
    )
    return [
        {key: line[key] for key in line if key not in clocked}
        for line in map(json.loads, path.read_text().splitlines())
    ]


def report(kills: Sequence[Kill], found: Mapping[str, Mapping[str, int]], seed: int) -> str:
    rows = []
    for command, stage in dict.fromkeys((each.command, each.stage) for each in kills):
        of = [each for each in kills if (each.command, each.stage) == (command, stage)]
        lived = [each.alive_s for each in of]
        longest = "beyond 5" if None in lived else f"{max(each for each in lived if each is not None):.2f}"
        rows.append([command, stage, str(len(of)), longest, str(lived.count(None))])
    columns = list(dict.fromkeys(name for each in found.values() for name in each))
    looked_at = [[name, *(str(each[column]) for column in columns)] for name, each in found.items()]
    return page(
        "Killed commands",
        f"kills --kills {len(kills)} --seed {seed}",
        "SIGKILL of the main process at a random moment; then the same command again. The seconds are those until no "
        "process of the command was left.",
        str(Provenance.here()),
        markdown_table(("command", "stage", "kills", "longest, s", "alive after 5 s"), rows, left=2),
        "When each had ended, against the same command undisturbed (plans, trials, weights, evaluations, outcomes, "
        "judgements, policies): what was lost or doubled, and what was left. No latency table lost a measurement, or "
        "made one twice.",
        markdown_table(("directory", *columns), looked_at),
    )


def main(argv: Sequence[str]) -> int:
    parser = command_line("kills", __doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", type=among(SHARES), default=tuple(SHARES), help=f"of {','.join(SHARES)}")
    parser.add_argument("--fresh", action="store_true", help="forget what was done before")
    given = parser.parse_args(argv)
    if given.fresh:
        shutil.rmtree(KEPT, ignore_errors=True)
    start, log = time.monotonic(), Rows(KEPT / "kills.jsonl", Kill)
    found: dict[str, dict[str, int]] = {}
    whole = sum(SHARES[command] for command in given.commands)
    for command in given.commands:
        model, left, number = undisturbed(command), round(given.kills * SHARES[command] / whole), 0
        while left > 0:
            left -= attempt(command, number, left, given.seed, log, model)
            job = Job(command, KEPT / f"{command}-{number}")
            found[job.folder.name] = findings(job, model)
            number += 1
    write_page(given.output, "kills", report([kill for kill, _ in log.read()], found, given.seed))
    print(f"{time.monotonic() - start:.0f} s")
    return 0
