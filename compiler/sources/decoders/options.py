"""What the recipe's `decoder` says. Needs no torch."""

from __future__ import annotations

import dataclasses

from ....errors import RecipeError


@dataclasses.dataclass(frozen=True)
class DecoderOptions:
    """Sizes of the caches.

    Attributes:
        max_length: tokens that the cache of a row holds, those of the prompt and of the answer together; None for what
            the model was made for, but not more than 1024.
        batch: rows that are generated at the same time, at most.
    """

    max_length: int | None = None
    batch: int = 8

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise RecipeError(
                "max_length of the decoder is too small", expected="2 or more tokens", found=self.max_length
            )
        if self.batch < 1:
            raise RecipeError("batch of the decoder is too small", expected="1 or more rows", found=self.batch)
