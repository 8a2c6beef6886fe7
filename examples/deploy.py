"""Load a packed file and run it; compare it with the dense model. Needs no extra: pip install autoprune."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

import autoprune

torch.manual_seed(0)
torch.set_num_threads(1)
convolution = nn.Conv2d(128, 128, 3, padding=1)
dense = nn.Sequential(nn.Conv2d(16, 128, 3, padding=1), nn.ReLU(), convolution, nn.ReLU()).eval()
image = torch.randn(1, 16, 32, 32)
with torch.no_grad():  # zeros of any tool are welcome: here 8 filters each stop reading 7 of 8 channels
    group = torch.rand(16, 1, 128, 1, 1) < 0.125
    convolution.weight.mul_(group.expand(16, 8, -1, 1, 1).flatten(0, 1))
autoprune.save(autoprune.repack(dense, image), "packed.safetensors")

# All that follows can run elsewhere: the file holds no code, and the model's class is not needed.
fast = autoprune.load("packed.safetensors")


def milliseconds(model: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """The median of 50 calls."""
    times = []
    for _ in range(50):
        began = time.perf_counter()
        with torch.inference_mode():
            model(image)
        times.append(1e3 * (time.perf_counter() - began))
    return sorted(times)[25]


torch.testing.assert_close(fast(image), dense(image), rtol=1e-3, atol=1e-4)
print(f"same outputs; dense {milliseconds(dense):.2f} ms, packed {milliseconds(fast):.2f} ms")
