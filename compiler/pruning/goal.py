"""How much is to go, as text: ``0.3``, ``macs=0.7``, ``latency=0.7x``."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ...errors import RecipeError

Scope = Literal["local", "global"]
_KINDS = ("ratio", "macs", "latency")


@dataclasses.dataclass(frozen=True)
class Goal:
    """How much is to go.

    Attributes:
        value: the share that goes (ratio), or that stays (macs, latency).
        scope: whether a ratio is of each dimension, or of all together.
        ratios: ``glob:ratio`` for single dimensions.
    """

    kind: Literal["ratio", "macs", "latency"]
    value: float
    scope: Scope = "local"
    ratios: tuple[str, ...] = ()


def parse_goal(text: str) -> dict[str, str]:
    """The goal as an option of the pass prune.

    Raises:
        RecipeError: the text has another form, or the share cannot be.
    """
    kind, equals, number = text.partition("=")
    kind, number = (kind.strip(), number) if equals else ("ratio", text)
    number = number.strip().removesuffix("x")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if kind not in _KINDS or not 0 < value < 1:
        raise RecipeError(
            f"{text!r} is no goal of pruning",
            expected="a share between 0 and 1, such as 0.3 (removed), macs=0.7 or latency=0.7x (left)",
            found=text,
        )
    return {kind: number}
