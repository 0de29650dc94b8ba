"""Triton kernels for calls of one new token a row, which are bound by how fast weights and caches are read.

A call of a language model is dozens of small kernels one after the other, so each of these does what would be several:
a product with the norm before it and what is added or computed behind it; attention over a cache with the new
token written into it; the largest of many logits. All sums are in float32.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Triton compiles these functions; their arguments are addresses and sizes.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _activated(y, activation: tl.constexpr):
    """By the number in `operators.ACTIVATIONS`."""
    if activation == 1:  # x Sigmoid(2 u) is x (1 + tanh u) / 2
        y = y / (1 + tl.exp(-2 * 0.7978845608028654 * (y + 0.044715 * y * y * y)))
    elif activation == 2:
        y = tl.maximum(y, 0.0)
    elif activation == 3:
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif activation == 4:
        y = y / (1 + tl.exp(-y))
    return y


@triton.jit
def _factors(x_at, norm_weight_at, norm_bias_at, k, k_size, has_norm: tl.constexpr, centred: tl.constexpr):
    """A part of what a weight is multiplied with, and of the weight and the bias of its norm."""
    inside = k < k_size
    norm_weight, norm_bias = 1.0, 0.0
    x = tl.load(x_at + k, mask=inside, other=0.0).to(tl.float32)
    if has_norm:
        norm_weight = tl.load(norm_weight_at + k, mask=inside, other=0.0).to(tl.float32)
        if centred:
            norm_bias = tl.load(norm_bias_at + k, mask=inside, other=0.0).to(tl.float32)
    return x, norm_weight, norm_bias


@triton.jit
def row_product(
    x_at, weight_at, bias_at, residual_at, norm_weight_at, norm_bias_at, y_at, n_size, k_size,
    eps: tl.constexpr, has_bias: tl.constexpr, has_residual: tl.constexpr, has_norm: tl.constexpr,
    centred: tl.constexpr, activation: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, whole: tl.constexpr,
):  # fmt: skip
    """Computes y (n) = activation(weight (n, k) norm(x (k)) + bias) + residual, with k in parts of `block_k`.

    Each program finds the norm for itself, which is a layer norm where it is centred and an RMS norm else. What it
    reads for the first part is all asked for before it waits for any of that, weights first.
    """
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    inside_n = n < n_size
    place = weight_at + n[:, None].to(tl.int64) * k_size
    k = tl.arange(0, block_k)
    weight = tl.load(place + k[None, :], mask=inside_n[:, None] & (k < k_size)[None, :], other=0.0)
    if whole > block_k:
        k_next = k + block_k
        next_weight = tl.load(place + k_next[None, :], mask=inside_n[:, None] & (k_next < k_size)[None, :], other=0.0)
    x, norm_weight, norm_bias = _factors(x_at, norm_weight_at, norm_bias_at, k, k_size, has_norm, centred)
    if has_bias:
        bias = tl.load(bias_at + n, mask=inside_n, other=0.0).to(tl.float32)
    if has_residual:
        residual = tl.load(residual_at + n, mask=inside_n, other=0.0).to(tl.float32)
    mean, scale = 0.0, 1.0
    if has_norm:
        inside = tl.arange(0, whole) < k_size
        all_x = x
        if whole > block_k:
            all_x = tl.load(x_at + tl.arange(0, whole), mask=inside, other=0.0).to(tl.float32)
        if centred:
            mean = tl.sum(all_x, axis=0) / k_size
        apart = tl.where(inside, all_x - mean, 0.0)
        scale = tl.rsqrt(tl.sum(apart * apart, axis=0) / k_size + eps)
    sums = weight.to(tl.float32) * ((x - mean) * scale * norm_weight + norm_bias)[None, :]
    if whole > block_k:
        for start in range(block_k, k_size, block_k):
            weight = next_weight
            k_next = start + block_k + k
            next_weight = tl.load(
                place + k_next[None, :], mask=inside_n[:, None] & (k_next < k_size)[None, :], other=0.0
            )
            x, norm_weight, norm_bias = _factors(
                x_at, norm_weight_at, norm_bias_at, start + k, k_size, has_norm, centred
            )
            sums += weight.to(tl.float32) * ((x - mean) * scale * norm_weight + norm_bias)[None, :]
    y = tl.sum(sums, axis=1)
    if has_bias:
        y += bias
    y = _activated(y, activation)
    if has_residual:
        y += residual
    tl.store(y_at + n, y.to(y_at.dtype.element_ty), mask=inside_n)


@triton.jit
def rows_product(
    x_at, weight_at, bias_at, residual_at, y_at, m_size, n_size, k_size,
    has_bias: tl.constexpr, has_residual: tl.constexpr, activation: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Computes y (m, n) = activation(x (m, k) weight (n, k)^T + bias) + residual, on Tensor Cores."""
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    inside_n, inside_m = n < n_size, m < m_size
    sums = tl.zeros((block_m, block_n), tl.float32)
    for start in tl.range(0, k_size, block_k, num_stages=stages):
        k = start + tl.arange(0, block_k)
        inside_k = k < k_size
        x = tl.load(x_at + m[:, None] * k_size + k[None, :], mask=inside_m[:, None] & inside_k[None, :], other=0.0)
        place = weight_at + n[None, :].to(tl.int64) * k_size + k[:, None]
        sums = tl.dot(x, tl.load(place, mask=inside_n[None, :] & inside_k[:, None], other=0.0), sums)
    if has_bias:
        sums += tl.load(bias_at + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    sums = _activated(sums, activation)
    place = m[:, None] * n_size + n[None, :]
    inside = inside_m[:, None] & inside_n[None, :]
    if has_residual:
        sums += tl.load(residual_at + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_at + place, sums.to(y_at.dtype.element_ty), mask=inside)


@triton.jit
def _attended(
    query, keys_at, values_at, begin, start, end, d, inside_d, largest, total, sums,
    scale: tl.constexpr, width: tl.constexpr, block_g: tl.constexpr, block_t: tl.constexpr,
):  # fmt: skip
    """The largest scores, totals and sums with those of the tokens from `start` to `end`, of which there may be none.

    After the online softmax of https://arxiv.org/abs/1805.02867.
    """
    t = start + tl.arange(0, block_t)
    seen = t < end
    place = begin + t[:, None] * width + d[None, :]
    keys = tl.load(keys_at + place, mask=seen[:, None] & inside_d[None, :], other=0.0)
    values = tl.load(values_at + place, mask=seen[:, None] & inside_d[None, :], other=0.0)
    if block_g == 1:
        scores = tl.sum(keys.to(tl.float32) * query.to(tl.float32), axis=1)[None, :]
    else:  # three products of TF32 make one of float32
        scores = tl.dot(query, tl.trans(keys), input_precision="tf32x3")
    scores = tl.where(seen[None, :], scores * scale, -float("inf"))
    higher = tl.maximum(largest, tl.max(scores, axis=1))
    least = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp(scores - least[:, None])
    factor = tl.exp(largest - least)
    total = total * factor + tl.sum(weights, axis=1)
    sums = sums * factor[:, None]
    if block_g == 1:
        sums += tl.sum(tl.trans(weights) * values.to(tl.float32), axis=0)[None, :]
    else:
        sums = tl.dot(weights.to(values.dtype), values, sums, input_precision="tf32x3")
    return higher, total, sums


@triton.jit
def attend(
    query_at, key_at, value_at, keys_at, values_at, entries_at, y_at, parts_at, ends_at,
    query_row, query_head, key_row, key_head, value_row, value_head, entries_row, length,
    scale: tl.constexpr, heads: tl.constexpr, shared: tl.constexpr, width: tl.constexpr, block_g: tl.constexpr,
    block_d: tl.constexpr, block_t: tl.constexpr, tokens: tl.constexpr, splits: tl.constexpr,
):  # fmt: skip
    """Softmax(scale q K^T) V of one token, over the part of a cache that is `tokens` long, up to the entry of the row.

    A program is of a row and a head of the cache, of one of the `splits` parts, and of `block_g` of the `shared` heads
    of the query that read it: of one, or of as many as Tensor Cores multiply at a time. One of those whose part has the
    entry writes the new key and value there. All of them begin with what these give, and read what is before, so that
    none reads what may not be written yet. Several parts leave their sums, largest scores and totals to `combine`.
    """
    cache = tl.program_id(0)
    split = tl.program_id(1)
    row, head = cache // heads, cache % heads
    entry = tl.load(entries_at + row * entries_row)
    d = tl.arange(0, block_d)
    inside_d = d < width
    number = tl.program_id(2) * block_g + tl.arange(0, block_g)  # of a head of the query in its group
    inside_g = number < shared
    inside = inside_g[:, None] & inside_d[None, :]
    query_place = row * query_row + (head * shared + number) * query_head
    query = tl.load(query_at + query_place[:, None] + d[None, :], mask=inside, other=0.0)
    key = tl.load(key_at + row * key_row + head * key_head + d, mask=inside_d, other=0.0)
    value = tl.load(value_at + row * value_row + head * value_head + d, mask=inside_d, other=0.0)
    begin = cache.to(tl.int64) * length * width
    first = split * tokens
    own = (entry >= first) & (entry < first + tokens)
    writes = inside_d & own & (tl.program_id(2) == 0)
    tl.store(keys_at + begin + entry * width + d, key, mask=writes)
    tl.store(values_at + begin + entry * width + d, value, mask=writes)
    new_score = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * scale
    largest = tl.where(own, new_score, -float("inf"))
    total = tl.where(own, 1.0, 0.0) + tl.zeros((block_g,), tl.float32)
    sums = tl.where(own, value.to(tl.float32), 0.0)[None, :] + tl.zeros((block_g, block_d), tl.float32)
    end = tl.minimum(entry, first + tokens)
    if tokens <= block_t:
        largest, total, sums = _attended(
            query, keys_at, values_at, begin, first, end, d, inside_d, largest, total, sums, scale, width, block_g,
            block_t,
        )  # fmt: skip
    else:
        for start in range(first, end, block_t):
            largest, total, sums = _attended(
                query, keys_at, values_at, begin, start, end, d, inside_d, largest, total, sums, scale, width, block_g,
                block_t,
            )  # fmt: skip
    query_number = cache * shared + number
    if splits == 1:
        y = (sums / total[:, None]).to(y_at.dtype.element_ty)
        tl.store(y_at + query_number[:, None] * width + d[None, :], y, mask=inside)
    else:
        part = query_number * splits + split
        tl.store(parts_at + part[:, None] * block_d + d[None, :], sums, mask=inside_g[:, None])
        tl.store(ends_at + part * 2, largest, mask=inside_g)
        tl.store(ends_at + part * 2 + 1, total, mask=inside_g)


@triton.jit
def combine(
    parts_at, ends_at, y_at, width: tl.constexpr, block_d: tl.constexpr, splits: tl.constexpr, block_s: tl.constexpr
):
    """What the parts of a query's cache give together."""
    query = tl.program_id(0)
    split = tl.arange(0, block_s)
    inside = split < splits
    d = tl.arange(0, block_d)
    part = query * splits + split
    largest = tl.load(ends_at + part * 2, mask=inside, other=-float("inf"))
    total = tl.load(ends_at + part * 2 + 1, mask=inside, other=0.0)
    factor = tl.exp(largest - tl.max(largest, axis=0))
    sums = tl.load(parts_at + part[:, None] * block_d + d[None, :], mask=inside[:, None], other=0.0)
    y = tl.sum(sums * factor[:, None], axis=0) / tl.sum(total * factor, axis=0)
    tl.store(y_at + query * width + d, y.to(y_at.dtype.element_ty), mask=d < width)


@triton.jit
def block_largest(x_at, largest_at, place_at, size, blocks, block: tl.constexpr):
    """The largest of a block of a row, and its place; infinity where one is no number."""
    row, number = tl.program_id(0), tl.program_id(1)
    n = number * block + tl.arange(0, block)
    x = tl.load(x_at + row.to(tl.int64) * size + n, mask=n < size, other=-float("inf")).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))
    largest, place = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(largest_at + row * blocks + number, largest)
    tl.store(place_at + row * blocks + number, number * block + place)


@triton.jit
def row_largest(largest_at, place_at, best_at, token_at, blocks, block: tl.constexpr):
    """The largest of the blocks of a row; of equal ones the first."""
    row = tl.program_id(0)
    number = tl.arange(0, block)
    x = tl.load(largest_at + row * blocks + number, mask=number < blocks, other=-float("inf"))
    largest, place = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best_at + row, largest.to(best_at.dtype.element_ty))
    tl.store(token_at + row, tl.load(place_at + row * blocks + place).to(tl.int64))
