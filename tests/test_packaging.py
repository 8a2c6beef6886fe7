"""What is installed is what is in the checkout, under one import name; the documented commands are the real ones."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from autoprune.tasks import japanese_vowels, spoken_digits
from autoprune.version import __version__

ROOT = Path(__file__).resolve().parents[1]
TEST_COMMAND = 'pip install -c constraints.txt -e ".[test]" && pytest'
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def packages_below(folder: Path, name: str) -> Iterator[str]:
    """Folders with Python in them and those that are mapped, not going through the symlinks."""
    if name in FOLDERS or any(folder.glob("*.py")):
        yield name
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and not inner.is_symlink() and inner.name != "__pycache__":
            yield from packages_below(inner, f"{name}.{inner.name}")


def test_every_package_of_the_checkout_is_installed() -> None:
    found = sorted(package for name, folder in FOLDERS.items() for package in packages_below(ROOT / folder, name))
    assert PROJECT["tool"]["setuptools"]["packages"] == found, "the list in pyproject.toml is sorted and complete"


@pytest.mark.parametrize("name", ["envs", "agents", "configs"])
def test_a_folder_of_the_top_level_is_linked_to_its_place_in_the_package(name: str) -> None:
    link = ROOT / "autoprune" / name
    assert link.is_symlink(), "clone with symlinks: git -c core.symlinks=true clone ..."
    assert link.readlink() == Path("..") / name
    assert FOLDERS[f"autoprune.{name}"] == name


@pytest.mark.parametrize("name", ["envs", "agents"])
def test_a_folder_of_the_top_level_has_one_import_name(name: str) -> None:
    module = importlib.import_module(f"autoprune.{name}")
    assert module.__file__ is not None
    assert Path(module.__file__).samefile(ROOT / name / "__init__.py")


BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of the checkout, without a network."""
    pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml asks for setuptools>=77 to build")
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in FOLDERS.values():
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    command = [sys.executable, "-c", BUILD, str(out)]
    done = subprocess.run(command, cwd=checkout, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(out / done.stdout.split()[-1])


def test_the_wheel_holds_all_that_is_read_at_run_time(wheel: zipfile.ZipFile) -> None:
    files = set(wheel.namelist())
    assert {"autoprune/py.typed", "autoprune/agents/shipped/policy.json"} <= files
    assert {f"autoprune/configs/{path.name}" for path in (ROOT / "configs").glob("*.toml")} <= files
    assert {name.partition("/")[0] for name in files} == {"autoprune", f"autoprune-{__version__}.dist-info"}


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    about = BytesParser().parsebytes(wheel.read(f"autoprune-{__version__}.dist-info/METADATA"))
    assert about["License-Expression"] == "MIT"
    assert about["License-File"] == "LICENSE"
    assert "pruning" in about["Keywords"].split(",")
    kinds = about.get_all("Classifier", [])
    assert kinds == sorted(kinds)
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.11"} <= set(kinds)


def requirements() -> list[Requirement]:
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    return [need for need in map(Requirement, lines) if need.name != project["name"]]


def pins(name: str = "constraints.txt") -> dict[str, str]:
    lines = [line for line in read(name).splitlines() if line and not line.startswith("#")]
    matches = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line) for line in lines]
    found = {match[1]: match[2] for match in matches if match}
    assert len(found) == len(lines), "one pin a package, exact, without a local version"
    return {normal(name): version for name, version in found.items()}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("need", requirements(), ids=str)
def test_a_dependency_has_a_lower_bound_and_a_pin_that_meets_it(need: Requirement) -> None:
    assert [bound.operator for bound in need.specifier] == [">="]
    assert need.specifier.contains(pins()[normal(need.name)])


def test_the_lowest_versions_are_the_ones_that_are_claimed() -> None:
    lowest, extras = pins("constraints-lowest.txt"), PROJECT["project"]["optional-dependencies"]
    for need in map(Requirement, [*PROJECT["project"]["dependencies"], *extras["search"]]):
        (bound,) = need.specifier
        assert Version(lowest[normal(need.name)]) == Version(bound.version), need.name


def test_the_readme_ci_and_we_run_the_same_test_command() -> None:
    assert TEST_COMMAND in read("README.md").splitlines()
    assert TEST_COMMAND in read(".ci/tests").splitlines()


def test_ci_installs_the_data_that_the_tasks_ask_for() -> None:
    lines = read(".ci/optional").splitlines()
    assert spoken_digits.INSTALL in lines
    assert japanese_vowels.INSTALL in lines


def executable(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def run_ci(tmp_path: Path, *stages: str, failing: str = "", pytest_prints: str = "") -> tuple[int, list[str], str]:
    """Runs .ci/run with stand-ins for the slow commands; each notes that it ran, one of them fails.

    Nobody is root, so that no second Python is installed.

    Returns:
        The exit status, the commands that ran, and what was written to stderr.
    """
    tools, checkout, log = tmp_path / "tools", tmp_path / "checkout", tmp_path / "log"
    shutil.copytree(ROOT / ".ci", checkout / ".ci")
    for name in ("pip", "pytest", "mkdocs", "autoprune"):
        said = f"echo '{pytest_prints}'; " if name == "pytest" else ""
        executable(tools / name, f"{said}echo {name} >>{log}; [ {name} != '{failing}' ]")
    executable(checkout / "scripts" / "check", f"echo check >>{log}; [ check != '{failing}' ]")
    executable(tools / "python3", 'mkdir -p "$3/bin" && touch "$3/bin/activate"')
    executable(tools / "apt-get", "true")
    executable(tools / "id", "echo 1000")
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    environment.pop("CI_ENVIRONMENTS", None)  # .ci/run has its own, and this may be a part of another one
    command = [str(checkout / ".ci" / "run"), *stages]
    done = subprocess.run(command, env=environment, cwd=tmp_path, check=False, capture_output=True, text=True)
    return done.returncode, log.read_text(encoding="utf-8").split() if log.exists() else [], done.stderr


TESTED = ["pip", "pytest", "pip", "pytest"]  # the README's command, the slow tests
CHECKED = [*TESTED, "pip", "check", "mkdocs"]  # ..., the checks, the site
ALL = [*CHECKED, *["pip", "pip", "pip", "pytest"]]  # ..., optional


@pytest.mark.parametrize(
    ("failing", "ran"),
    [
        ("pip", ["pip"]),
        ("pytest", ["pip", "pytest"]),
        ("check", [*TESTED, "pip", "check"]),
        ("mkdocs", CHECKED),
        ("", ALL),
    ],
)
def test_ci_stops_at_the_step_that_fails(failing: str, ran: list[str], tmp_path: Path) -> None:
    status, commands, _ = run_ci(tmp_path, failing=failing)
    assert (status == 0) == (failing == "")
    assert commands == ran


@pytest.mark.parametrize("failing", ["", "autoprune"])
def test_the_lowest_versions_are_tested_where_that_is_asked_for(failing: str, tmp_path: Path) -> None:
    status, commands, _ = run_ci(tmp_path, "lowest", failing=failing)
    assert (status == 0) == (failing == "")
    assert commands == ["pip", "pytest", "autoprune"]


def test_ci_says_that_it_has_no_second_python(tmp_path: Path) -> None:
    status, commands, said = run_ci(tmp_path, "other-python")
    assert (status, commands) == (0, [])
    assert said == "SKIPPED: no second Python was tested: this needs root\n"


def test_ci_takes_no_skipped_test_where_all_is_installed(tmp_path: Path) -> None:
    status, _, said = run_ci(
        tmp_path, "optional", pytest_prints="SKIPPED [1] tests/tasks/test_tasks.py:187: needs more"
    )
    assert status == 1
    assert said.startswith("A test was skipped")


NAMES = ("run", "tests", "slow", "checks", "optional", "lowest", "other-python", "emulated", "short")
STAGES = [f".ci/{name}" for name in NAMES]


@pytest.mark.parametrize("script", [*STAGES, "scripts/check", "scripts/test"])
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
