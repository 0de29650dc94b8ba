"""Which models are loaded with their cache: what `load_model` does with modules and folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ....errors import RecipeError
from ...options import build
from ...signature import Signature
from .. import Model, module
from ..weights import load_weights, read_weights
from . import causal
from .declared import with_states
from .detect import is_causal, require_transformers
from .options import DecoderOptions


def load_module(
    made: torch.nn.Module,
    weights: Path | None,
    inputs: Signature | None,
    constants: Mapping[str, Any],
    sample: Mapping[str, np.ndarray] | None,
    device: str,
    identity: str,
    decoding: Mapping[str, Any],
) -> Model:
    """A module: with its cache where it is a causal language model whose inputs are not declared."""
    if (inputs is None or not inputs.inputs) and is_causal(made):
        if weights is not None:
            load_weights(made, read_weights(weights), weights)
        return causal.load(made, _options(decoding), device=device, identity=identity, folder=None)
    loaded = module.load(
        made, weights=weights, inputs=inputs, constants=constants, sample=sample, device=device, identity=identity
    )
    return with_states(loaded) if decoding else loaded


def load_folder(
    path: Path,
    inputs: Signature | None,
    dynamic: Sequence[str],
    constants: Mapping[str, Any],
    device: str,
    decoding: Mapping[str, Any],
) -> Model:
    """A folder of transformers."""
    if inputs is not None or dynamic or constants:
        raise RecipeError(
            f"{path.name} takes no inputs, dynamic axes and arguments: its cache decides them",
            expected="--decoder max_length=1024 --decoder batch=8 --decoder speculative_tokens=4",
            hint="to compile it without its cache, write a factory that loads it, and declare its inputs",
        )
    require_transformers(path)
    return causal.load(causal.open_folder(path), _options(decoding), device=device, identity="folder", folder=path)


def _options(decoding: Mapping[str, Any]) -> DecoderOptions:
    return build(DecoderOptions, decoding, "decoder")
