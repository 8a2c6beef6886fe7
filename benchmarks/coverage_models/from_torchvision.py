"""Models of torchvision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from autoprune.model.arguments import Arguments
from benchmarks.coverage_models.subject import Subject, of_images

IMAGE, LARGER = (3, 224, 224), (3, 256, 256)
CLIP, LONGER = (3, 16, 112, 112), (3, 24, 112, 112)  # frames of a video


def _model(name: str, size: tuple[int, ...], other: tuple[int, ...] | None, options: Mapping[str, Any]) -> Subject:
    import torchvision

    return of_images(torchvision.models.get_model(name, weights=None, **options), size, other)


def _raft() -> Subject:
    """Two pictures in, a list of flows out."""
    import torchvision

    calls = [
        Arguments(torch.rand(batch, 3, 128, width) * 2 - 1, torch.rand(batch, 3, 128, width) * 2 - 1)
        for batch, width in ((1, 128), (2, 128), (1, 160))
    ]
    return Subject(torchvision.models.get_model("raft_small", weights=None).eval(), *calls)


_SEGMENTATION = {"weights_backbone": None}
_PLAIN: Mapping[str, tuple[tuple[int, ...], tuple[int, ...] | None, Mapping[str, Any]]] = {
    "mnasnet0_5": (IMAGE, LARGER, {}),
    "squeezenet1_0": (IMAGE, LARGER, {}),
    "resnet18": (IMAGE, LARGER, {}),
    "googlenet": (IMAGE, LARGER, {"aux_logits": False, "init_weights": False}),
    "lraspp_mobilenet_v3_large": (IMAGE, LARGER, _SEGMENTATION),
    "deeplabv3_mobilenet_v3_large": (IMAGE, LARGER, _SEGMENTATION),
    "densenet121": (IMAGE, LARGER, {}),
    "convnext_tiny": (IMAGE, LARGER, {}),
    "efficientnet_v2_s": (IMAGE, LARGER, {}),
    "swin_v2_t": (LARGER, IMAGE, {}),
    "vit_b_16": (IMAGE, None, {}),
    "fcn_resnet50": (IMAGE, LARGER, _SEGMENTATION),
    "swin3d_t": (CLIP, LONGER, {}),
    "mvit_v1_b": ((3, 16, 224, 224), None, {}),
}
MODELS: Mapping[str, Callable[[], Subject]] = {
    **{name: partial(_model, name, *about) for name, about in _PLAIN.items()},
    "raft_small": _raft,
}
