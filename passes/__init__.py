"""The passes by name. A pass is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..compiler.extensions import is_own, load_class
from ..compiler.options import build, split
from ..errors import UnknownNameError

if TYPE_CHECKING:
    from .base import Pass

PASSES = {
    "align": "align:Align",
    "cast": "cast:Cast",
    "dedupe": "dedupe:Dedupe",
    "fuse-attention": "fuse_attention:FuseAttention",
    "fuse-embeddings": "fuse_embeddings:FuseEmbeddings",
    "fuse-transformer": "fuse_transformer:FuseTransformer",
    "kv-cache": "kv_cache:KvCache",
    "opset": "opset:Opset",
    "partition": "partition:Partition",
    "pin": "pin:Pin",
    "precision": "precision:Precision",
    "prune": "prune:Prune",
    "quantize-dynamic": "quantize_dynamic:QuantizeDynamic",
    "quantize-static": "quantize_static:QuantizeStatic",
    "quantize-weights": "quantize_weights:QuantizeWeights",
    "simplify": "simplify:Simplify",
    "sparse-attention": "sparse_attention:SparseAttention",
    "sparsify": "sparsify:Sparsify",
}
"""Name of a pass: module in this package and class."""


def parse_pass(text: str) -> Pass:
    """Makes a pass from its text form, for instance ``cast:to=fp16`` or ``my_passes.py:MyPass:option=value``.

    Raises:
        UnknownNameError: no pass or no option of that name.
        RecipeError: an option with a wrong value.
    """
    name, options = split(text)
    if is_own(text):
        from .base import Pass

        own: Pass = build(load_class(name, "pass", Pass, PASSES), options, name)
        return own
    if name not in PASSES:
        raise UnknownNameError("pass", name, PASSES)
    module, _, cls = PASSES[name].partition(":")
    made: Pass = build(getattr(importlib.import_module(f".{module}", __name__), cls), options, name)
    return made
