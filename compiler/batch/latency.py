"""Limits of latency as people write them."""

from __future__ import annotations

import re

from ...errors import RecipeError

UNITS_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def parse_latency(text: str) -> float:
    """Milliseconds of ``5ms``, ``0.1s`` or ``800us``.

    Raises:
        RecipeError: no such text, or no time above 0.
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(us|ms|s)", text.strip().lower())
    if not match or float(match[1]) <= 0:
        raise RecipeError(f"latency {text!r} cannot be read", expected="5ms, 0.1s or 800us", found=text)
    return float(match[1]) * UNITS_MS[match[2]]
