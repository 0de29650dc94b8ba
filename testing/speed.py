"""`assert_not_slower`: an engine is as fast as another one, measured interleaved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..compiler.gains import FASTER
from ..compiler.manifest import SpeedUp


def assert_not_slower(
    engine: str | Path,
    than: str | Path,
    *,
    tolerance: float = FASTER,
    sizes: Sequence[Mapping[str, int]] = (),
    data: str | None = None,
    rounds: int = 10,
    slice_s: float = 0.08,
    seed: int = 0,
) -> dict[str, SpeedUp]:
    """Asserts that an engine is not measurably slower than another one, at any size.

    Both are timed in turns on the same inputs, as `enginesmith compare` does it.

    Args:
        engine: a bundle (its best engine here), ``BUNDLE#ENGINE``, or the folder of an engine; `than` likewise.
        tolerance: it is slower where the whole 95 % interval of its speed over that of the other lies below
            1 / tolerance.
        sizes: of the dynamic axes, for instance ``[{"batch": 8}]``; by default those of either that both take.
        data: what `--data` takes; by default the record of the reference in the bundle.

    Returns:
        By size ("batch=8"), how many times as fast it is, with the interval.

    Raises:
        AssertionError: it is slower, or fails where the other runs.
        UsageError: no engine, or two that do not take the same.
        EngineError: an engine cannot run here.
    """
    __tracebackhide__ = True
    from ..compiler.comparison.rules import Rules
    from ..compiler.comparison.speed import race

    fields: dict[str, Any] = {"rounds": rounds, "slice_s": slice_s, "seed": seed}
    checks = race(than, engine, Rules(tolerance_speed=tolerance), sizes, {**fields, **({"data": data} if data else {})})
    slower = [check for check in checks if check["state"] == "failed"]
    if slower:
        lines = [f"  {check['name']}: {check['text']}" for check in checks]
        raise AssertionError(
            "\n".join([f"{engine} is slower than {than} at {', '.join(check['name'] for check in slower)}", *lines])
        )
    return {
        check["name"]: SpeedUp(
            against=str(than),
            ratio=float(check["numbers"]["ratio"] or 0),
            low=float(check["numbers"]["low"] or 0),
            high=float(check["numbers"]["high"] or 0),
        )
        for check in checks
        if "ratio" in check["numbers"]
    }
