"""Statistics of activations over the user's data: collected when a pass asks for them, kept for the passes after it."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from ...errors import DataError
from ..data import Samples
from ..graph import Graph
from ..storage.cache import Cache, code_digest, key
from .observe import Limited, float_activations, observe
from .settings import CalibrationSettings
from .statistics import Detail, Statistics

_FILE = "statistics.npz"
_PATIENCE_S = 1800.0
"""How long to wait for another process that collects the same statistics."""


class Calibration:
    """The data that statistics come from, and the statistics of each graph that were asked for.

    Args:
        samples: what to run.
        settings: how.
        cache: where statistics are kept from one compile to the next, by the graph, the data and the settings; None
            to keep them in memory alone. Samples without a `digest` are not kept there.

    Raises:
        DataError: the samples are made up, and the settings do not allow that.
    """

    def __init__(
        self, samples: Samples, settings: CalibrationSettings | None = None, cache: Cache | None = None
    ) -> None:
        self.samples = samples
        self.settings = settings or CalibrationSettings()
        self._cache = cache
        self._kept: dict[str, Statistics] = {}
        if samples.random and not self.settings.allow_random:
            raise DataError(
                f"calibration on {samples.description}: their ranges say nothing about real ones",
                expected="data like that which the model will see",
                found="made-up inputs",
                hint="give --data (32 to 512 samples), or allow random data in the settings of calibration",
            )

    @property
    def collected(self) -> tuple[Statistics, ...]:
        """All statistics that were asked for, one for each graph."""
        return tuple(self._kept.values())

    @property
    def key(self) -> dict[str, object] | None:
        """What decides the statistics of a graph; None where the samples have no digest."""
        digest = getattr(self.samples, "digest", None)
        if digest is None:
            return None
        return {"data": digest, "settings": dataclasses.asdict(dataclasses.replace(self.settings, threads=0))}

    def limited(self) -> Limited:
        """The samples, up to the settings' number of them."""
        return Limited(self.samples, self.settings.max_samples)

    def statistics(self, graph: Graph, names: Collection[str] | None = None, *, detail: Detail = "full") -> Statistics:
        """Statistics of these tensors of the main graph (None: all float activations).

        One pass over the samples collects what no earlier call for an equal graph did. Raises as `observe`.
        """
        wanted = list(dict.fromkeys(float_activations(graph) if names is None else names))
        fingerprint = graph.fingerprint()
        known = self._kept.get(fingerprint) or self._load(fingerprint)
        if not _holds(known, wanted, detail):
            with self._alone(fingerprint) as waited:
                known = (self._load(fingerprint) if waited else None) or known
                known = self._collected(graph, known, wanted, detail)
                self._save(fingerprint, known)
        assert known is not None
        self._kept[fingerprint] = known
        return known.only(wanted)

    def _collected(self, graph: Graph, known: Statistics | None, wanted: Sequence[str], detail: Detail) -> Statistics:
        """What is known, with what is missing."""
        if known is None or (known.detail == "range" and detail == "full"):
            return observe(graph, self.samples, wanted, self.settings, detail)
        missing = [name for name in wanted if name not in _seen(known)]
        return known.joined(observe(graph, self.samples, missing, self.settings, known.detail)) if missing else known

    def _key(self, fingerprint: str) -> str | None:
        """Where the cache keeps the statistics of a graph; None where it does not."""
        if self._cache is None or self.key is None:
            return None
        return key({"graph": fingerprint, **self.key, "code": code_digest()})

    def _alone(self, fingerprint: str) -> contextlib.AbstractContextManager[bool]:
        """Keeps other processes from collecting the same; whether there was one that did."""
        kept = self._key(fingerprint)
        if self._cache is None or kept is None:
            return contextlib.nullcontext(False)
        return self._cache.making("calibration", kept, wait_s=_PATIENCE_S)

    def _load(self, fingerprint: str) -> Statistics | None:
        kept = self._key(fingerprint)
        if self._cache is None or kept is None:
            return None
        with self._cache.reading("calibration", kept) as entry:
            if entry is None:
                return None
            try:
                return Statistics.load(entry.content / _FILE)
            except DataError:  # of another version: collected again
                return None

    def _save(self, fingerprint: str, statistics: Statistics) -> None:
        kept = self._key(fingerprint)
        if self._cache is None or kept is None:
            return
        with tempfile.TemporaryDirectory(prefix="enginesmith-") as folder:
            statistics.save(Path(folder) / _FILE)
            self._cache.put("calibration", kept, Path(folder), what={"data": self.samples.description})


def _holds(known: Statistics | None, wanted: Sequence[str], detail: Detail) -> bool:
    if known is None or (known.detail == "range" and detail == "full"):
        return False
    return _seen(known).issuperset(wanted)


def _seen(known: Statistics) -> frozenset[str]:
    return frozenset(known.everything()) | known.empty
