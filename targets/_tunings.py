"""Questions that several targets put to the ladder."""

from __future__ import annotations

from .base import Tuning


def tf32(precision: str) -> tuple[Tuning, ...]:
    """TF32, where some of the graph computes in float32; whether it is close enough is for the ladder to judge."""
    if precision not in ("fp32", "mixed-fp16", "mixed-bf16"):
        return ()
    return (Tuning("TF32 in products of float32", ({"tf32": True},), "quick" if precision == "fp32" else "default"),)
