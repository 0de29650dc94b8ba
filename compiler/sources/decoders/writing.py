"""Caches that a call writes into, where others write into copies; and attention by one operator over them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence

import torch

from .module import Rows, keeping

Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor
]
"""Attends with one new token a row, and writes its key and value into the caches.

Takes queries (batch, heads, width), the key and the value (batch, heads of the cache, width), both caches (batch, heads
of the cache, length, width), entries (batch), at which the token stands in its row and up to which it attends, and the
scale; gives (batch, heads, width).
"""


class InPlace(Rows):
    """New tokens are written into the given buffers, for torch to attend to."""

    folds = True

    def __init__(self, positions: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        super().__init__(positions, keys, values)
        self._entries = positions
        self._numbers = torch.arange(positions.shape[0], device=positions.device)[:, None, None]

    def _written(self, buffer: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        heads = torch.arange(buffer.shape[1], device=buffer.device)[:, None]
        buffer.index_put_((self._numbers, heads, self._entries[:, None]), new.to(buffer.dtype))
        return buffer


class Single(InPlace):
    """Of calls with one new token a row: some layers leave writing and attention to one operator.

    Args:
        layers: their numbers, as `plain_layers` finds them.
    """

    def __init__(
        self,
        positions: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        *,
        layers: Collection[int],
        operator: Attend,
    ) -> None:
        super().__init__(positions, keys, values)
        # As a place in memory: of a view, which is not one, TorchInductor would compute a copy for each layer.
        self._entry = positions.as_strided((positions.shape[0],), (1,))
        self._layers = layers
        self._operator = operator

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new tokens alone, where the operator writes them."""
        return (key, value) if layer_idx in self._layers else super().update(key, value, layer_idx)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
    ) -> torch.Tensor | None:
        """What the operator gives, for its layers."""
        if layer not in self._layers:
            return None
        kept = self.keys[layer], self.values[layer]
        new = (key.to(kept[0].dtype), value.to(kept[1].dtype))
        output = self._operator(query[:, :, 0], new[0][:, :, 0], new[1][:, :, 0], *kept, self._entry, float(scale))
        return output[:, :, None]


class _Plain(Rows):
    """Notes the layers that attend to what they keep, as they keep it."""

    def __init__(
        self,
        positions: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        *,
        noted: set[int],
    ) -> None:
        super().__init__(positions, keys, values)
        seen = torch.arange(keys[0].shape[2], device=positions.device) <= positions[:, None, :, None]
        self._mask = torch.zeros((), device=positions.device).masked_fill(~seen, -torch.inf)
        self._noted = noted

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
    ) -> torch.Tensor | None:
        """None; what is attended to tells about the layer."""
        kept = key is self.keys[layer] and value is self.values[layer]
        if kept and mask.shape == self._mask.shape and torch.equal(mask.float(), self._mask):
            self._noted.add(layer)
        return None


def plain_layers(call: Callable[[], object]) -> frozenset[int]:
    """The layers of a decoder that attend to keys and values as they are kept, found by one `call` of it.

    Not those that keep them compressed, nor those whose attention is biased.
    """
    noted: set[int] = set()
    with torch.no_grad(), keeping(functools.partial(_Plain, noted=noted)):
        call()
    return frozenset(noted)
