"""A search whose device is an emulator: killed in the middle, gone on with, and done with a report of that device.

    python -m tests.emulated.device
    python -m tests.emulated.device --target host --run '{file}' --folder /tmp/here

No test of the suite: it takes minutes. What it finds to be wrong is an AssertionError. Needs the emulator, and a C
compiler for the target.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from autoprune.files import read_lines

OPTIONS = (
    "task.widths=[8,8]", "dense={epochs=6}", "search.episodes=3", "search.rules=false", "search.contenders=1",
    "search.finalists=2", "finetune.settings.epochs=1", "latency.samples=5", "latency.search_samples=3",
    "latency.profile_samples=3", "env.recovery=batch_norm", "target.accuracy_drop=0.5",
)  # fmt: skip


def main() -> None:
    """Runs it, and prints the report's headline and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="aarch64")
    parser.add_argument("--run", default="qemu-aarch64-static {file}")
    parser.add_argument("--folder", type=Path, help="where the run is kept; a temporary one if not given")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        search(given.target, given.run, given.folder or Path(folder) / "run")


def search(target: str, run: str, folder: Path) -> None:
    """The search, killed after its first trial and again in its final table's measurement."""
    options = [part for each in (f"device.target={target}", f"device.run={run}", *OPTIONS) for part in ("--set", each)]
    command = [sys.executable, "-m", "autoprune", "run", "digits", "--run-dir", str(folder), "--workers", "1", *options]
    trials, rounds = folder / "search" / "evaluations.jsonl", folder / "results.rounds.jsonl"
    _killed_once(command, trials)
    before = read_lines(trials, "the trials")
    _killed_once(command, folder / "repacked.safetensors")
    began_s = time.monotonic()
    done = subprocess.run([*command, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    assert read_lines(trials, "the trials")[: len(before)] == before, "a trial was measured again"
    assert not rounds.exists()
    said, report = json.loads(done.stdout), (folder / "report.md").read_text()
    machine = json.loads((folder / "results.json").read_text())["machine"]
    assert said["device"] == f"{target}, by {run!r}"
    assert run in report, "the report does not name the device"
    assert machine["target"] == target
    took_ms = said["latency_ms"]
    assert took_ms > 0
    print(report)
    print(
        f"{machine['machine']} by {run}: {took_ms:.3f} ms, {said['speedup_over_best']:.2f}x the dense model repacked."
    )
    print(f"Gone on with after two kills; the last part took {time.monotonic() - began_s:.0f} s.")


def _killed_once(command: list[str], there: Path) -> None:
    """Starts a run, and kills it, and what it started, as soon as a file is there."""
    process = subprocess.Popen(command, start_new_session=True)
    while not there.exists():
        assert process.poll() is None, f"the run ended before {there.name} was there"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    main()
