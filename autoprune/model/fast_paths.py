"""torch's transformer modules without the fused operators that hide their layers, and with the same results.

Outside training and without gradients, `nn.TransformerEncoder`, `nn.TransformerEncoderLayer` and
`nn.MultiheadAttention` run fused operators, which read the weights of Linear layers themselves: a packed layer in the
place of one would never run. torch's plain path calls the layers, but its results differ where something is masked:

- an encoder given a padding mask computes on nested tensors, and gives zeros at the padded positions;
- a layer takes every number but 0 in a mask for "masked", while the plain path adds the numbers to its scores;
- a position that may attend to nothing is NaN, while the plain path gives it a sum of nothing.

So the plain path is taken, and hooks give it the masks and the zeros of the fused one.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_STACKS = (nn.TransformerEncoder.forward, nn.TransformerDecoder.forward)


def unfuse_(model: nn.Module) -> nn.Module:
    """Makes torch's transformer modules call their own layers; the model still gives what its user sees."""
    fused = torch.backends.mha.get_fastpath_enabled()
    modules = list(model.modules())
    done: set[nn.Module] = set()
    for stack in modules:
        if isinstance(stack, (nn.TransformerEncoder, nn.TransformerDecoder)) and type(stack).forward in _STACKS:
            _before(stack, _do_not_guess)
        if isinstance(stack, nn.TransformerEncoder):
            if fused and stack.use_nested_tensor and all(map(_fuses_layer, stack.layers)):
                masks, ends = ("mask", "src_key_padding_mask"), not stack.mask_check
                _before(stack, _cut_scores, masks=masks, heads=stack.layers[0].self_attn.num_heads, ends=ends)
                stack.layers[-1].register_forward_hook(_pad_with_zeros, with_kwargs=True)
                done.update(stack.layers)
            stack.use_nested_tensor = False
    for layer in modules:
        if isinstance(layer, nn.TransformerEncoderLayer):
            if fused and layer not in done and _fuses_layer(layer):
                masks = ("src_mask", "src_key_padding_mask")
                _before(layer, _cut_scores, masks=masks, heads=layer.self_attn.num_heads)
            layer.activation_relu_or_gelu = 0
    for attention in modules:
        if isinstance(attention, nn.MultiheadAttention) and fused and _fuses_attention(attention):
            _before(attention, _cut_scores, masks=("attn_mask", "key_padding_mask"), heads=attention.num_heads)
    return model


def _before(module: nn.Module, hook: Any, **settings: Any) -> None:
    """Registers a hook, once; a copy of a copy has it already."""
    if not any(isinstance(there, partial) and there.func is hook for there in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(partial(hook, **settings), with_kwargs=True)


def _fuses_layer(layer: nn.Module) -> bool:
    """Whether torch would run a layer fused, as far as that is known before it is called."""
    if (
        not isinstance(layer, nn.TransformerEncoderLayer)
        or type(layer).forward is not nn.TransformerEncoderLayer.forward
    ):
        return False
    attention = layer.self_attn
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules())
    fits = attention.batch_first and attention._qkv_same_embed_dim and attention.in_proj_bias is not None
    even = attention.num_heads % 2 == 0 and layer.norm1.eps == layer.norm2.eps
    return bool(fits and even and layer.activation_relu_or_gelu and not hooked)


def _fuses_attention(attention: nn.MultiheadAttention) -> bool:
    own = type(attention).forward is nn.MultiheadAttention.forward
    plain = attention.bias_k is None and attention.bias_v is None and not attention.add_zero_attn
    fits = attention.batch_first and attention._qkv_same_embed_dim and attention.in_proj_bias is not None
    return bool(own and plain and fits and attention.num_heads % 2 == 0)


def _fused_now(module: nn.Module, x: Tensor) -> bool:
    """Whether torch would run a module of these fused in this call."""
    learns = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))
    return not (module.training or learns or x.dim() != 3 or torch.is_autocast_enabled("cpu"))


def _cut_scores(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    masks: tuple[str, str],
    heads: int,
    ends: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a forward: its masks as what is added to the scores, where torch would run it fused.

    `masks` names the parameters: of what each position attends to, and of what is padding. With `ends`, torch takes
    padding for the end of a sample without a look at where it is.
    """
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    x, *_ = given.values()
    attended, padded = (given.get(name) for name in masks)
    if (attended is None and padded is None) or not _fused_now(module, x):
        return None
    if isinstance(module, nn.MultiheadAttention):
        floats = any(mask is not None and mask.is_floating_point() for mask in (attended, padded))
        if floats or x is not given["key"] or x is not given["value"]:
            return None
    scores: list[Tensor | None] = [None, None]
    attended, padded = _masked(attended), _masked(padded)
    if attended is not None and padded is not None:
        each = attended.view(-1, heads, *attended.shape[-2:]) if attended.dim() == 3 else attended
        both = torch.logical_or(each, padded[:, None, None]).expand(-1, heads, -1, -1)
        scores[0] = _scores(both, x.dtype).flatten(0, 1)
        given["is_causal"] = False  # a hint that the mask is nothing but causal
    elif attended is not None:
        scores[0] = _scores(attended, x.dtype)
    elif padded is not None:
        if ends:
            padded = torch.arange(x.shape[1], device=x.device) >= torch.logical_not(padded).sum(1, keepdim=True)
        scores[1] = _scores(padded, x.dtype)
    given |= zip(masks, scores, strict=True)
    return (), given


def _do_not_guess(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a forward: keeps torch from comparing the mask with a causal one, which no capture could hold.

    Nothing but the choice of a kernel hangs on it.
    """
    given = inspect.signature(module.forward).bind(*args, **kwargs)
    given.apply_defaults()
    hint = "is_causal" if isinstance(module, nn.TransformerEncoder) else "tgt_is_causal"
    return (), given.arguments | {hint: given.arguments[hint] or False}


def _masked(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dtype == torch.bool else mask != 0


def _scores(masked: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where masked, and NaN where a position is left nothing to attend to."""
    scores = torch.zeros(masked.shape, dtype=dtype, device=masked.device).masked_fill(masked, float("-inf"))
    attends = torch.logical_not(masked).any(-1, keepdim=True)
    return scores.masked_fill(torch.logical_not(attends), float("nan"))


def _pad_with_zeros(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """After the last layer of an encoder: zeros at padded positions, as nested tensors give them.

    A batch one of whose samples has padding before its end is computed without nested tensors.
    """
    scores = kwargs.get("src_key_padding_mask")
    if scores is None or not _fused_now(layer, output):
        return output
    padded = scores != 0
    inside = torch.logical_and(padded[:, :-1], torch.logical_not(padded[:, 1:])).any()
    return output.masked_fill(torch.logical_and(padded, torch.logical_not(inside))[..., None], 0.0)
