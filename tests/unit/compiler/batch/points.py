"""Points and curves with few words."""

from __future__ import annotations

from typing import Any

from enginesmith.compiler.manifest import BatchCurve, BatchPoint


def point(batch: int, p50_ms: float | None, p99_ms: float | None = None, **changes: Any) -> BatchPoint:
    rate = None if p50_ms is None else 1000 * batch / p50_ms
    made: dict[str, Any] = {
        "batch": batch,
        "fits": True,
        "reason": "",
        "p50_ms": p50_ms,
        "p99_ms": p50_ms if p99_ms is None else p99_ms,
        "samples_per_s": rate,
        "calls": 250 if p50_ms else 0,
        "memory_bytes": 80_000_000,
        "gpu_utilization_percent": None,
    }
    return {**made, **changes}  # type: ignore[typeddict-item]


def curve(points: list[BatchPoint], **changes: Any) -> BatchCurve:
    made: dict[str, Any] = {
        "engine": "cpu-fp32",
        "axis": "batch",
        "sizes": {},
        "device": "cpu",
        "points": points,
        "largest": max((p["batch"] for p in points if p["fits"]), default=0),
        "largest_is_limit": False,
        "saturation": None,
        "best": None,
        "p99_limit_ms": None,
        "protocol": "interleaved",
    }
    return {**made, **changes}  # type: ignore[typeddict-item]
