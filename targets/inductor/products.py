"""Products of calls with one new token a row, fused with what stands around them.

y = activation(norm(x) weight^T + bias) + residual        one kernel
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import torch

from .norms import Norm, norm_of
from .operators import ACTIVATIONS, operators
from .writes import stays

_GELU_TANH = ("NewGELUActivation", "FastGELUActivation", "GELUTanh", "PytorchGELUTanh")
"""Classes of transformers that compute GELU by tanh, in several operators."""

_fusing: contextvars.ContextVar[bool] = contextvars.ContextVar("enginesmith-products", default=False)


@contextlib.contextmanager
def fusing(whether: bool) -> Iterator[None]:
    """Within it products are traced as the operator that `fuse` puts more into, or not."""
    token = _fusing.set(whether)
    try:
        yield
    finally:
        _fusing.reset(token)


class Product(torch.nn.Module):
    """A linear layer, traced as one operator where that has the faster kernel.

    Args:
        weight: (n, k).
        bias: (n), or None.
    """

    def __init__(self, weight: torch.nn.Parameter, bias: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., n) for x (..., k)."""
        one_row = isinstance(x.shape[0], int) and x.numel() == x.shape[-1]
        if _fusing.get() and (one_row or x.dtype is not torch.float32):  # Tensor Cores round float32
            made: torch.Tensor = operators().product(x, self.weight, self.bias, None, None, None, 0.0, 0)
            return made
        return torch.nn.functional.linear(x, self.weight, self.bias)


def replace(module: torch.nn.Module) -> None:
    """Puts a `Product` in the place of each linear layer, torch's and transformers', and one operator for each GELU."""
    for name, part in module.named_children():
        made: torch.nn.Module | None = None
        held: Any = part
        if part._forward_hooks or part._forward_pre_hooks_with_kwargs:  # which may take or change more than one tensor
            pass
        elif type(part) is torch.nn.Linear:
            made = Product(held.weight, held.bias)
        elif type(part).__name__ == "Conv1D" and type(part).__module__.startswith("transformers."):
            weight = torch.nn.Parameter(held.weight.detach().T.contiguous(), requires_grad=False)
            made = Product(weight, held.bias)
        elif type(part).__name__ in _GELU_TANH:
            made = torch.nn.GELU(approximate="tanh")
        if made is None:
            replace(part)
            continue
        made._forward_pre_hooks = part._forward_pre_hooks
        setattr(module, name, made)


def fuse(graph: torch.fx.Graph, *, norms: bool) -> None:
    """Moves norms, activations and sums around products into them.

    Args:
        norms: whether a norm before a product is: for one row, of which each part of a kernel finds it by itself.
    """
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target is aten.dropout.default and not node.args[2]:
            _replace(graph, node, node.args[0])
        elif node.target is aten._assert_tensor_metadata.default:  # of casts, which read what would be moved
            graph.erase_node(node)
    for node in list(graph.nodes):
        if norms and node.users and (norm := norm_of(node)):
            _before(node, norm)
        elif activation := _activation(node):
            _behind(graph, node, node.args[0], activation=ACTIVATIONS.index(activation))
        elif node.target is aten.add.Tensor and not node.kwargs:
            for one, other in (node.args, node.args[::-1]):
                if _same(node, other) and _behind(graph, node, one, residual=other):
                    break
    graph.eliminate_dead_code()


def _before(node: torch.fx.Node, norm: Norm) -> None:
    """Takes a norm into the products behind it, where nothing else reads it."""
    if not all(_is_product(user) and user.args[0] is node and node not in user.args[1:] for user in node.users):
        return
    if not all(stays((norm.x, norm.weight, norm.bias), norm.first, user) for user in node.users):
        return
    for user in list(node.users):
        user.args = (norm.x, *user.args[1:4], norm.weight, norm.bias, norm.eps, user.args[7])


def _behind(
    graph: torch.fx.Graph, node: torch.fx.Node, product: Any, *, activation: int = 0, residual: Any = None
) -> bool:
    """Takes what a node computes into the product before it, where nothing else reads that."""
    if not _is_product(product) or len(product.users) != 1 or product.args[3] is not None or residual is product:
        return False
    if (activation and product.args[7]) or not stays(product.args, product, node):
        return False
    arguments = (*product.args[:3], residual, *product.args[4:7], activation or product.args[7])
    with graph.inserting_before(node):
        made = graph.call_function(product.target, arguments)
    made.meta = dict(node.meta)
    if not _replace(graph, node, made):
        graph.erase_node(made)
        return False
    graph.erase_node(product)
    return True


def _activation(node: torch.fx.Node) -> str:
    """The one that a node computes; empty where it computes none."""
    aten = torch.ops.aten
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return "relu" if node.target is aten.relu.default else "silu" if node.target is aten.silu.default else ""


def _replace(graph: torch.fx.Graph, node: torch.fx.Node, by: Any) -> bool:
    """Puts a node in the place of another, unless that is an output, which goes by its name."""
    if any(user.op == "output" for user in node.users):
        return False
    node.replace_all_uses_with(by)
    graph.erase_node(node)
    return True


def _is_product(node: Any) -> bool:
    return isinstance(node, torch.fx.Node) and node.target is operators().product.default


def _same(node: torch.fx.Node, other: Any) -> bool:
    """Whether a tensor has the shape and dtype of a sum, so that it is no bias."""
    if not isinstance(other, torch.fx.Node):
        return False
    found, wanted = other.meta.get("val"), node.meta.get("val")
    return (
        isinstance(found, torch.Tensor)
        and isinstance(wanted, torch.Tensor)
        and found.shape == wanted.shape
        and found.dtype == wanted.dtype
    )
