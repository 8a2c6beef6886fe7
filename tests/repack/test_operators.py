"""Which of torch's operators programs take: pure ones, by any name; and what files may not do with them."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.errors import FileError
from autoprune.repack import ProgramModel, SwappedModel, load, repack, save
from autoprune.repack.graph import aten
from autoprune.repack.graph.ops import TorchOp
from autoprune.repack.lowering.steps import TorchStep
from autoprune.repack.runtime.program import Plan

torch.manual_seed(3)
PLACES, TABLE = torch.randperm(12), torch.randint(0, 9, (12, 12))
BIAS = torch.randn(4, 9)
X = torch.randn(2, 12, 16)


class Between(nn.Module):
    """Something between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(16, 16), nn.Linear(16, 16), function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.function(self.a(x)))
        return y


def filled(x: Tensor) -> Tensor:
    made = torch.empty_like(x)
    made.fill_(2.0)
    return made * x


def shifted(x: Tensor) -> Tensor:
    """As decoders shift their inputs."""
    made = x.new_zeros(x.shape)
    made[:, 1:] = x[:, :-1].clone()
    made[:, 0] = 2.0
    return made


def positions(x: Tensor) -> Tensor:
    """Buckets of distances as T5 has them."""
    n = torch.arange(x.shape[1])
    far = n[:, None] - n[None]
    near = torch.min(far.abs(), torch.full_like(far, 5))
    return x + torch.where(far > 0, near, 0).float().mean(1)[:, None]


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "indices": lambda x: x[:, PLACES],
    "indices of two axes": lambda x: x + BIAS[:, TABLE].mean((0, 1))[None, :, None],
    "new ones": lambda x: x * x.new_ones(x.shape[0], 1, 1),
    "new full": lambda x: x + x.new_full((x.shape[1], 1), 2.0),
    "new zeros": lambda x: x + x.new_zeros(x.shape),
    "empty, then filled": filled,
    "written in parts": shifted,
    "and": lambda x: x.masked_fill((x > 0) & (x < 1), 0.5),
    "or, not": lambda x: x.masked_fill(~((x > 1) | (x < 0)), 0.5),
    "normalized": lambda x: F.normalize(x, dim=-1),
    "where": lambda x: torch.where(x > 0, x, 0.25),
    "minimum": lambda x: torch.min(x, x.roll(1, -1)),
    "distances": positions,
    "windows": lambda x: F.unfold(x[:, None], 3, padding=1).mean(1).unflatten(1, x.shape[1:]),
    "pooled": lambda x: x + F.adaptive_avg_pool3d(x[:, None, None], (1, 3, 4)).mean((1, 2, 3, 4))[:, None, None],
    "upsampled": lambda x: F.interpolate(x, scale_factor=2, mode="linear")[..., ::2],
    "instance norm": lambda x: F.instance_norm(x),
    "sampled": lambda x: F.grid_sample(x[:, None], x[:, :4, :2][:, :, None], align_corners=False).mean((1, 2, 3))[
        :, None, None
    ] + x,
    "differences": lambda x: torch.diff(x, dim=-1, prepend=x[..., :1]),
    "histogram": lambda x: x + torch.histc(x, 4, -2, 2)[0],
    "moved": lambda x: x.to("cpu", torch.float64).to(x),
    "to the power of infinity": lambda x: x.sigmoid().pow(math.inf) + x,
    "window": lambda x: x * torch.hann_window(16),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_pure_operator_keeps_no_model_from_being_a_program(name: str, tmp_path: Path) -> None:
    model = Between(FUNCTIONS[name]).eval()
    fast = repack(model, X, threads=1)
    assert isinstance(fast, ProgramModel), {row.why for row in fast.report}
    save(fast, tmp_path / "fast.safetensors")
    loaded = load(tmp_path / "fast.safetensors", threads=1)
    for x in (X, torch.randn(2, 12, 16)):
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(loaded(x), fast(x), rtol=0, atol=0)


def test_what_depends_on_shapes_alone_is_computed_once() -> None:
    model = Between(FUNCTIONS["distances"]).eval()
    fast = repack(model, X, threads=1)
    assert isinstance(fast, ProgramModel)
    for x in (X, torch.randn(2, 15, 16)):
        plan = fast.program.plan_for((x,))
        assert isinstance(plan, Plan)
        assert not [step for step in plan.lowered.steps if isinstance(step, TorchStep)]
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_a_mask_picks_is_no_program() -> None:
    model = Between(lambda x: x + x[x > 0].sum()).eval()
    fast = repack(model, X, threads=1)
    assert isinstance(fast, SwappedModel)
    assert all("picks values by a mask" in row.why for row in fast.report)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_a_file_picks_nothing_by_a_mask(dtype: torch.dtype) -> None:
    index = torch.ones(3, dtype=dtype)
    with pytest.raises(TypeError, match="picks by a mask"):
        aten.call("aten.index.Tensor", [{"ref": "x"}, [{"ref": "i"}]], {}, {"x": torch.ones(3), "i": index})


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("aten.grid_sampler.default", [{"ref": "x"}, {"ref": "x"}, 3, 0, True]),
        ("aten.grid_sampler.default", [{"ref": "x"}, {"ref": "x"}, 0, -1, True]),
        ("aten.batch_norm.default", [{"ref": "x"}, None, None, {"ref": "x"}, {"ref": "x"}, True, 0.1, 1e-5, False]),
        ("aten.instance_norm.default", [{"ref": "x"}, None, None, {"ref": "x"}, {"ref": "x"}, True, 0.1, 1e-5, False]),
    ],
)
def test_arguments_that_torch_would_believe_are_refused(name: str, args: list[Any]) -> None:
    with pytest.raises(FileError, match=r"samples a grid|updates running"):
        TorchOp.of("y", name, tuple(args)).check({})


@pytest.mark.slow
def test_no_allowed_operator_crashes_on_odd_arguments() -> None:
    """In a process of its own, which names the operator that ended it."""
    script = Path(__file__).with_name("odd_arguments.py")
    done = subprocess.run([sys.executable, str(script), "0", "3"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-400:]
    assert int(done.stdout.split()[-1]) > 500  # calls that went through
