"""How a bundle is served."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Serving:
    """How a bundle is served."""

    engine: str | None = None
    name: str | None = None
    max_queue: int = 256
    instances: int = 1
