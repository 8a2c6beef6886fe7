"""Every example runs as it stands, in an empty folder, and is short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {
    "own_model.py": ("one image: tensor([", ()),
    "own_loop.py": ("accuracy, in fast.safetensors", ("fast.safetensors",)),
    "deploy.py": ("same outputs; dense ", ("packed.safetensors",)),
    "to_onnx.py": ("ONNX Runtime gives what the model gives", ("model.onnx",)),
    "environment.py": ("speed-up over torch eager", ("agent.zip",)),
    "command_line.sh": ("Written to compressed.", ("compressed/report.html", "compressed/repacked.safetensors")),
}
LINES = 40


def test_every_example_is_tested_and_listed_and_short() -> None:
    files = {path.name: path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".sh")}
    assert set(files) == set(EXAMPLES)
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for name, path in files.items():
        assert f"]({name})" in listed
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    commands = tmp_path / "bin"  # `autoprune` and `python` are those of this checkout and this interpreter
    commands.mkdir()
    for command, arguments in (("autoprune", "-m autoprune"), ("python", "")):
        (commands / command).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n', encoding="utf-8")
        (commands / command).chmod(0o755)
    path = os.pathsep.join([str(commands), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "empty"
    folder.mkdir()
    run = ["bash" if name.endswith(".sh") else "python", str(ROOT / "examples" / name)]
    done = subprocess.run(run, cwd=folder, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, files = EXAMPLES[name]
    assert said in done.stdout
    assert all((folder / file).exists() for file in files)
