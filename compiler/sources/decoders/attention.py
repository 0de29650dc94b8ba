"""Attention of a causal language model over static caches, as transformers' models call it.

    scores = scale * q k^T + mask       one product for all heads that share a key, none of which is repeated
    output = Softmax(scores) v          the mask is minus infinity on what a token must not see

Here k and v are whole caches, (batch, heads of keys, max_length, width), with the new tokens written in.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from ....errors import SourceError

NAME = "enginesmith"
"""Of this attention, among those that transformers knows."""

UNKNOWN = ("softcap", "s_aux", "head_mask", "position_bias")
"""Arguments that change the scores otherwise; each is refused where it is given."""


class Total:
    """Adds up the attention that each entry of a cache gets from a call.

    Args:
        valid: (batch, time), true for the queries that count.
        given: of each layer (batch, heads of the cache, length, 1), what earlier calls gave.

    Attributes:
        sums: as `given`, with this call's added.
    """

    def __init__(self, valid: torch.Tensor, given: Sequence[torch.Tensor]) -> None:
        self._valid = valid
        self.sums = list(given)

    def add(self, layer: int, weights: torch.Tensor) -> None:
        """Takes softmax(scores) of a layer, (batch, heads, time, length)."""
        got = (weights * self._valid[:, None, :, None]).sum(dim=2)
        heads = self.sums[layer].shape[1]
        shared = got.reshape(got.shape[0], heads, got.shape[1] // heads, got.shape[2]).sum(dim=2)
        self.sums[layer] = self.sums[layer] + shared[..., None]


class Attending(Protocol):
    """What keeps the caches of a call, and may attend itself.

    Attributes:
        folds: whether queries that share a key become rows of one matrix.
    """

    folds: bool

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
    ) -> torch.Tensor | None:
        """(batch, heads, time, width) for queries of that shape; None where it leaves that to others.

        Args:
            key: what the layer attends to, and `value` beside it.
            mask: what is added to the scores.
        """


_attending: contextvars.ContextVar[Attending | None] = contextvars.ContextVar("enginesmith-caches", default=None)
_summing: contextvars.ContextVar[Total | None] = contextvars.ContextVar("enginesmith-attention", default=None)


@contextlib.contextmanager
def over(caches: Attending, total: Total | None) -> Iterator[None]:
    """Within it layers attend over these caches, and add what they attend to."""
    tokens = _attending.set(caches), _summing.set(total)
    try:
        yield
    finally:
        _attending.reset(tokens[0])
        _summing.reset(tokens[1])


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Gives (batch, time, heads, width) for queries (batch, heads, time, width) and a mask (batch, 1, time, keys).

    Raises:
        SourceError: the layer asks for a kind of attention that this is not.
    """
    layer = type(module).__name__
    window = others.get("sliding_window")
    if window is not None and key.shape[2] > window:
        raise SourceError(
            f"{layer} attends within a sliding window of {window} tokens, which a longer cache does not keep",
            expected=f"a cache of at most {window} tokens",
            found=f"{key.shape[2]} tokens",
            hint=f"compile with --decoder max_length={window}",
        )
    for name in UNKNOWN:
        if others.get(name) is not None:
            raise SourceError(
                f"{layer} attends with {name!r}, which is not supported",
                expected="softmax(scale * q k^T + mask) v",
                hint="compile the model without its cache: declare its inputs with --input",
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    own = _attending.get()
    if (
        own is not None
        and (output := own.attend(_number(module), query, key, value, attention_mask, scale)) is not None
    ):
        return output.transpose(1, 2), None
    shared = query.shape[1] // key.shape[1]
    if shared == 1:
        scores = torch.matmul(query, key.transpose(2, 3)) * scale + attention_mask
        weights = torch.softmax(scores, dim=-1)
        output = torch.matmul(weights, value)
    else:
        product = _folded if own is not None and own.folds else _broadcast
        grouped = query.reshape(query.shape[0], key.shape[1], shared, query.shape[2], query.shape[3])
        scores = product(grouped, key.transpose(2, 3)) * scale + attention_mask.unsqueeze(2)
        weights = torch.softmax(scores, dim=-1)
        output = product(weights, value).flatten(1, 2)
        weights = weights.flatten(1, 2)
    if (total := _summing.get()) is not None:
        total.add(_number(module), weights)
    return output.transpose(1, 2), None


def _broadcast(grouped: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """(batch, heads, shared, time, n) of these by (batch, heads, n, m), as ONNX multiplies without a copy."""
    return torch.matmul(grouped, shared.unsqueeze(2))


def _folded(grouped: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """The same as a product of four axes, for torch copies what it broadcasts, once for each of the heads."""
    product = torch.matmul(grouped.flatten(2, 3), shared)
    return product.reshape(*grouped.shape[:4], product.shape[-1])


def _number(layer: torch.nn.Module) -> int:
    return int(layer.layer_idx)  # type: ignore[arg-type]


def register() -> None:
    """Makes it known to transformers by its name."""
    import transformers

    transformers.AttentionInterface.register(NAME, attend)
