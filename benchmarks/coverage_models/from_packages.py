"""Models of other packages of PyPI: segmentation, sequences, graphs, text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from autoprune.model.arguments import Arguments
from benchmarks.coverage_models.subject import Subject, of_images, of_tokens

IMAGE, LARGER = (3, 224, 224), (3, 256, 256)


def _segmentation(architecture: str, encoder: str) -> Subject:
    import segmentation_models_pytorch

    made = segmentation_models_pytorch.create_model(architecture, encoder, encoder_weights=None, classes=5)
    return of_images(made, IMAGE, LARGER)


def _efficientnet() -> Subject:
    from efficientnet_pytorch import EfficientNet

    return of_images(EfficientNet.from_name("efficientnet-b0"), IMAGE, LARGER)


def _conformer() -> Subject:
    from conformer import Conformer

    return of_images(Conformer(dim=256, depth=3, dim_head=32, heads=8), (64, 256), (80, 256))


def _cct() -> Subject:
    from vit_pytorch.cct import CCT

    made = CCT(
        img_size=(96, 96), embedding_dim=256, n_conv_layers=1, kernel_size=7, stride=2, padding=3,
        pooling_kernel_size=3, pooling_stride=2, pooling_padding=1, num_layers=4, num_heads=4, mlp_ratio=2.0,
        num_classes=10, positional_embedding="learnable",
    )  # fmt: skip
    return of_images(made, (3, 96, 96), None)


def _x_transformers() -> Subject:
    from x_transformers import Encoder, TransformerWrapper

    made = TransformerWrapper(num_tokens=1000, max_seq_len=256, attn_layers=Encoder(dim=256, depth=4, heads=4))
    return of_tokens(made, 1000, 64, 48, Arguments)


def _open_clip() -> Subject:
    import open_clip

    made = open_clip.create_model("ViT-B-32", pretrained=None)
    calls = [Arguments(torch.randn(batch, *IMAGE), torch.randint(1, 49407, (batch, 77))) for batch in (1, 2)]
    return Subject(made.eval(), calls[0], calls[1], None)


def _tcn() -> Subject:
    from pytorch_tcn import TCN

    return of_images(TCN(num_inputs=32, num_channels=[64] * 5), (32, 128), (32, 160))


def _gcn() -> Subject:
    from torch_geometric.nn.models import GCN

    calls = [Arguments(torch.randn(nodes, 64), torch.randint(nodes, (2, 4 * nodes))) for nodes in (200, 250)]
    return Subject(GCN(64, 128, 3, 16).eval(), calls[0], None, calls[1])


MODELS: Mapping[str, Callable[[], Subject]] = {
    "pytorch_tcn": _tcn,
    "pyg_gcn": _gcn,
    "vitpt_cct": _cct,
    "x_transformers": _x_transformers,
    "conformer": _conformer,
    "smp_fpn": partial(_segmentation, "fpn", "resnet18"),
    "smp_segformer_mit": partial(_segmentation, "segformer", "mit_b0"),
    "smp_unetpp_mobilenet": partial(_segmentation, "unetplusplus", "mobilenet_v2"),
    "efficientnet_pytorch": _efficientnet,
    "open_clip": _open_clip,
}
