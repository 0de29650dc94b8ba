"""Attention with linear biases (ALiBi; Press, Smith, Lewis 2022) over static caches, of BLOOM and MPT.

    scores = scale * q k^T + mask + slope * position of the key        one slope for each head

That is slope * (position of the key - position of the query) up to a number for each query, which Softmax does not see.
A key stands in its cache at its position, so the bias is right for keys of earlier calls too; a cache that drops tokens
would have to keep their positions.

These models do not call transformers' AttentionInterface: their layers are given a forward of ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .attention import attend


def is_biased(model: torch.nn.Module) -> bool:
    """Whether it is one of these models."""
    return any(type(part).__name__ in _LAYERS for part in model.modules())


def replace(own: Any) -> None:
    """Lets a model attend over static caches; its weights stay where they are."""
    device = next(own.parameters()).device
    for part in own.modules():
        kind = type(part).__name__
        if kind == "BloomModel":
            two = part.build_alibi_tensor(torch.ones(1, 2, device=device), part.num_heads, torch.float32)
            part.build_alibi_tensor = functools.partial(_masked_bias, _slopes(two))
        elif kind == "MptModel":
            two = part.build_mpt_alibi_tensor(part.num_heads, 2, device=device)
            part.build_mpt_alibi_tensor = functools.partial(_sized_bias, _slopes(two))
        elif kind in _LAYERS:
            part.forward = functools.partial(_LAYERS[kind], part)


def _slopes(bias: torch.Tensor) -> torch.Tensor:
    """(heads, 1, 1), of the bias (heads, 1, 2) of a text of two tokens."""
    return bias[:, :, 1:] - bias[:, :, :1]


def _masked_bias(slopes: torch.Tensor, mask: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The bias (heads, 1, keys) of BLOOM, called with the mask (batch, 1, time, keys)."""
    return slopes * torch.arange(mask.shape[-1], device=mask.device)


def _sized_bias(slopes: torch.Tensor, _heads: int, keys: int, **_: Any) -> torch.Tensor:
    """The bias (heads, 1, keys) of MPT, called with the tokens that it was made for."""
    return slopes * torch.arange(keys, device=slopes.device)


def _bloom(
    layer: Any,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    alibi: torch.Tensor,
    attention_mask: torch.Tensor,
    layer_past: Any,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The forward of a BloomAttention."""
    query, key, value = layer._reshape(layer.query_key_value(hidden_states))
    key, value = layer_past.update(key, value, layer.layer_idx)
    result, _weights = attend(layer, query, key, value, attention_mask + alibi, layer.inv_norm_factor)
    return layer.dense(result.flatten(2)) + residual, None


def _mpt(
    layer: Any,
    hidden_states: torch.Tensor,
    position_bias: torch.Tensor,
    past_key_values: Any,
    attention_mask: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The forward of an MptAttention, whose mask is true where a score is not allowed."""
    products = layer.Wqkv(hidden_states)
    if layer.clip_qkv:
        products = products.clamp(min=-layer.clip_qkv, max=layer.clip_qkv)
    heads = (*products.shape[:2], layer.n_heads, layer.head_dim)
    query, key, value = (part.reshape(heads).transpose(1, 2) for part in products.chunk(3, dim=2))
    key, value = past_key_values.update(key, value, layer.layer_idx)
    bias = position_bias[..., : key.shape[2]].masked_fill(attention_mask, -torch.inf)
    result, _weights = attend(layer, query, key, value, bias, layer.softmax_scale)
    return layer.out_proj(result.flatten(2)), None


_LAYERS: Mapping[str, Callable[..., tuple[torch.Tensor, None]]] = {"BloomAttention": _bloom, "MptAttention": _mpt}
