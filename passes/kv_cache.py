"""Stores the caches of a decoder in 8 bits instead of 32, with scales from calibration.

    stored = clip(round(new / scale), -128, 127)        attention reads stored * scale
    scale  = headroom * the largest |new| on the calibration data / 127, for each head and channel

It is for a graph whose attention is fused (`fuse-attention`): GroupQueryAttention takes such caches, and reads a
quarter of the bytes. Caches of other attention, such as the latent of DeepSeek, are stored likewise; what attends reads
all of them through a product with the scale then, which is slower than without this pass.

The engine of `onnxruntime-cpu` takes and gives the 8 bits, so memory is saved. On other targets the graph converts
caches in each call, and nothing is gained. The error of each attention alone is measured on the data, and one whose
error is above the limit keeps its caches as they were.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import numpy as np

from ..compiler.calibration import Calibration, Statistics
from ..compiler.difference import relative_l2
from ..compiler.fusion.unfolding import unfolded
from ..compiler.graph import Graph
from ..compiler.graph.editing import flattened
from ..compiler.graph.probe import Arrays, Tapped
from ..compiler.graph.selection import label
from ..compiler.quantization.caches import Cache, Writer, beside, find, scales, store
from ..errors import GraphError
from .base import Context, Pass, PassResult, Refusal

BATCHES = 4
"""How many batches of the calibration data the errors are measured on."""

Scales = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class KvCache(Pass):
    """Stores the caches of a decoder in INT8, with fixed scales.

    Attributes:
        per_channel: a scale for each head and channel; else one for all keys and one for all values of a layer.
        headroom: how many times what the data reach can be told. More rounds more, less clips the largest keys of
            other texts.
        limit: relative L2 by which the result of an attention may change; one that changes more keeps its caches.
    """

    name: ClassVar[str] = "kv-cache"
    per_channel: bool = True
    headroom: float = 1.25
    limit: float = 0.05

    def __post_init__(self) -> None:
        if not 1 <= self.headroom <= 4:
            raise ValueError(f"headroom lies between 1 and 4, not at {self.headroom}")
        if not 0 < self.limit < 1:
            raise ValueError(f"limit lies between 0 and 1, not at {self.limit}")

    @property
    def calibrates(self) -> bool:
        """For the ranges of keys and values."""
        return True

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Rewrites in place; caches that are stored already stay.

        Raises:
            RecipeError: there is no calibration.
            DataError, GraphError: the data does not run through the graph.
        """
        states = context.signature.states
        if not states:
            return PassResult(modified=False, refusals=(Refusal("the model has no caches to store"),))
        work = flattened(graph)
        plain = unfolded(work)
        writers, refused = find(plain, states)
        refusals = [Refusal(f"a cache stays as it is: {reason}", name) for name, reason in refused.items()]
        if not writers:
            return PassResult(modified=False, refusals=tuple(refusals))
        calibration = context.require_calibration(self.name, "to see the ranges of keys and values")
        caches = [cache for writer in writers for cache in writer.caches]
        statistics = calibration.statistics(plain, [cache.written for cache in caches])
        chosen = self._scales(caches, statistics, calibration)
        try:
            errors = _errors(work, states, chosen, itertools.islice(calibration.limited(), BATCHES))
        except GraphError as error:  # the data ran through the graph before: it is the new nodes' fault
            refused_all = Refusal(
                f"the caches stay float: this ONNX Runtime does not run them in 8 bits: {error.found}"
            )
            return PassResult(modified=False, refusals=(refused_all, *refusals))
        for writer in writers:
            if reason := self._why_not(writer, chosen, errors):
                refusals.append(Refusal(f"its caches stay float: {reason}", label(writer.node)))
                for cache in writer.caches:
                    chosen.pop(cache.name, None)
        if not chosen:
            return PassResult(modified=False, refusals=tuple(refusals))
        stay = {refusal.node for refusal in refusals}
        details = {
            "samples": statistics.samples,
            "statistics": statistics.digest,
            "errors": {node: error for node, error in errors.items() if node not in stay},
        }
        store(work, states, chosen)
        graph.model = work.model
        return PassResult(True, {"caches stored in 8 bits": len(chosen)}, tuple(refusals), details)

    def _scales(self, caches: Sequence[Cache], statistics: Statistics, calibration: Calibration) -> Scales:
        """By the name of the cache; none of one whose values are not known."""
        given = _largest_given(calibration, [cache.name for cache in caches])
        found = {}
        for cache in caches:
            if (peaks := _peaks(cache, statistics)) is not None:
                peaks = self.headroom * np.maximum(peaks, given[cache.name])
                found[cache.name] = scales(peaks[None, :, None] if self.per_channel else peaks.max(keepdims=True)[0])
        return found

    def _why_not(self, writer: Writer, chosen: Scales, errors: Mapping[str, float]) -> str:
        """Why a node's caches are not stored in 8 bits; empty where they are."""
        for cache in writer.caches:
            if cache.name not in chosen:
                return f"{cache.written!r}, which is written, is not finite on the data, or beyond 1e30"
        error = errors[label(writer.node)]
        if error <= self.limit:
            return ""
        return f"in 8 bits its result changes by relative L2 {error:.2e}, allowed {self.limit:g}"


def _peaks(cache: Cache, statistics: Statistics) -> np.ndarray | None:
    """The largest magnitude of what is written (heads, width); None where it is not known.

    Where what is written has heads on an axis of their own, all have those of the channel.
    """
    found = statistics.tensors.get(cache.written)
    if found is None:
        return None
    if found.channel_low is None or found.channel_high is None:
        return np.full((cache.heads, cache.width), found.peak)
    peaks = np.maximum(np.abs(found.channel_low), np.abs(found.channel_high))
    return np.broadcast_to(peaks.reshape(-1, cache.width), (cache.heads, cache.width))


def _largest_given(calibration: Calibration, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The largest magnitudes (heads, width) in the caches that the data begin with; zeros where these are prompts."""
    found: dict[str, np.ndarray] = {}
    for batch in calibration.limited():
        for name in names:
            peaks = np.abs(batch[name]).max(axis=(0, 2))
            found[name] = np.maximum(found.get(name, 0.0), peaks)
    return found


def _errors(graph: Graph, states: Mapping[str, str], chosen: Scales, batches: Iterable[Arrays]) -> dict[str, float]:
    """The largest relative L2 by which the result of each node changes, while all others are as they were."""
    work = graph.clone()
    pairs = beside(work, states, chosen)
    run = Tapped(work, [name for pair in pairs.values() for name in pair])
    worst = dict.fromkeys(pairs, 0.0)
    for batch in batches:
        found = run(batch)
        for node, (name, other) in pairs.items():
            worst[node] = max(worst[node], relative_l2(found[other], found[name]))
    return worst
