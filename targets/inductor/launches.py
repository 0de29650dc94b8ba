"""Launches the kernels that compute the operators."""

from __future__ import annotations

import torch

from . import kernels
from .division import Division, power_of_two
from .operators import normed


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
    """As `operators.product`."""
    (n, k), rows = weight.shape, x.reshape(-1, x.shape[-1]).shape[0]
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], n))
    bias_at = x if bias is None else bias
    residual_at = x if residual is None else residual.contiguous()
    if rows == 1:  # blocks as measured on an H100, with the shapes of GPT-2 and Llama
        whole, block_n = max(power_of_two(k), 32), 4 if n > 4096 else 2
        block_k, warps = (min(whole, 1024), 4) if k <= 1024 else (2048, 8)
        torch.library.wrap_triton(kernels.row_product)[((n + block_n - 1) // block_n,)](
            x, weight, bias_at, residual_at, x if norm_weight is None else norm_weight,
            x if norm_bias is None else norm_bias, y, n, k, eps, bias is not None, residual is not None,
            norm_weight is not None, norm_bias is not None, activation, block_n, block_k, whole, num_warps=warps,
        )  # fmt: skip
        return y
    x = normed(x, norm_weight, norm_bias, eps)
    block_m, (block_n, block_k, warps) = 32, (64, 128, 4) if n > 8192 else (32 if n > 1024 else 16, 256, 2)
    torch.library.wrap_triton(kernels.rows_product)[
        ((n + block_n - 1) // block_n, (rows + block_m - 1) // block_m)
    ](
        x, weight, bias_at, residual_at, y, rows, n, k, bias is not None, residual is not None, activation, block_m,
        block_n, block_k, 3, num_warps=warps,
    )  # fmt: skip
    return y


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    entries: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """As `operators.attend`."""
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    rows, queries, width = query.shape
    _, heads, length, _ = keys.shape
    shared = queries // heads
    division = Division.of(rows, heads, shared, width, length)
    splits, group, block_d = division.splits, division.group, division.block_d
    y = query.new_empty((rows, queries, width))
    ends = query.new_empty((rows * queries * splits * 2,), dtype=torch.float32)
    parts = ends if splits == 1 else ends.new_empty((rows * queries * splits * block_d,))
    torch.library.wrap_triton(kernels.attend)[(rows * heads, splits, (shared + group - 1) // group)](
        query, key, value, keys, values, entries, y, parts, ends, *query.stride()[:2], *key.stride()[:2],
        *value.stride()[:2], entries.stride(0), length, scale, heads, shared, width, group, block_d, division.block_t,
        division.tokens, splits, num_warps=division.warps, num_stages=division.stages,
    )  # fmt: skip
    if splits > 1:
        torch.library.wrap_triton(kernels.combine)[(rows * queries,)](
            parts, ends, y, width, block_d, splits, power_of_two(splits), num_warps=2 if splits <= 32 else 8
        )
    return y


def largest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `operators.largest`."""
    x = x.contiguous()
    rows, size = x.shape
    blocks = (size + 2047) // 2048
    tops, places = (x.new_empty((rows, blocks), dtype=dtype) for dtype in (torch.float32, torch.int32))
    best, token = x.new_empty((rows,)), x.new_empty((rows,), dtype=torch.int64)
    torch.library.wrap_triton(kernels.block_largest)[(rows, blocks)](x, tops, places, size, blocks, 2048, num_warps=8)
    torch.library.wrap_triton(kernels.row_largest)[(rows,)](
        tops, places, best, token, blocks, power_of_two(blocks), num_warps=1
    )
    return best, token
