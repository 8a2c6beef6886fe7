"""Models of timm, each at the image size it was made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from benchmarks.coverage_models.subject import Subject, of_images

LARGER = 32  # pixels a side


def _model(name: str) -> Subject:
    import timm

    model = timm.create_model(name, pretrained=False)
    channels, height, width = model.pretrained_cfg["input_size"]
    return of_images(model, (channels, height, width), (channels, height + LARGER, width + LARGER))


_NAMES = (
    *("lcnet_050", "tinynet_e", "mobilenetv4_conv_small", "ghostnet_050", "repghostnet_050", "mobilevit_xxs"),
    *("dla46_c", "inception_next_atto", "edgenext_xx_small", "efficientvit_m0", "cpubone_nano", "shvit_s1"),
    *("starnet_s1", "fastvit_t8", "hgnetv2_b0", "nf_regnet_b0", "cs3darknet_s", "hrnet_w18_small", "resnetv2_18"),
    *("poolformer_s12", "xcit_nano_12_p16_224", "efficientformerv2_s0", "efficientvim_m1", "lowformer_b0"),
    *("vit_tiny_r_s16_p8_224", "eva02_tiny_patch14_224", "cait_xxs24_224", "mixer_s16_224", "gcvit_xxtiny"),
    *("coatnet_pico_rw_224", "halonet26t", "resnest14d", "selecsls42", "res2net50_14w_8s", "tresnet_m"),
    *("legacy_xception", "nest_tiny", "rdnet_tiny", "davit_tiny", "swin_tiny_patch4_window7_224"),
    *("swinv2_tiny_window8_256", "vit_relpos_small_patch16_224", "volo_d1_224", "vgg11_bn", "convmixer_768_32"),
    "beit_base_patch16_224",
)
MODELS: Mapping[str, Callable[[], Subject]] = {name: partial(_model, name) for name in _NAMES}
