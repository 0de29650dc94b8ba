"""Which keys a token sees, of those at its position and before.

    window          the last W tokens, itself among them, and the first S of the text, its attention sinks
                    (Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023)
    top-k           of each head the K keys with the largest scores; of equal ones the first
    blocks          of each head the keys of its own block of B, and of the N blocks before with the largest scores of
                    their mean key (Lu et al., MoBA: Mixture of Block Attention for Long-Context LLMs, 2025); of equal
                    ones the first

The scores of all other keys are minus infinity before the softmax. Where a token has fewer keys, it sees them all.
The score of a block's mean key is the mean of the scores of its keys, q . mean(k) = mean(q . k), which is how it is
computed: all keys are read, and the values of the chosen blocks alone.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias


@dataclasses.dataclass(frozen=True)
class Window:
    """The last `width` tokens and the first `sinks`."""

    width: int
    sinks: int = 0

    @property
    def sees(self) -> int:
        """How many keys at most."""
        return self.width + self.sinks

    def reads(self, length: int) -> int:
        """Keys and values that a head reads for one token of a full cache."""
        return 2 * self.sees

    def __str__(self) -> str:
        return f"window of {self.width}" + (f" and {self.sinks} sinks" if self.sinks else "")


@dataclasses.dataclass(frozen=True)
class TopK:
    """The `count` keys with the largest scores of each head."""

    count: int

    @property
    def sees(self) -> int:
        """How many keys at most."""
        return self.count

    def reads(self, length: int) -> int:
        """Keys and values that a head reads for one token of a full cache."""
        return length + self.count

    def __str__(self) -> str:
        return f"top {self.count}"


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Its own block of `size` keys, and `count` others."""

    size: int
    count: int

    @property
    def sees(self) -> int:
        """How many keys at most."""
        return self.size * (self.count + 1)

    def reads(self, length: int) -> int:
        """Keys and values that a head reads for one token of a full cache."""
        return length + self.sees

    def __str__(self) -> str:
        return f"{self.count} blocks of {self.size}"


Kind: TypeAlias = Window | TopK | Blocks


def refusal(kind: Kind, length: int) -> str | None:
    """Why a cache of that many tokens is not attended to so; None where it can be."""
    if kind.sees >= length:
        return f"{kind} is all that a cache of {length} tokens holds"
    if isinstance(kind, Blocks) and length % kind.size:
        return f"{kind}: a cache of {length} tokens has no whole number of them"
    return None
