"""What `enginesmith diagnose` finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..manifest import Roofline
from .eager import Eager
from .reading import Reading
from .use import Use


@dataclasses.dataclass(frozen=True)
class Diagnosed:
    """What was found.

    Attributes:
        engines: rooflines with how each engine used the machine.
        reading: of the user's data; None where there are none, and inputs are made up.
        eager: the model in torch; None for a bundle, and for a model that holds no torch module.
        missing: what could not be looked at, and why.
    """

    subject: str
    kind: str
    engines: tuple[tuple[Roofline, Use], ...]
    reading: Reading | None = None
    eager: Eager | None = None
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def input_share(self, call_ms: float) -> float | None:
        """Part of the time of a batch, read and run one after the other, in which it is read."""
        return self.reading.share(call_ms) if self.reading else None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        engines = [
            {"roofline": roofline, "use": use.to_json(), "input_share": self.input_share(use.call_ms)}
            for roofline, use in self.engines
        ]
        return {
            "subject": self.subject,
            "kind": self.kind,
            "engines": engines,
            "reading": dataclasses.asdict(self.reading) if self.reading else None,
            "torch": self.eager.to_json() if self.eager else None,
            "missing": dict(self.missing),
        }
