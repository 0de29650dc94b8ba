"""Operators of torch that calls of one new token a row are made of: kernels of Triton on a GPU, torch elsewhere.

    enginesmith::product    y = activation(norm(x) weight^T + bias) + residual
    enginesmith::attend     attention over caches into which it writes the new token
    enginesmith::largest    the largest of each row and its place

TorchInductor compiles their kernels into the engine, which then needs neither this module nor Triton.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

PRODUCT, ATTEND, LARGEST = "enginesmith::product", "enginesmith::attend", "enginesmith::largest"
ACTIVATIONS = ("", "gelu_tanh", "relu")
"""By the number that the operator takes."""

_PRODUCT = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "int activation) -> Tensor"
)
_ATTEND = (
    "(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor entries, float scale)"
    " -> Tensor"
)
_LARGEST = "(Tensor x) -> (Tensor, Tensor)"
_SPLIT_BELOW = 132
"""Rows times heads from which on a whole cache is one program's: about the multiprocessors of a large GPU."""


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
    """What `enginesmith::product` computes of x (..., k) and weight (n, k), with torch's own operators."""
    if norm_weight is not None:
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    y = torch.nn.functional.linear(x, weight, bias)
    if ACTIVATIONS[activation] == "gelu_tanh":
        y = torch.nn.functional.gelu(y, approximate="tanh")
    elif ACTIVATIONS[activation] == "relu":
        y = torch.relu(y)
    return y if residual is None else y + residual


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
    for name, function, schema in (
        (PRODUCT, product, _PRODUCT), (ATTEND, attend, _ATTEND), (LARGEST, largest, _LARGEST)
    ):  # fmt: skip
        mutates = ("keys", "values") if name == ATTEND else ()
        made = torch.library.custom_op(name, function, mutates_args=mutates, schema=schema)
        made.register_fake(function if name != ATTEND else lambda query, *_: torch.empty_like(query))


def _with_kernels() -> None:
    torch.library.triton_op(PRODUCT, _product, mutates_args=(), schema=_PRODUCT)
    torch.library.triton_op(ATTEND, _attend, mutates_args=("keys", "values"), schema=_ATTEND)
    torch.library.triton_op(LARGEST, _largest, mutates_args=(), schema=_LARGEST)


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    activation: int,
) -> torch.Tensor:
    from . import kernels

    if not x.is_cuda:
        return product(x, weight, bias, residual, norm_weight, norm_bias, eps, activation)
    (n, k), rows = weight.shape, x.reshape(-1, x.shape[-1]).shape[0]
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], n))
    bias_at = x if bias is None else bias
    residual_at = x if residual is None else residual.contiguous()
    if rows == 1:
        block_n, block_k, warps = (4, 256, 2) if n > 8192 else (1, 1024, 8) if k > 2048 else (2, 1024, 4)
        torch.library.wrap_triton(kernels.row_product)[((n + block_n - 1) // block_n,)](
            x, weight, bias_at, residual_at, x if norm_weight is None else norm_weight,
            x if norm_bias is None else norm_bias, y, n, k, eps, bias is not None, residual is not None,
            norm_weight is not None, activation, block_n, block_k, _power_of_two(k), num_warps=warps,
        )  # fmt: skip
        return y
    if norm_weight is not None:
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    block_m, (block_n, block_k, warps) = 32, (64, 128, 4) if n > 8192 else (32 if n > 1024 else 16, 256, 2)
    torch.library.wrap_triton(kernels.rows_product)[
        ((n + block_n - 1) // block_n, (rows + block_m - 1) // block_m)
    ](
        x, weight, bias_at, residual_at, y, rows, n, k, bias is not None, residual is not None, activation, block_m,
        block_n, block_k, 3, num_warps=warps,
    )  # fmt: skip
    return y


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    entries: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    from . import kernels

    if not query.is_cuda:
        return attend(query, key, value, keys, values, entries, scale)
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    rows, _, width = query.shape
    _, heads, length, _ = keys.shape
    shared = query.shape[1] // heads
    few = isinstance(rows, int) and rows * heads < _SPLIT_BELOW
    tokens, block_t, warps = (64, 64, 8) if few else (length, 64, 2)
    splits, block_d = (length + tokens - 1) // tokens, _power_of_two(width)
    y = query.new_empty((rows, query.shape[1], width))
    ends = query.new_empty((rows * query.shape[1] * splits * 2,), dtype=torch.float32)
    parts = ends if splits == 1 else ends.new_empty((rows * query.shape[1] * splits * block_d,))
    torch.library.wrap_triton(kernels.attend)[(rows * heads, splits)](
        query, key, value, keys, values, entries, y, parts, ends, *query.stride()[:2], *key.stride()[:2],
        *value.stride()[:2], entries.stride(0), length, scale, heads, shared, width, block_d, block_t, tokens, splits,
        num_warps=warps,
    )  # fmt: skip
    if splits > 1:
        torch.library.wrap_triton(kernels.combine)[(rows * query.shape[1],)](
            parts, ends, y, width, block_d, splits, _power_of_two(splits), num_warps=2
        )
    return y


def _largest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from . import kernels

    if not x.is_cuda:
        return largest(x)
    x = x.contiguous()
    rows, size = x.shape
    blocks = (size + 2047) // 2048
    tops, places = (x.new_empty((rows, blocks), dtype=dtype) for dtype in (torch.float32, torch.int32))
    best, token = x.new_empty((rows,)), x.new_empty((rows,), dtype=torch.int64)
    torch.library.wrap_triton(kernels.block_largest)[(rows, blocks)](x, tops, places, size, blocks, 2048, num_warps=8)
    torch.library.wrap_triton(kernels.row_largest)[(rows,)](
        tops, places, best, token, blocks, _power_of_two(blocks), num_warps=1
    )
    return best, token


def _power_of_two(size: int) -> int:
    """The least one that is not below."""
    return 1 << (size - 1).bit_length()
