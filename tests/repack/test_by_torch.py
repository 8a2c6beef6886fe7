"""Where no memory may be made executable: packed models run by torch's own operators, and say so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import llvmlite.ir as ir
import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.repack import files, load, repack, save
from autoprune.repack.kernels import compiler
from autoprune.repack.modules.backends import jit
from autoprune.repack.report import ProgramModel
from autoprune.repack.runtime import program

FILTER = Path(__file__).parents[2] / "benchmarks" / "no_executable_memory.py"
REASON = "there is a filter"


class Steps(nn.Module):
    """A GRU and a Linear, and a constant among the results."""

    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)
        self.register_buffer("kept", torch.arange(3.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.out(self.gru(x)[1][0]), self.kept


def models() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(5)
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5))
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    made: dict[str, tuple[nn.Module, Tensor]] = {
        "convolutions": (grouped, torch.randn(2, 4, 5, 5)),
        "recurrent": (Steps(), torch.randn(2, 4, 6)),
        "encoder": (encoder, torch.randn(2, 4, 8)),
    }
    for model, _ in made.values():
        for parameter in model.eval().requires_grad_(False).parameters():
            if parameter.dim() > 1:
                parameter[torch.rand(parameter.shape) < 0.6] = 0.0
    return made


def same(got: object, wanted: object) -> bool:
    pairs = zip(*(each if isinstance(each, tuple) else (each,) for each in (got, wanted)), strict=True)
    return all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("form", ["program", "modules"])
def test_a_file_is_loaded_and_run_by_torch(
    name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = models()[name]
    path, more = tmp_path / "fast.safetensors", torch.randn(5, *x.shape[1:])
    save(repack(model, x, form=form, choose=(lambda *_: "jit") if form == "modules" else None), path)  # type: ignore[arg-type]
    monkeypatch.setattr(compiler, "refused", lambda: REASON)
    for module in (program, files, jit):
        monkeypatch.setattr(module, "unavailable", lambda: REASON)
    fast = load(path, None if form == "program" else model)
    with torch.inference_mode():
        assert same(fast(more), model(more))
        fast(more)
    told = [row.why for row in fast.report if row.backend == "jit"]
    assert told == [f"run by torch's own operators, slower: {REASON}"] * len(told)
    assert told or name == "encoder"
    save(fast, path)
    if isinstance(fast, ProgramModel):
        bound = fast.bind(torch.zeros_like(more))
        bound.inputs[0].copy_(more)
        assert same(bound(), model(more))
        with pytest.raises(AutopruneError, match=r"was made for an input .* of shape"):
            fast(more[..., :1])


def test_what_a_caller_does_to_a_result_changes_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = models()["recurrent"]
    fast = repack(model, x, form="program")
    assert isinstance(fast, ProgramModel)
    monkeypatch.setattr(program, "unavailable", lambda: REASON)
    slow = program.Program(fast.program.graph, fast.program.weights)
    with torch.inference_mode():
        slow(x)[1].fill_(7.0)
        assert same(slow(x), model(x))


def test_no_kernel_is_compiled_where_it_would_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "refused", lambda: REASON)
    with pytest.raises(AutopruneError, match=REASON):
        compiler.compile_op(ir.Module(), "op", compiler.host())


def test_this_process_may() -> None:
    assert compiler.refused() is None
    assert torch.backends.mkldnn.enabled


WORK = """
import sys
import torch
from torch import nn
import autoprune

model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)).eval()
model.load_state_dict(torch.load(sys.argv[2], weights_only=True))
x = torch.arange(4 * 75.0).reshape(4, 3, 5, 5).sin()
with torch.inference_mode():
    fast = autoprune.load(sys.argv[1])
    given = fast(x)
    again = autoprune.repack(model, x[:2])
    assert torch.allclose(given, model(x), atol=1e-5)
    assert torch.allclose(again(x), model(x), atol=1e-5)
    assert torch.allclose(autoprune.repack(model, x, form="modules")(x), model(x), atol=1e-5)
print(fast.report[0].why)
print(again.report[0].why)
try:
    autoprune.repack(model, x, form="program")
except autoprune.AutopruneError as error:
    print(error)
"""


@pytest.mark.slow
def test_under_a_filter_of_the_system(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)).eval()
    save(repack(model, torch.randn(2, 3, 5, 5)), tmp_path / "fast")
    torch.save(model.state_dict(), tmp_path / "state")
    (tmp_path / "work.py").write_text(WORK)
    command: list[str | Path] = [sys.executable, FILTER, tmp_path / "work.py", tmp_path / "fast", tmp_path / "state"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    loaded, repacked, refused = done.stdout.splitlines()
    assert loaded.startswith("run by torch's own operators, slower: this process may not make memory executable")
    for told in (repacked, refused):
        assert told.count("may not make memory executable (Operation not permitted)") == 1


TRAINING = """
import sys
import torch
from torch import nn
import autoprune

torch.manual_seed(4)
model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
batches = [(torch.randn(16, 1, 5, 5), torch.arange(16) % 3) for _ in range(2)]
done = autoprune.compress(
    model, batches, lambda given: 1.0 - given(batches[0][0]).isnan().float().mean().item(), batches[0][0],
    autoprune.Target(accuracy_drop=0.5),
    config={
        "env": {"min_saving": 0.0, "min_weights": 1},
        "search": {"agent": "uniform", "episodes": 1},
        "finetune": {"settings": {"epochs": 1}},
        "latency": {"engines": ["eager"], "samples": 3, "profile_samples": 3},
    },
)
print(len(done.plan.layers))
"""  # fmt: skip


@pytest.mark.slow
def test_a_model_is_trained_under_a_filter_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(TRAINING)
    done = subprocess.run([sys.executable, FILTER, tmp_path / "work.py"], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 0
