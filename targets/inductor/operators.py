"""Operators of torch that calls of one new token a row are made of: kernels of Triton on a GPU, torch elsewhere.

    enginesmith::product    y = activation(norm(x) weight^T + bias) + residual
    enginesmith::attend     attention over caches into which it writes the new token
    enginesmith::largest    the largest of each row and its place

TorchInductor compiles their kernels into the engine, which then needs neither this module nor Triton.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

PRODUCT, ATTEND, LARGEST = "enginesmith::product", "enginesmith::attend", "enginesmith::largest"
ACTIVATIONS = ("", "gelu_tanh", "relu", "gelu", "silu")
"""By the number that the operator takes."""


@functools.cache
def operators() -> Any:
    """`torch.ops.enginesmith`, with the operators in it."""
    define = _with_kernels if importlib.util.find_spec("triton") else _without_kernels
    define()
    return torch.ops.enginesmith


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    activation: int,
) -> torch.Tensor:
    """What `enginesmith::product` computes of x (..., k) and weight (n, k), with torch's own operators.

    A norm without a bias is an RMS norm.
    """
    y = torch.nn.functional.linear(normed(x, norm_weight, norm_bias, eps), weight, bias)
    if ACTIVATIONS[activation] == "gelu_tanh":
        y = torch.nn.functional.gelu(y, approximate="tanh")
    elif ACTIVATIONS[activation]:
        y = getattr(torch.nn.functional, ACTIVATIONS[activation])(y)
    return y if residual is None else y + residual


def normed(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The layer norm of x over its last axis; without a bias its RMS norm; without a weight x itself."""
    if weight is None:
        return x
    if bias is None:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    entries: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """What `enginesmith::attend` computes, as `compiler.sources.decoders.writing` tells, with torch's own operators."""
    rows = torch.arange(len(entries), device=entries.device)
    keys[rows, :, entries] = key
    values[rows, :, entries] = value
    heads, length = keys.shape[1:3]
    grouped = query.reshape(query.shape[0], heads, query.shape[1] // heads, query.shape[2])
    scores = torch.matmul(grouped, keys.transpose(2, 3)) * scale
    hidden = torch.arange(length, device=entries.device) > entries[:, None, None, None]
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
    return torch.matmul(weights, values).reshape(query.shape)


def largest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `enginesmith::largest` computes of x (rows, n); not a finite number where one is none."""
    best, place = x.max(dim=-1)
    return best, place


def _without_kernels() -> None:
    for name, function, mutates in _OPERATORS:
        made = torch.library.custom_op(name, function, mutates_args=mutates)
        made.register_fake(function if function is not attend else lambda query, *_: torch.empty_like(query))


def _with_kernels() -> None:
    from . import launches

    for name, function, mutates in _OPERATORS:
        launch = getattr(launches, function.__name__)
        torch.library.triton_op(name, _either(launch, function), mutates_args=mutates)


def _either(launch: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel for tensors on a GPU, torch's operators for others; of the signature that schemas are inferred from."""

    @functools.wraps(function)
    def either(first: torch.Tensor, *others: Any) -> Any:
        return (launch if first.is_cuda else function)(first, *others)

    return either


_OPERATORS: tuple[tuple[str, Callable[..., Any], tuple[str, ...]], ...] = (
    (PRODUCT, product, ()), (ATTEND, attend, ("keys", "values")), (LARGEST, largest, ())
)  # fmt: skip
"""Name, what it computes, and which arguments it writes."""
