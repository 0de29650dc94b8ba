"""What the recipe's `decoder` says. Needs no torch."""

from __future__ import annotations

import dataclasses

from ....errors import RecipeError, UnknownNameError
from ...states import POLICIES


@dataclasses.dataclass(frozen=True)
class DecoderOptions:
    """Sizes of the caches.

    Attributes:
        max_length: tokens that the cache of a row holds, those of the prompt and of the answer together; None for what
            the model was made for, but not more than 1024.
        batch: rows that are generated at the same time, at most.
        eviction: what may be dropped from a full cache, so that a text may be longer than it: "window", all but the
            first and the newest tokens; "importance", tokens that got little attention as well, for which the engine
            adds up the attention that each token of the cache gets. Empty for nothing.
        cache_mib: memory for the caches of a row in float32, at most, which makes them shorter than `max_length` where
            it must; an engine may keep them in fewer bits.
        speculative_tokens: tokens of a draft that one call checks, at most; where it is 0, calls give the logits of the
            last token alone.
    """

    max_length: int | None = None
    batch: int = 8
    eviction: str = ""
    cache_mib: float | None = None
    speculative_tokens: int = 0

    def __post_init__(self) -> None:
        if self.eviction not in ("", *POLICIES):
            raise UnknownNameError("eviction of the decoder", self.eviction, POLICIES)
        if self.cache_mib is not None and not self.cache_mib > 0:
            raise RecipeError("cache_mib of the decoder is out of range", expected="above 0", found=self.cache_mib)
        if self.max_length is not None and self.max_length < 2:
            raise RecipeError(
                "max_length of the decoder is too small", expected="2 or more tokens", found=self.max_length
            )
        if self.batch < 1:
            raise RecipeError("batch of the decoder is too small", expected="1 or more rows", found=self.batch)
        if self.speculative_tokens < 0:
            raise RecipeError(
                "speculative_tokens of the decoder is too small", expected="0 or more", found=self.speculative_tokens
            )
        if self.max_length is not None:
            self.check_room(self.max_length)

    def check_room(self, length: int) -> None:
        """Whether a cache of so many tokens has room for a draft.

        Raises:
            RecipeError: it has not.
        """
        if self.speculative_tokens >= length:
            raise RecipeError(
                "speculative_tokens of the decoder is as large as its cache",
                expected=f"fewer than max_length={length}",
                found=self.speculative_tokens,
            )
