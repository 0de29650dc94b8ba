"""What the ladder improves, and when a step improved it enough.

latency       the time of a call at the usual sizes; the 95 % interval of the ratio has to lie above FASTER
throughput    the same at the largest batch
size=0.25     the bytes of the engine's files, which have to shrink by that share at least; "size" asks for SHARE. Of a
              decoder the caches of all rows that it takes are added: what it holds in memory
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from ...errors import RecipeError, UnknownNameError
from ..gains import FASTER
from ..generation.prompts import most_rows
from ..manifest import EngineRecord, SpeedUp
from ..signature import Signature
from ..states import row_bytes

KINDS = ("latency", "throughput", "size")

SHARE = 0.1
"""By how much a step has to shrink an engine where the user does not say."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """A quantity to improve; `share` is of the size, and means nothing for the others."""

    kind: Literal["latency", "throughput", "size"] = "latency"
    share: float = SHARE

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Reads ``latency``, ``throughput``, ``size`` or ``size=share``.

        Raises:
            UnknownNameError: another quantity.
            RecipeError: a share that cannot be.
        """
        kind, equals, share = (part.strip() for part in text.partition("="))
        if kind not in KINDS:
            raise UnknownNameError("objective", kind, KINDS)
        if not equals:
            return cls(kind)  # type: ignore[arg-type]
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if kind != "size" or not 0 < value < 1:
            raise RecipeError(
                f"objective {text!r} cannot be read", expected="latency, throughput, size, or for instance size=0.25"
            )
        return cls("size", value)

    def __str__(self) -> str:
        return f"size={self.share:g}" if self.kind == "size" and self.share != SHARE else self.kind

    def sizes(self, signature: Signature) -> dict[str, int]:
        """Where candidates are timed: the optimum of each axis, of the batch the largest where throughput counts."""
        sizes = signature.sizes()
        if self.kind == "throughput" and signature.batch_axis:
            sizes[signature.batch_axis] = signature.axes[signature.batch_axis].max
        return sizes

    def gain(self, incumbent: str, size_bytes: int, own_bytes: int, speed_up: SpeedUp | None) -> SpeedUp | None:
        """The ratio that decides, above 1 where the candidate is better; None where it was not measured.

        Args:
            incumbent: name of the engine that the candidate is compared with.
            size_bytes: of that engine, as `held_bytes`.
            own_bytes: of the candidate.
        """
        if self.kind != "size":
            return speed_up
        ratio = size_bytes / max(1, own_bytes)
        return SpeedUp(against=incumbent, ratio=ratio, low=ratio, high=ratio)

    @property
    def threshold(self) -> float:
        """The gain that the whole interval has to lie above."""
        return 1 / (1 - self.share) if self.kind == "size" else FASTER

    def reached(self, gain: SpeedUp) -> bool:
        """Whether a step is worth keeping."""
        return gain["low"] >= self.threshold if self.kind == "size" else gain["low"] > self.threshold

    def describe(self, gain: Mapping[str, object], what: str = "size") -> str:
        """The gain in words; `what` is smaller, where the size is to be."""
        ratio, low, high = (float(str(gain[key])) for key in ("ratio", "low", "high"))
        if self.kind == "size":
            return f"{1 / ratio:.0%} of the {what} of {gain['against']}"
        return f"{ratio:.2f} times the speed of {gain['against']}, 95 % interval {low:.2f} to {high:.2f}"


LATENCY = Objective()
"""What is improved where nothing else is asked for."""


def held_bytes(engine: EngineRecord, signature: Signature) -> int:
    """What counts as the size of an engine: its files, and of a decoder the caches of as many rows as it takes.

    Args:
        signature: of the model; an engine that stores its caches otherwise says so.
    """
    if not signature.states:
        return engine["size_bytes"]
    row = engine["details"].get("cache_row_bytes", row_bytes(signature))
    return engine["size_bytes"] + most_rows(signature) * int(row)
