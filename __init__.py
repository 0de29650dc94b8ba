"""enginesmith: from a PyTorch checkpoint to an engine that is proven right and proven faster.

    bundle = enginesmith.compile("model.py:net", "build/net", weights="net.pt", inputs=["image:1x3x224x224"])
    engine = enginesmith.load("build/net")
    logits = engine(image=array)

Importing this package imports nothing heavy; what is used is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compiler.bundle import Bundle
    from .compiler.comparison.comparison import compare
    from .compiler.engine import Engine, load
    from .compiler.generation.eviction import Eviction
    from .compiler.generation.prefixes import Prefixes
    from .compiler.generation.speculative import Speculation
    from .compiler.pipeline import compile
    from .compiler.recipe import Recipe
    from .offline.results import Outputs
    from .offline.run import run
    from .serving.client import Client
    from .serving.split import Split

__version__ = "0.1.0"
__all__ = [
    "Bundle",
    "Client",
    "Engine",
    "Eviction",
    "Outputs",
    "Prefixes",
    "Recipe",
    "Speculation",
    "Split",
    "__version__",
    "compare",
    "compile",
    "load",
    "run",
]

_HOMES = {
    "Bundle": ".compiler.bundle",
    "Client": ".serving.client",
    "Engine": ".compiler.engine",
    "Eviction": ".compiler.generation.eviction",
    "Outputs": ".offline.results",
    "Prefixes": ".compiler.generation.prefixes",
    "Recipe": ".compiler.recipe",
    "Speculation": ".compiler.generation.speculative",
    "Split": ".serving.split",
    "compare": ".compiler.comparison.comparison",
    "compile": ".compiler.pipeline",
    "load": ".compiler.engine",
    "run": ".offline.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
