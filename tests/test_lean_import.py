"""What `import autoprune` must not wait for, and what works without the extras."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from torch import nn

import autoprune
from autoprune.errors import MissingExtra
from autoprune.extras import needs

EXTRAS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]

HEAVY = {
    *("torch._dynamo", "torch._inductor", "torch.onnx", "sympy"),  # torch's compiler takes longer than torch itself
    *("gymnasium", "stable_baselines3", "sb3_contrib", "cmaes", "optuna", "ray"),
    *("matplotlib", "tensorboard", "rich", "typer", "pydantic"),
    *("sklearn", "scipy", "onnx", "onnxruntime", "openvino", "nncf"),
}


def loaded_by(code: str) -> set[str]:
    """The modules that a process has loaded after `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_repacking_loads_nothing_heavy() -> None:
    loaded = loaded_by("from autoprune import load, repack, save")
    assert "torch" in loaded
    assert "autoprune.repack" in loaded
    assert not loaded & HEAVY


def test_import_alone_does_not_load_torch() -> None:
    loaded = loaded_by("import autoprune")
    assert "autoprune.errors" in loaded
    assert not loaded & {"torch", "numpy", "llvmlite", "autoprune.repack", *HEAVY}


@pytest.mark.parametrize("command", ["--help", "run --help", "prune --help"])
def test_help_waits_neither_for_torch_nor_for_the_agents(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "autoprune", *command.split()],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"typer", "autoprune.cli"} <= loaded
    assert not loaded & (
        {"torch", "numpy", "llvmlite", "autoprune.repack", *HEAVY} - {"typer", "rich", "pydantic"}
    )  # its own


@pytest.mark.slow
def test_repack_is_the_function_in_whatever_order_things_are_imported() -> None:
    """The package of the same name is bound to it by Python when it is imported."""
    for code in ("import autoprune", "import autoprune.repack.files, autoprune", "import autoprune.repack"):
        assert "True" in loaded_by(
            f"{code}; print(callable(autoprune.repack) and autoprune.repack.__name__ == 'repack')"
        )


def test_all_public_names_are_there() -> None:
    for name in autoprune.__all__:
        assert getattr(autoprune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = autoprune.nothing


def test_what_is_heavy_is_named_as_python_names_it() -> None:
    """A misspelt name would never be found."""
    for name in ("torch._dynamo", "gymnasium", "pydantic"):
        importlib.import_module(name)
    assert {"torch._dynamo", "sympy", "gymnasium", "pydantic"} <= HEAVY & set(sys.modules)


def without_search(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` where nothing that the extra `search` installs can be imported."""
    names = {"scikit-learn": "sklearn", "stable-baselines3": "stable_baselines3"}
    packages = [names.get(need, need) for need in (Requirement(line).name for line in EXTRAS["search"])]
    missing = f"import sys; sys.modules |= dict.fromkeys({packages!r}); "
    return subprocess.run(
        [sys.executable, "-c", missing + code, *arguments], capture_output=True, text=True, check=False
    )


WORK = """
import torch, autoprune
fast = autoprune.load(sys.argv[1])
x = torch.ones(3, 2, 7, 7)
again = autoprune.repack(torch.nn.Sequential(torch.nn.Conv2d(2, 8, 3), torch.nn.Flatten()).eval(), x)
print(fast(x).shape, again(x).shape, again.report[0].why)
"""


def test_a_packed_model_is_loaded_and_run_without_the_extras(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3)).eval()
    autoprune.save(autoprune.repack(model, torch.randn(2, 2, 7, 7), form="program"), tmp_path / "fast")
    done = without_search(WORK, str(tmp_path / "fast"))
    assert done.stdout.startswith("torch.Size([3, 3]) torch.Size([3, 200]) packed"), done.stderr


TWO_ERRORS = """
import traceback, autoprune
try:
    autoprune.compress
except Exception:
    traceback.print_exc()
print("next", file=sys.stderr)
from autoprune import PruningHooks
"""


def test_what_needs_an_extra_says_which() -> None:
    for said in without_search(TWO_ERRORS).stderr.split("next\n"):
        assert 'pip install "autoprune[search]"' in said.splitlines()[-1]


def test_the_command_line_says_which_extra_it_needs() -> None:
    done = without_search("from autoprune.__main__ import main; main()")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the command line needs ")
    assert 'pip install "autoprune[search]"' in done.stderr


def test_an_error_of_our_own_is_no_missing_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"autoprune\.nothing"), needs("search", "this"):
        importlib.import_module("autoprune.nothing")
    with (
        pytest.raises(MissingExtra, match=r"this needs nothing_of: pip install \"autoprune\[ray\]\""),
        needs("ray", "this"),
    ):
        importlib.import_module("nothing_of.it")
