"""A module with the sizes and weights that are left, to see whether it gives what the pruned graph gives."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ....errors import EnginesmithError, SourceError
from ...difference import worst_relative_l2
from ...graph import Graph
from ...graph.probe import run
from ...signature import Signature
from ...sources.flat import FlatModule, flat_module
from ...sources.guard import first_line, foreign, quiet
from ...sources.reference import to_array
from .calls import arguments

RELATIVE_L2 = 1e-4
"""How far outputs may be apart: sums are rounded in another order, and divided and multiplied by folded factors."""


def rebuilt(module: torch.nn.Module, mapping: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A copy of the user's module with the sizes of a mapping and the tensors of a state_dict."""
    whole = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    copied = copy.deepcopy(module, whole)  # shares what will be replaced
    for name, told in mapping["modules"].items():
        part = copied.get_submodule(name)
        for size, values in told["sizes"].items():
            after = values["after"]
            setattr(part, size, tuple(after) if isinstance(after, list) else after)
    for key, tensor in state.items():
        owner, _, name = key.rpartition(".")
        part = copied.get_submodule(owner)
        buffer = name in part._buffers
        setattr(part, name, tensor if buffer else torch.nn.Parameter(tensor, requires_grad=False))
    return copied


def difference(
    flat: FlatModule, module: torch.nn.Module, graph: Graph, signature: Signature, sample: Mapping[str, np.ndarray]
) -> float | str:
    """Relative L2 between the outputs of a rebuilt module and those of the graph.

    Returns why it does not run, where the user's code holds sizes that no mapping reaches.
    """
    wrapped = flat_module(module, flat.arrangement, flat.input_names)
    try:
        with torch.no_grad(), quiet(), foreign(lambda error: SourceError(first_line(error))):
            outputs = wrapped.named(*arguments(wrapped, signature, sample))[0]
    except EnginesmithError as error:
        return error.message
    return worst_relative_l2({name: to_array(y) for name, y in outputs.items()}, run(graph, sample))
