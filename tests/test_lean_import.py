"""What `import autoprune` must not wait for."""

import subprocess
import sys

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


def test_what_is_heavy_is_named_as_python_names_it() -> None:
    """A misspelt name would never be found."""
    wanted = {"torch._dynamo", "sympy", "gymnasium", "pydantic"}
    assert wanted <= HEAVY & loaded_by("import torch._dynamo, gymnasium, pydantic")
