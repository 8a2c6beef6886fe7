"""Convolutions and poolings of videos: programs that compute them as maps, a map for each frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.repack import ProgramModel, load, repack, save
from autoprune.repack.outputs import same_output
from tests.repack.test_program import torch_steps


def convolution(*args: Any, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(*args, **options), nn.ReLU())


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "one of borders": (convolution(3, 16, 3, padding=1), (3, 5, 9, 8)),
    "patches": (convolution(3, 16, (2, 4, 4), (2, 4, 4)), (3, 6, 16, 12)),
    "patches that do not fit": (convolution(3, 8, (2, 4, 4), (2, 4, 4)), (3, 7, 17, 14)),
    "that overlap": (convolution(3, 8, (3, 7, 7), (2, 4, 4), (1, 3, 3)), (3, 8, 17, 20)),
    "of frames alone": (convolution(8, 8, (3, 1, 1), padding=(1, 0, 0), bias=False), (8, 5, 6, 7)),
    "of maps alone": (convolution(8, 16, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)), (8, 4, 9, 9)),
    "that leaves frames out": (convolution(8, 8, (1, 3, 3), stride=(2, 1, 1)), (8, 5, 6, 7)),
    "dilated": (convolution(4, 8, 3, padding=2, dilation=2), (4, 7, 9, 8)),
    "depthwise": (convolution(8, 8, 3, padding=1, groups=8), (8, 4, 6, 7)),
    "depthwise, strides": (convolution(8, 16, 3, (2, 2, 2), 1, groups=8), (8, 5, 6, 7)),
    "groups of maps alone": (convolution(8, 8, (1, 3, 3), groups=2), (8, 3, 6, 7)),
    "no border": (convolution(3, 8, 2, padding="valid"), (3, 3, 6, 7)),
    "largest of maps": (nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)), (4, 3, 7, 8)),
    "average of maps": (nn.AvgPool3d((1, 2, 2), (1, 2, 2), ceil_mode=True), (4, 3, 7, 8)),
    "average of all": (nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten()), (4, 3, 7, 8)),
}


def program(model: nn.Module, x: Tensor) -> ProgramModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.flatten(1)[:, ::2] = 0.0
    made = repack(model.eval(), x, form="program", threads=1)
    assert isinstance(made, ProgramModel)
    return made


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_volumes_are_native_at_any_batch_and_size(name: str) -> None:
    torch.manual_seed(0)
    model, shape = CONVOLUTIONS[name]
    x = torch.randn(1, *shape)
    made = program(model, x)
    assert not torch_steps(made, x)
    channels, frames, high, wide = shape
    for given in (x, torch.randn(2, *shape), torch.randn(1, channels, frames + 2, high + 4, wide + 4)):
        with torch.inference_mode():
            assert same_output(made(given), model(given)), given.shape


class Residual(nn.Module):
    """As video ResNets have them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv3d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm3d(8) for _ in range(2))
        for values in self.norms.state_dict().values():
            if values.is_floating_point():
                values.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.one(x)).relu()
        z: Tensor = (self.norms[1](self.two(y)) + x).relu()
        return z


def test_norms_of_videos_go_into_the_convolutions_before_them() -> None:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(1, 8, 4, 6, 7)
    made = program(model, x)
    assert not torch_steps(made, x)
    assert not [op for op in made.program.graph.ops if op.label == "aten.batch_norm.default"]
    for given in (x, torch.randn(2, 8, 5, 8, 9)):
        with torch.inference_mode():
            assert same_output(made(given), model(given)), given.shape


def test_a_layer_of_a_video_is_packed_and_stored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv3d(3, 16, 3, padding=1)), torch.randn(1, 3, 4, 8, 8)
    made = program(model, x)
    assert [(row.name, row.backend, row.why) for row in made.report] == [("0", "jit", "packed")]
    save(made, tmp_path / "video.safetensors")
    loaded = load(tmp_path / "video.safetensors", threads=1)
    with torch.inference_mode():
        assert torch.equal(loaded(x), made(x))


def test_groups_over_several_frames_are_left_to_torch() -> None:
    torch.manual_seed(0)
    model, x = convolution(8, 8, 3, groups=2), torch.randn(1, 8, 4, 6, 7)
    made = program(model, x)
    assert [step.op.label for step in torch_steps(made, x)] == ["aten.conv3d.default"]
    with torch.inference_mode():
        assert same_output(made(x), model(x))
