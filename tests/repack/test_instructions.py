"""How many instructions models take on other processors: counted, since nothing here tells their time."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from autoprune.precision import Precision
from autoprune.repack.aot.build import compiled
from autoprune.repack.aot.targets import PLATFORMS
from autoprune.repack.aot.toolchain import toolchain
from autoprune.repack.lowering.geometry import Tiling
from autoprune.repack.model import repack
from benchmarks.build_models import SUBJECTS
from tests.laws.test_program import told

pytestmark = pytest.mark.emulated
PRECISIONS: tuple[Precision, ...] = ("float32", "int8")
GROUP, BLOCK, KEPT = 8, 4, 4  # filters, channels, and one block in so many

_MAIN = """
#include <stdint.h>
int32_t m_prepare(void *workspace);
int32_t m_run(const float *x, float *y, void *workspace);
static float x[{inputs}], y[{outputs}];
static char workspace[{workspace}] __attribute__((aligned(64)));
int main(int calls, char **arguments) {{
    int32_t wrong = m_prepare(workspace);
    while (--calls) wrong |= m_run(x, y, workspace);
    return wrong;
}}
"""


def layers(pruned: bool, precision: Precision) -> nn.Module:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
    model = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1]).eval()
    for layer in convolutions:
        weight = layer.weight.data
        if pruned:
            blocks = torch.arange(weight[::GROUP, ::BLOCK].numel()).reshape(weight[::GROUP, ::BLOCK].shape)
            kept = (blocks % (KEPT + 1) == 0) | (blocks % (4 * (KEPT + 1)) == 1)  # a quarter, spread over all taps
            weight *= kept.repeat_interleave(GROUP, 0).repeat_interleave(BLOCK, 1)
    x = torch.randn(1, 16, 8, 8)
    return repack(model, (x,), precision=precision, calibration=None if precision == "float32" else [x])


def executed(model: nn.Module, name: str, folder: Path) -> int:
    """Instructions of one inference, all but the same each time."""
    platform = PLATFORMS[name]
    tools = toolchain(platform)
    if tools is None or not shutil.which(platform.emulator[0]):
        pytest.skip(f"needs a compiler for {platform.about}, and qemu")
    built = compiled(model, name, name="m")  # type: ignore[arg-type]
    (call,) = built.calls
    (folder / "model.o").write_bytes(built.code)
    numbers = {"inputs": call.inputs[0].count, "outputs": call.outputs[0].port.count}
    (folder / "main.c").write_text(_MAIN.format(**numbers, workspace=call.workspace_bytes))
    tools.program([folder / "main.c", folder / "model.o"], folder / "program")

    def counted(calls: int) -> int:
        log = folder / "log"
        options = ["-singlestep", "-d", "exec,nochain", "-D", str(log)]
        command = [*platform.emulator, *options, str(folder / "program"), *["again"] * calls]
        subprocess.run(command, check=True)
        with log.open("rb") as lines:
            return sum(line.startswith(b"Trace") for line in lines)

    return counted(2) - counted(1)


@pytest.mark.parametrize("name", ["aarch64", "armv7"])
def test_what_is_pruned_is_not_computed(name: str, tmp_path: Path) -> None:
    dense, pruned = (executed(layers(each, "float32"), name, tmp_path) for each in (False, True))
    assert pruned < 0.4 * dense


@pytest.mark.parametrize(("name", "share"), [("aarch64-dotprod", 0.5), ("armv7", 0.9)])
def test_bytes_take_fewer_instructions_than_floats(name: str, share: float, tmp_path: Path) -> None:
    floats, bytes_ = (executed(layers(False, each), name, tmp_path) for each in PRECISIONS)
    assert bytes_ < share * floats


def test_a_step_of_an_lstm_takes_few_instructions_beside_its_products(tmp_path: Path) -> None:
    subject = SUBJECTS["lstm"]

    def count(sparsity: float) -> int:
        cache = told(tmp_path, lambda: Tiling(16, 20, 24))
        return executed(subject.repacked(sparsity, cache), "aarch64", tmp_path)

    dense, pruned = count(0.0), count(subject.sparsity)
    assert dense < 1_900_000
    assert pruned < 700_000
