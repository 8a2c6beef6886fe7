"""What is installed is what is in the checkout, under one import name; the documented commands are the real ones."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from autoprune.version import __version__

ROOT = Path(__file__).resolve().parents[1]
TEST_COMMAND = 'pip install -c constraints.txt -e ".[test]" && pytest'
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def packages_below(folder: Path, name: str) -> Iterator[str]:
    """Folders with Python in them, not going through the symlinks."""
    if any(folder.glob("*.py")):
        yield name
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and not inner.is_symlink() and inner.name != "__pycache__":
            yield from packages_below(inner, f"{name}.{inner.name}")


def test_every_package_of_the_checkout_is_installed() -> None:
    found = sorted(package for name, folder in FOLDERS.items() for package in packages_below(ROOT / folder, name))
    assert PROJECT["tool"]["setuptools"]["packages"] == found, "the list in pyproject.toml is sorted and complete"


@pytest.mark.parametrize("name", ["envs", "agents"])
def test_a_folder_of_the_top_level_has_one_import_name(name: str) -> None:
    link = ROOT / "autoprune" / name
    assert link.is_symlink(), "clone with symlinks: git -c core.symlinks=true clone ..."
    assert link.readlink() == Path("..") / name
    module = importlib.import_module(f"autoprune.{name}")
    assert module.__file__ is not None
    assert Path(module.__file__).samefile(ROOT / name / "__init__.py")
    assert FOLDERS[f"autoprune.{name}"] == name


def requirements() -> list[Requirement]:
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    return [need for need in map(Requirement, lines) if need.name != project["name"]]


def pins() -> dict[str, str]:
    lines = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    found = dict(re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line).groups() for line in lines)  # type: ignore[union-attr]
    assert len(found) == len(lines), "one pin a package, exact, without a local version"
    return {normal(name): version for name, version in found.items()}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("need", requirements(), ids=str)
def test_a_dependency_has_a_lower_bound_and_a_pin_that_meets_it(need: Requirement) -> None:
    assert [bound.operator for bound in need.specifier] == [">="]
    assert need.specifier.contains(pins()[normal(need.name)])


def test_the_readme_ci_and_we_run_the_same_test_command() -> None:
    assert TEST_COMMAND in read("README.md").splitlines()
    assert TEST_COMMAND in read(".ci/run").splitlines()


def executable(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("failing", "ran"),
    [
        ("pip", ["pip"]),
        ("pytest", ["pip", "pytest"]),
        ("check", ["pip", "pytest", "pip", "check"]),
        ("mkdocs", ["pip", "pytest", "pip", "check", "mkdocs"]),
        ("", ["pip", "pytest", "pip", "check", "mkdocs"]),
    ],
)
def test_ci_stops_at_the_step_that_fails(failing: str, ran: list[str], tmp_path: Path) -> None:
    """Runs .ci/run with stand-ins for the slow commands; each notes that it ran, one of them fails."""
    tools, checkout, log = tmp_path / "tools", tmp_path / "checkout", tmp_path / "log"
    for path in (tools / "pip", tools / "pytest", tools / "mkdocs", checkout / "scripts" / "check"):
        executable(path, f"echo {path.name} >>{log}; [ {path.name} != '{failing}' ]")
    executable(tools / "python3", 'mkdir -p "$3/bin" && touch "$3/bin/activate"')
    executable(checkout / ".ci" / "run", read(".ci/run"))
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run([str(checkout / ".ci" / "run")], env=environment, cwd=tmp_path, check=False)
    assert (done.returncode == 0) == (failing == "")
    assert log.read_text(encoding="utf-8").split() == ran


@pytest.mark.parametrize("script", [".ci/run", "scripts/check", "scripts/test"])
def test_a_script_can_be_run_and_stops_at_the_first_failure(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111 == 0o111
    assert read(script).startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail\n" in read(script)


def test_the_changelog_begins_with_this_version() -> None:
    releases = re.findall(r"^## \[(.+?)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert releases[0] == __version__


def test_the_license_is_the_one_that_is_declared() -> None:
    assert PROJECT["project"]["license"] == "MIT"
    assert read("LICENSE").startswith("MIT License\n")
