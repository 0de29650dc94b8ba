"""Norms in the graph of an exported program, which a product behind them can compute by itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

_CASTS = (torch.ops.aten.to.dtype, torch.ops.aten.type_as.default)


@dataclasses.dataclass(frozen=True)
class Norm:
    """A layer norm over the last axis, or an RMS norm, which has no bias.

    Attributes:
        x: what it is of.
        first: the node that first reads it.
    """

    x: Any
    weight: Any
    bias: Any
    eps: float
    first: torch.fx.Node


def norm_of(node: torch.fx.Node) -> Norm | None:
    """The norm that a node gives, if it does and has a weight."""
    given: list[Any] = [*node.args, None, None, None]
    if node.target is torch.ops.aten.layer_norm.default:
        x, shape, weight, bias, eps = given[:5]
        fits = len(shape) == 1 and weight is not None and bias is not None
        return Norm(x, weight, bias, 1e-5 if eps is None else eps, node) if fits else None
    if node.target is torch.ops.aten.rms_norm.default:
        x, shape, weight, eps = given[:4]
        return Norm(x, weight, None, eps, node) if len(shape) == 1 and weight is not None and eps is not None else None
    return _written_out(node)


def _written_out(node: torch.fx.Node) -> Norm | None:
    """An RMS norm as models of transformers compute it: weight x / sqrt(mean(x^2) + eps), with casts between."""
    aten = torch.ops.aten
    for weight, normed in _factors(_uncast(node)):
        for inner, scale in _factors(_uncast(normed)):
            added = _arguments(_arguments(scale, aten.rsqrt.default, 1)[0], aten.add.Tensor, 2)
            squares, *how = _arguments(added[0], aten.mean.dim, 3)
            if not isinstance(added[1], float) or how != [[-1], True]:
                continue
            x = inner.args[0] if isinstance(inner, torch.fx.Node) and inner.target in _CASTS else inner
            if _arguments(squares, aten.pow.Tensor_Scalar, 2) != (inner, 2) or not _fits(node, x, weight):
                continue
            return Norm(x, weight, None, added[1], squares if inner is x else inner)
    return None


def _factors(node: Any) -> tuple[tuple[Any, Any], ...]:
    """Both orders of what a node multiplies."""
    factors = _arguments(node, torch.ops.aten.mul.Tensor, 2)
    return () if factors[0] is None else (factors, factors[::-1])


def _arguments(node: Any, target: Any, count: int) -> tuple[Any, ...]:
    """Those of a call of an operator with so many; as many times None where it is another one."""
    found = isinstance(node, torch.fx.Node) and node.target is target and len(node.args) == count and not node.kwargs
    return node.args if found else (None,) * count


def _uncast(node: Any) -> Any:
    """What a tensor was before casts."""
    while isinstance(node, torch.fx.Node) and node.target in _CASTS:
        node = node.args[0]
    return node


def _fits(node: torch.fx.Node, x: Any, weight: Any) -> bool:
    """Whether a norm has the shape and dtype of what it is of, and a weight for each of the last axis."""
    found = [value.meta.get("val") if isinstance(value, torch.fx.Node) else None for value in (node, x, weight)]
    made, given, weights = (value if isinstance(value, torch.Tensor) else None for value in found)
    if made is None or given is None or weights is None:
        return False
    return made.dtype == given.dtype and made.shape == given.shape and tuple(weights.shape) == (given.shape[-1],)
