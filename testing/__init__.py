"""Assertions for your own tests, with or without pytest; no plugin is needed.

    from enginesmith.testing import assert_engine_close, assert_not_slower

    def test_engine():
        assert_engine_close("build/net", model, inputs={"image": images})
        assert_not_slower("build/net", than="release/net")

`assert_engine_close` needs NumPy and the engine's runtime, and torch where the reference is a torch module.
"""

from __future__ import annotations

from .close import Closeness, assert_engine_close
from .speed import assert_not_slower

__all__ = ["Closeness", "assert_engine_close", "assert_not_slower"]
