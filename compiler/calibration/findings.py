"""What statistics tell about a model and its data that a user should know."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from .statistics import Statistics, TensorStatistics

Kind = Literal[
    "constant", "constant-input", "dead-channels", "non-finite", "one-sample", "outlier-channels", "random", "saturated"
]

SATURATED = 1e-3
"""Share of clipped elements that is reported."""

OUTLIER = 10.0
"""How many times the median of all channels a channel must reach to be reported."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing worth knowing about a tensor. A severe one makes the statistics doubtful."""

    tensor: str
    kind: Kind
    text: str
    severe: bool = False

    def __str__(self) -> str:
        return f"{self.tensor!r} {self.text}"


def findings(statistics: Statistics, limits: Mapping[str, tuple[float, float]] | None = None) -> Iterator[Finding]:
    """Findings about the data first, then by tensor; saturation where `limits` tell the chosen ranges."""
    yield from _about_inputs(statistics)
    for name, tensor in statistics.left_out.items():
        share = tensor.masked / tensor.count
        text = f"holds NaN, infinity or values beyond 1e30 ({share:.1%} of it): it stays in floating point"
        yield Finding(name, "non-finite", text)
    for name, tensor in statistics.items():
        yield from _about_tensor(name, tensor)
        if limits and name in limits and tensor.histogram is not None:
            low, high = limits[name]
            if (share := tensor.clipped(low, high)) >= SATURATED:
                yield Finding(name, "saturated", f"is clipped to {low:.4g} .. {high:.4g} in {share:.2%} of its values")


def _about_inputs(statistics: Statistics) -> Iterator[Finding]:
    if statistics.random:
        yield Finding(_first(statistics), "random", "is made-up data: ranges on real data will differ", severe=True)
    if statistics.distinct == 1:
        found = "one sample" if statistics.samples == 1 else f"{statistics.samples} equal samples"
        text = f"has {found} to calibrate on: ranges on other data will differ; give at least 32"
        yield Finding(_first(statistics), "one-sample", text, severe=True)
    for name, (low, high, size, floating) in statistics.inputs.items():
        if low == high and size > 1:
            yield Finding(name, "constant-input", f"is {low:.4g} everywhere in the data", severe=floating)


def _first(statistics: Statistics) -> str:
    return next(iter(statistics.inputs), "")


def _about_tensor(name: str, tensor: TensorStatistics) -> Iterator[Finding]:
    if tensor.low == tensor.high:
        yield Finding(name, "constant", f"is {tensor.low:.4g} on all data")
        return
    if tensor.channel_low is None or tensor.channel_high is None or len(tensor.channel_low) < 2:
        return
    peaks = np.maximum(-tensor.channel_low, tensor.channel_high)
    dead = np.flatnonzero((tensor.channel_low == 0) & (tensor.channel_high == 0))
    if dead.size:
        text = f"is zero on all data in {_numbered(dead, len(peaks))}"
        yield Finding(name, "dead-channels", text, severe=bool(2 * dead.size > len(peaks)))
    median = float(np.median(peaks[peaks > 0]))
    if (outliers := np.flatnonzero(peaks > OUTLIER * median)).size:
        worst = peaks.max() / median
        text = f"reaches {worst:.0f} times the median of its channels in {_numbered(outliers, len(peaks))}"
        yield Finding(name, "outlier-channels", text)


def _numbered(channels: np.ndarray, count: int) -> str:
    shown = ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")
    return f"{len(channels)} of {count} channels ({shown})"
