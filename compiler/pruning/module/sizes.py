"""The sizes that torch modules are made with, as the shapes of their tensors tell them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_INSTANCE_NORM = {"num_features": ("weight", 0)}
_BATCH_NORM = {"num_features": ("running_mean", 0)}
_RECURRENT = {"input_size": ("weight_ih_l0", 1), "hidden_size": ("weight_hh_l0", 1)}
_LAYER_NORM = {"normalized_shape": ("weight", 0)}
_CONV = {"in_channels": ("weight", 1), "out_channels": ("weight", 0)}
_CONV_TRANSPOSE = {"in_channels": ("weight", 0), "out_channels": ("weight", 1)}

SIZES: Mapping[str, Mapping[str, tuple[str, int]]] = {
    **dict.fromkeys(("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"), _BATCH_NORM),
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), _CONV),
    **dict.fromkeys(("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"), _CONV_TRANSPOSE),
    "Conv1D": {"nx": ("weight", 0), "nf": ("weight", 1)},  # of transformers, for GPT-2
    "Embedding": {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    "GroupNorm": {"num_channels": ("weight", 0)},
    **dict.fromkeys(("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"), _INSTANCE_NORM),
    **dict.fromkeys(("LayerNorm", "RMSNorm"), _LAYER_NORM),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), _RECURRENT),
    "Linear": {"in_features": ("weight", 1), "out_features": ("weight", 0)},
    "PReLU": {"num_parameters": ("weight", 0)},
}
"""By class, attributes of the module and what tells them: a tensor and its axis."""

_GROUPED = {"Conv": "in_channels", "ConvTranspose": "out_channels"}
"""Sizes of which the weight tells the share of one group."""


def changed_sizes(part: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]], groups: int | None) -> dict[str, Any]:
    """Sizes that changed, as ``{"before", "after"}`` by the name of the attribute.

    Args:
        part: the module, with the sizes that it had.
        shapes: of its own tensors, as they are now.
        groups: of a convolution, as they are now.
    """
    kind = next((base.__name__ for base in type(part).__mro__ if base.__name__ in SIZES), "")
    found: dict[str, Any] = {}
    for name, (tensor, axis) in SIZES.get(kind, {}).items():
        if tensor in shapes:
            share = groups or 1 if _GROUPED.get(kind[:-2]) == name else 1
            found[name] = shapes[tensor][axis] * share
    if "normalized_shape" in found:
        found["normalized_shape"] = list(shapes["weight"])
    if groups is not None and "Conv" in kind:
        found["groups"] = groups
    before = {name: getattr(part, name) for name in found}
    before = {name: list(size) if isinstance(size, tuple) else size for name, size in before.items()}
    return {name: {"before": before[name], "after": size} for name, size in found.items() if size != before[name]}
