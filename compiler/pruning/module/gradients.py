"""Weights times their gradients, from the torch module, for the first-order importance of what would be removed.

Without labels the loss of a batch is L = sum(v y) over all outputs y, with v drawn from N(0, 1). Setting weights w to
zero changes L by sum(w dL/dw) in first order, and the mean over v of its square is the squared first-order change of
the outputs themselves. Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", square batch by
batch and average with the loss of training in the place of L.

Weights that a BatchNorm was folded into have the same w dL/dw: what scales one divides the other. Biases count among
the weights; those of normalizations behind do not, for what they scale is there already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch

from ....errors import RecipeError
from ...graph import Graph
from ...quantization.layers import constant, operand
from ...signature import Signature
from ...sources.flat import FlatModule
from ...sources.guard import first_line, foreign, quiet
from .calls import arguments, watch
from .matching import match
from .parameters import Match, Parameters

_SCALES = frozenset(("BatchNormalization", "LayerNormalization", "Mul", "RMSNormalization"))
"""What multiplies a position: its product is that of the weights before it once more."""


def gradients(
    graph: Graph,
    module: FlatModule,
    signature: Signature,
    samples: Iterable[Mapping[str, np.ndarray]],
    *,
    seed: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields, for each batch, weights times gradients by the name of the initializer, in its layout.

    Args:
        graph: flat, captured from the module.
        seed: of v.

    Raises:
        RecipeError: the module cannot be differentiated.
    """
    parameters = dict(module.model.named_parameters(remove_duplicate=False))
    generator = torch.Generator().manual_seed(seed)
    tensors = list({id(parameter): parameter for parameter in parameters.values()}.values())
    found: Parameters | None = None
    for sample in samples:
        found = found or match(graph, module.model, watch(module, signature, sample))
        slopes = dict(zip(map(id, tensors), _backward(module, tensors, signature, sample, generator), strict=True))
        own = {
            key: (parameter.detach() * slope).float().cpu().numpy()
            for key, parameter in parameters.items()
            if (slope := slopes[id(parameter)]) is not None
        }
        products: dict[str, np.ndarray] = {}
        for one in found.weights:
            if one.key in own and one.node.op_type not in _SCALES:
                _add(products, one, own[one.key])
        for folded in found.layers:
            slope = slopes[id(parameters[f"{folded.norm}.bias"])] if f"{folded.norm}.bias" in parameters else None
            if slope is not None and folded.bias is not None:  # beta and the folded bias have the same gradient
                value = operand(*folded.bias)
                products[value.name or ""] = constant(value) * slope.float().cpu().numpy()
            elif folded.bias is not None and f"{folded.name}.bias" in own and folded.weight.span is None:
                last = constant(operand(*folded.bias)).ndim - 1
                _add(products, Match(f"{folded.name}.bias", *folded.bias, (last,)), own[f"{folded.name}.bias"])
        for layer in found.recurrent:
            for index, array in layer.stacked(own).items():
                products[operand(layer.node, index).name or ""] = array
        yield products


def unused(module: FlatModule, keys: Iterable[str], signature: Signature, sample: Mapping[str, np.ndarray]) -> set[str]:
    """Of tensors of the state_dict, those that no output depends on: parameters, and buffers beside only such ones."""
    parameters = dict(module.model.named_parameters(remove_duplicate=False))
    tensors = list({id(parameter): parameter for parameter in parameters.values()}.values())
    try:
        slopes = _backward(module, tensors, signature, sample, torch.Generator())
    except RecipeError:  # what cannot be differentiated may depend on anything
        return set()
    idle = {id(tensor) for tensor, slope in zip(tensors, slopes, strict=True) if slope is None}
    beside: dict[str, list[bool]] = {}
    for key, parameter in parameters.items():
        beside.setdefault(key.rpartition(".")[0], []).append(id(parameter) in idle)
    owners = {name for name, own in beside.items() if all(own)}
    return {
        key for key in keys if (id(parameters[key]) in idle if key in parameters else key.rpartition(".")[0] in owners)
    }


def _backward(
    module: FlatModule,
    tensors: list[torch.nn.Parameter],
    signature: Signature,
    sample: Mapping[str, np.ndarray],
    generator: torch.Generator,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of sum(v y); None of a parameter that the outputs do not depend on."""
    with (
        _differentiable(tensors),
        quiet(),
        foreign(lambda error: _refused(first_line(error))),
        torch.backends.cudnn.flags(enabled=False),
    ):
        outputs = [y for y in module(*arguments(module, signature, sample)) if y.requires_grad]
        if not outputs:
            raise _refused("no output depends on a weight: forward runs under no_grad, or detaches")
        loss = sum((y * torch.randn(y.shape, generator=generator).to(y)).sum() for y in outputs)
        return torch.autograd.grad(loss, tensors, allow_unused=True)


@contextlib.contextmanager
def _differentiable(tensors: list[torch.nn.Parameter]) -> Iterator[None]:
    """Lets parameters have gradients, those too that the user froze."""
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    try:
        for tensor in frozen:
            tensor.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)


def _add(products: dict[str, np.ndarray], one: Match, product: np.ndarray) -> None:
    """Adds to what the constant has so far: equal weights are one constant, those of one input may be side by side."""
    value = operand(one.node, one.index)
    shape = constant(value).shape
    whole = products.setdefault(value.name or "", np.zeros(shape, np.float32))
    if one.span is not None:
        axis, start, stop = one.span
        whole = whole.swapaxes(0, axis)[start:stop].swapaxes(0, axis)
    whole += one.constant_layout(product if one.rows is None else product[slice(*one.rows)], len(shape))


def _refused(found: str) -> RecipeError:
    return RecipeError(
        "importance=taylor needs gradients, and the torch module gives none",
        expected="a forward pass that autograd can follow",
        found=found,
        hint="choose importance=obs",
    )
