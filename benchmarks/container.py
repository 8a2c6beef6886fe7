"""As in a locked container: an unknown user without a home, read-only places, no memory that becomes executable.

    python -m benchmarks container

Needs root on Linux, whose rights the children give up. Each row is tried with a packed file that is loaded and called,
a model that is repacked and called, and a short run of configs/digits.toml, without and with AUTOPRUNE_CACHE. Ends with
1 if anything crashed, or computed something else. Writes benchmarks/results/container.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from autoprune.repack import repack, save
from autoprune.report.table import markdown_table
from benchmarks.lib.command_line import command_line
from benchmarks.lib.page import page, write_page
from benchmarks.lib.provenance import Provenance

HERE = Path(__file__).parent
# May read what is root's, as the interpreter may be; may write nothing of it.
NOBODY = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", "--inh-caps=-all,+dac_read_search"]
NOBODY += ["--ambient-caps=-all,+dac_read_search", "--"]
READ_ONLY = 'for place in /tmp /var/tmp /dev/shm; do mount -t tmpfs -o ro none $place; done; exec "$@"'
NO_PLACES = ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh"]
FILTER = [sys.executable, str(HERE / "no_executable_memory.py")]
PLAIN = [sys.executable]
ROWS: dict[str, tuple[list[str], list[str], dict[str, str]]] = {
    "unknown user, no HOME": (NOBODY, PLAIN, {}),
    "and no executable memory": (NOBODY, FILTER, {}),
    "unknown user, read-only home, no executable memory": (NOBODY, FILTER, {"HOME": "/"}),
    "and no temporary folder, no /dev/shm": ([*NO_PLACES, *NOBODY], FILTER, {"HOME": "/"}),
}
MODEL = """
import sys, torch, autoprune
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)).eval()
x = torch.randn(4, 3, 5, 5)
def check(fast):
    with torch.inference_mode():
        assert torch.allclose(fast(x), model(x), atol=1e-5), "another output than the model's"
    print("right: " + fast.report[0].why.partition(";")[0].partition(" (Op")[0])
"""
WORK = {
    "load and call": MODEL + "check(autoprune.load(sys.argv[1]))",
    "repack and call": MODEL + "check(autoprune.repack(model, x[:2]))",
    "run": "import sys; from autoprune.cli import main; main()",
}
SHORT = (
    *(
        'search.agent="uniform"',
        "search.episodes=1",
        "dense={epochs = 1, learning_rate = 0.1}",
        "task.widths=[8, 16]",
    ),
    *("finetune.settings.epochs=1", "latency.profile_samples=3", "latency.samples=3", "target={accuracy_drop = 0.9}"),
    *('latency.engines=["eager"]', 'env.pattern={name = "group", size = 8}', "env.min_saving=0.0"),
)


def tried(row: str, what: str, folder: Path, cache: bool = False) -> tuple[bool, str]:
    """Whether it went as it should, and the last line that was said."""
    outer, inner, variables = ROWS[row]
    script = folder / "work.py"
    script.write_text(WORK[what])
    script.chmod(0o644)
    arguments = [str(folder / "fast.safetensors")]
    if what == "run":
        run = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
        run.chmod(0o777)
        config = str(HERE.parent / "configs" / "digits.toml")
        arguments = ["run", config, "--run-dir", str(run), *(part for each in SHORT for part in ("--set", each))]
        variables = {**variables, **({"AUTOPRUNE_CACHE": str(run)} if cache else {})}
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS") if name in os.environ}
    done = subprocess.run(
        [*outer, *inner, str(script), *arguments], env={**kept, **variables}, cwd="/", capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    refused = [line for line in lines if line.startswith("error: ")]
    refused += [line.partition("FileError: ")[2] for line in lines if line.startswith("autoprune.errors.FileError: ")]
    fine = done.returncode == 0 or bool(refused)
    if what == "run" and done.returncode == 0:
        return True, "works"
    right = [line for line in lines if line.startswith("right: ")]
    told = [*refused, *lines[-1:], *right][-1] if lines else ""
    return fine, told.replace(str(folder), "...") if fine else f"status {done.returncode}: {told}"


def main(argv: Sequence[str]) -> int:
    given = command_line("container", __doc__).parse_args(argv)
    if sys.platform != "linux" or os.geteuid() != 0 or not all(map(shutil.which, ("setpriv", "unshare"))):
        sys.exit("needs root on Linux, setpriv and unshare")
    folder = Path(tempfile.mkdtemp(prefix=".container-", dir=Path.cwd()))
    try:
        folder.chmod(0o755)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)).eval()
        save(repack(model, torch.randn(2, 3, 5, 5)), folder / "fast.safetensors")
        cells, fine = [], True
        for row in ROWS:
            found = [tried(row, what, folder) for what in WORK] + [tried(row, "run", folder, cache=True)]
            cells.append([row, *(told for _, told in found)])
            fine = fine and all(well for well, _ in found)
            print(cells[-1], flush=True)
    finally:
        shutil.rmtree(folder)
    header = ("where", *WORK, "run, with AUTOPRUNE_CACHE")
    table = markdown_table(header, cells, left=len(header))
    text = page("In a locked container", "container", "", table, str(Provenance.here()))
    write_page(given.output, "container", text)
    return int(not fine)
