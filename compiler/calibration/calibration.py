"""Statistics of activations over the user's data: collected when a pass asks for them, kept for the passes after it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection
from pathlib import Path

from ...errors import DataError
from ..data import Samples
from ..graph import Graph
from ..storage.cache import code_digest
from .observe import Limited, float_activations, observe
from .settings import CalibrationSettings
from .statistics import Detail, Statistics


class Calibration:
    """The data that statistics come from, and the statistics of each graph that were asked for.

    Args:
        samples: what to run.
        settings: how.
        folder: where statistics are kept from one compile to the next, by the graph, the data and the settings; None
            to keep them in memory alone. Samples without a `digest` are not kept there.

    Raises:
        DataError: the samples are made up, and the settings do not allow that.
    """

    def __init__(
        self, samples: Samples, settings: CalibrationSettings | None = None, folder: Path | None = None
    ) -> None:
        self.samples = samples
        self.settings = settings or CalibrationSettings()
        self._folder = folder
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

    def limited(self) -> Limited:
        """The samples, up to the settings' number of them."""
        return Limited(self.samples, self.settings.max_samples)

    def statistics(self, graph: Graph, names: Collection[str] | None = None, *, detail: Detail = "full") -> Statistics:
        """Statistics of these tensors of the main graph (None: all float activations).

        One pass over the samples collects what no earlier call for an equal graph did. Raises as `observe`.
        """
        wanted = list(dict.fromkeys(float_activations(graph) if names is None else names))
        key = graph.fingerprint()
        known = self._kept.get(key) or self._load(key)
        if known is not None and known.detail == "range" and detail == "full":
            known = None
        seen = frozenset(known.everything()) | known.empty if known else frozenset()
        missing = [name for name in wanted if name not in seen]
        if known is None or missing:
            found = observe(graph, self.samples, missing, self.settings, known.detail if known else detail)
            known = found if known is None else known.joined(found)
            self._save(key, known)
        self._kept[key] = known
        return known.only(wanted)

    def _path(self, key: str) -> Path | None:
        digest = getattr(self.samples, "digest", None)
        if self._folder is None or digest is None:
            return None
        settings = dataclasses.asdict(dataclasses.replace(self.settings, threads=0))
        text = json.dumps([key, digest, settings, code_digest()], sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"

    def _load(self, key: str) -> Statistics | None:
        path = self._path(key)
        if path is None or not path.exists():
            return None
        try:
            return Statistics.load(path)
        except DataError:  # cut short by a crash, or of another version: collected again
            return None

    def _save(self, key: str, statistics: Statistics) -> None:
        if (path := self._path(key)) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            statistics.save(path)
