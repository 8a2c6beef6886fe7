"""Models of transformers, small: four layers of width 256 where they have a say in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.model.arguments import Arguments
from benchmarks.coverage_models.subject import Subject, of_images, of_tokens

VOCABULARY, TOKENS, FEWER = 1000, 64, 48
PAST, LONGER_PAST = 16, 24  # tokens that a decoder remembers
LAYERS, WIDTH, HEADS, INNER = 4, 256, 4, 1024
_LAYERS = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": HEADS}
_PLAIN = {**_LAYERS, "intermediate_size": INNER}
_ENCODER = {**_PLAIN, "vocab_size": VOCABULARY}
_KEYS = {"num_key_value_heads": HEADS, "pad_token_id": 0}
_PATCHES = {**_PLAIN, "image_size": 224, "patch_size": 16}
_SPEECH = {
    "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER,
    "vocab_size": VOCABULARY, "max_source_positions": 200, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip


def _made(name: str, config: str, options: Mapping[str, Any]) -> Any:
    import transformers

    return getattr(transformers, name)(getattr(transformers, config)(**options))


def _with_mask(ids: Tensor) -> Arguments:
    """What a tokenizer gives: ``model(**batch)``."""
    return Arguments(input_ids=ids, attention_mask=torch.ones_like(ids))


def _text(name: str, config: str, options: Mapping[str, Any]) -> Subject:
    return of_tokens(_made(name, config, options), VOCABULARY, TOKENS, FEWER, _with_mask)


def _named(name: str, made: nn.Module, sizes: Iterable[tuple[int, ...]]) -> Subject:
    """A model of one tensor that is given by name: the sizes of `Subject`, batch included."""
    calls = [Arguments(**{name: torch.randn(size)}) for size in sizes]
    return Subject(made.eval(), calls[0], calls[1], calls[2] if len(calls) > 2 else None)


def _pixels(name: str, config: str, options: Mapping[str, Any], other: int | None = None) -> Subject:
    sizes = [(1, 3, 224, 224), (2, 3, 224, 224), *([(1, 3, other, other)] if other else [])]
    return _named("pixel_values", _made(name, config, options), sizes)


def _spectrogram() -> Subject:
    made = _made("ASTForAudioClassification", "ASTConfig", {**_PLAIN, "max_length": 256, "num_mel_bins": 64})
    return _named("input_values", made, [(1, 256, 64), (2, 256, 64)])


def _wav2vec2() -> Subject:
    made = _made("Wav2Vec2ForCTC", "Wav2Vec2Config", {**_PLAIN, "vocab_size": 32, "num_conv_pos_embedding_groups": 4})
    return _named("input_values", made, [(1, 16000), (2, 16000), (1, 12000)])


def _whisper_encoder() -> Subject:
    made = _made("WhisperModel", "WhisperConfig", _SPEECH).get_encoder()
    return of_images(made, (80, 400), None)


def _whisper() -> Subject:
    def call(batch: int, tokens: int) -> Arguments:
        ids = torch.randint(3, VOCABULARY, (batch, tokens))
        return Arguments(input_features=torch.randn(batch, 80, 400), decoder_input_ids=ids)

    made = _made("WhisperForConditionalGeneration", "WhisperConfig", _SPEECH)
    return Subject(made.eval(), call(1, 8), call(2, 8), call(1, 12))


def _clip() -> Subject:
    import transformers

    text = {**_ENCODER, "max_position_embeddings": 77, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=_PATCHES)

    def call(batch: int, tokens: int) -> Arguments:
        given = _with_mask(torch.randint(3, VOCABULARY, (batch, tokens)))
        return Arguments(**given.kwargs, pixel_values=torch.randn(batch, 3, 224, 224))

    return Subject(transformers.CLIPModel(config).eval(), call(1, 16), call(2, 16), call(1, 12))


def _detr() -> Subject:
    options = {
        "use_timm_backbone": False, "use_pretrained_backbone": False, "d_model": WIDTH, "encoder_layers": 2,
        "decoder_layers": 2, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER, "num_queries": 20,
        "backbone_config": {
            "model_type": "resnet", "depths": [2, 2, 2, 2], "layer_type": "basic", "hidden_sizes": [64, 128, 256, 512],
            "out_features": ["stage4"],
        },
        "backbone": None,
    }  # fmt: skip
    return _pixels("DetrForObjectDetection", "DetrConfig", options, other=256)


def _patchtst() -> Subject:
    options = {
        "num_input_channels": 7, "context_length": 256, "patch_length": 16, "patch_stride": 16, "d_model": WIDTH,
        "num_hidden_layers": 2, "num_attention_heads": HEADS, "ffn_dim": INNER, "prediction_length": 24,
    }  # fmt: skip
    made = _made("PatchTSTForPrediction", "PatchTSTConfig", options)
    return _named("past_values", made, [(1, 256, 7), (2, 256, 7)])


class Step(nn.Module):
    """One step of a decoder: new tokens, and the keys and values of earlier ones as tensors."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, input_ids: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Token numbers ``(batch, new)``, keys and values ``(batch, heads, past, width)`` of every layer."""
        import transformers

        cache = transformers.DynamicCache()
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            cache.update(key, value, layer)
        output = self.decoder(input_ids=input_ids, past_key_values=cache, use_cache=True)
        layers = output.past_key_values.layers
        return output.logits, [layer.keys for layer in layers], [layer.values for layer in layers]


def _step(name: str, config: str, options: Mapping[str, Any]) -> Subject:
    def call(batch: int, past: int) -> Arguments:
        size = (batch, HEADS, past, WIDTH // HEADS)
        keys, values = ([torch.randn(size) for _ in range(LAYERS)] for _ in range(2))
        return Arguments(torch.randint(VOCABULARY, (batch, 1)), keys, values)

    return Subject(Step(_made(name, config, options)).eval(), call(1, PAST), call(2, PAST), call(1, LONGER_PAST))


_GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
_LLAMA = {**_ENCODER, **_KEYS}
_BERT_DECODER = {**_ENCODER, "is_decoder": True}
_EXPERTS = {**_LLAMA, "num_hidden_layers": 2}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": WIDTH // HEADS,
    "d_ff": INNER,
    "num_layers": 3,
    "num_heads": HEADS,
}
_TEXT: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", _ENCODER),
    "distilbert": (
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INNER},
    ),
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig", _ENCODER),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification", "DebertaV2Config",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 32},
    ),
    "t5_encoder": ("T5EncoderModel", "T5Config", _T5),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _LLAMA),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_LLAMA, "head_dim": 64}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _ENCODER),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**_LAYERS, "vocab_size": VOCABULARY}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_EXPERTS, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
        {**_EXPERTS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 512,
         "shared_expert_intermediate_size": 512},
    ),
    "mamba2": (
        "Mamba2ForCausalLM", "Mamba2Config",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 64,
         "n_groups": 1, "chunk_size": 32},
    ),
    "rwkv": (
        "RwkvForCausalLM", "RwkvConfig",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "attention_hidden_size": WIDTH, "num_hidden_layers": 2},
    ),
}  # fmt: skip
_STEPS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "bert_step": ("BertLMHeadModel", "BertConfig", _BERT_DECODER),
    "gpt2_step": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "llama_step": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
}
_VISION: Mapping[str, tuple[str, str, Mapping[str, Any], int | None]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", _PATCHES, None),
    "clip_vision": ("CLIPVisionModel", "CLIPVisionConfig", _PATCHES, None),
    "yolos": (
        "YolosForObjectDetection", "YolosConfig", {**_PATCHES, "image_size": [224, 224], "num_detection_tokens": 20},
        None,
    ),
    "mobilevit": ("MobileViTForImageClassification", "MobileViTConfig", {}, 256),
    "resnet": (
        "ResNetForImageClassification", "ResNetConfig",
        {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}, 256,
    ),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", {}, 256),
    "swin": (
        "SwinForImageClassification", "SwinConfig",
        {"image_size": 224, "embed_dim": 48, "depths": [2, 2, 2], "num_heads": [2, 4, 8]}, None,
    ),
}  # fmt: skip
MODELS: Mapping[str, Callable[[], Subject]] = {
    **{name: partial(_text, *about) for name, about in _TEXT.items()},
    **{name: partial(_step, *about) for name, about in _STEPS.items()},
    **{name: partial(_pixels, *about) for name, about in _VISION.items()},
    "ast": _spectrogram,
    "wav2vec2": _wav2vec2,
    "whisper_encoder": _whisper_encoder,
    "whisper": _whisper,
    "clip": _clip,
    "detr": _detr,
    "patchtst": _patchtst,
}
