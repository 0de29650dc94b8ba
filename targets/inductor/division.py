"""How attention over caches is divided among the multiprocessors of a GPU."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SPLIT_BELOW = 132
"""Rows times heads from which on a whole cache is one program's: about the multiprocessors of a large GPU."""
_MOST_PARTS = 128
"""Of a cache: what one program puts together."""
_GROUP = 16
"""Heads of the query that Tensor Cores multiply with a key at a time."""


@dataclasses.dataclass(frozen=True)
class Division:
    """What the programs of a kernel do.

    Attributes:
        group: heads of the query of a program, which share a head of the cache.
        tokens: length of the parts of a cache.
        splits: how many parts there are.
        block_d: the width, as a power of two.
        block_t: tokens that a program reads at a time.
        warps: of a program; with fewer, or with larger blocks, its registers would not hold what it reads.
        stages: reads that a program has under way.
    """

    group: int
    tokens: int
    splits: int
    block_d: int
    block_t: int
    warps: int
    stages: int

    @classmethod
    def of(cls, rows: int | torch.SymInt, heads: int, shared: int, width: int, length: int) -> Division:
        """For so many rows, or for a number that is known in calls alone, where parts do well for few and for many."""
        known = isinstance(rows, int)
        few = known and rows * heads < _SPLIT_BELOW
        group = 1 if shared == 1 else _GROUP
        block_d = max(power_of_two(width), 16)
        block_t = max(16, min(32 if few and group == 1 else 64, (16384 if few else 4096) // block_d))
        least = block_t if few else length if known else 256
        tokens = max(least, power_of_two((length + _MOST_PARTS - 1) // _MOST_PARTS))
        warps = max((1 if few else 2) if group == 1 else 4, block_d * block_t // 2048)
        return cls(
            group, tokens, (length + tokens - 1) // tokens, block_d, block_t, warps, 1 if tokens <= block_t else 3
        )


def power_of_two(size: int) -> int:
    """The least one that is not below."""
    return 1 << (size - 1).bit_length()
