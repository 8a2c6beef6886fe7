"""What `import autoprune` must not wait for."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from autoprune.repack import repack, save

HEAVY = {
    *("torch._dynamo", "torch._inductor", "torch.onnx", "sympy"),  # torch's compiler takes longer than torch itself
    *("gymnasium", "stable_baselines3", "sb3_contrib", "cmaes", "optuna", "ray"),
    *("matplotlib", "tensorboard", "rich", "typer", "pydantic"),
    *("sklearn", "scipy", "onnx", "onnxruntime", "openvino"),
}


def loaded_by(code: str) -> set[str]:
    """The modules that a process has loaded after `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_import_loads_nothing_heavy() -> None:
    loaded = loaded_by("import autoprune")
    assert "torch" in loaded
    assert "autoprune.repack" in loaded
    assert not loaded & HEAVY


def test_loading_and_calling_a_program_loads_nothing_heavy(tmp_path: Path) -> None:
    convolution = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.GELU(), nn.Linear(8, 2)
    )
    save(repack(convolution.eval(), torch.randn(1, 2, 5, 5)), tmp_path / "fast")
    call = f"autoprune.load({str(tmp_path / 'fast')!r})(torch.zeros(2, 2, 5, 5))"
    assert not loaded_by(f"import torch, autoprune; torch.set_grad_enabled(False); {call}") & HEAVY


def test_what_is_heavy_is_named_as_python_names_it() -> None:
    """A misspelt name would never be found."""
    wanted = {"torch._dynamo", "sympy", "gymnasium", "pydantic"}
    assert wanted <= HEAVY & loaded_by("import torch._dynamo, gymnasium, pydantic")
