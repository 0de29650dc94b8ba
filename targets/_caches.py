"""The caches of an engine that keeps them in fewer bits: float16, or int8 with scales in a file of its own.

    real = stored * scale

What a decoder keeps from call to call stays so. Where caches are given as float32, as those of the reference are, they
are stored first, and what comes back is real again. Needs NumPy only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..compiler.signature import Signature
from ..compiler.states import in_eight_bits, in_sixteen_bits, row_bytes
from .base import Arrays

FILE = "scales.npz"
"""Beside engine.json: by the name of a cache an array that goes with (batch, heads, length, width)."""


def facts(signature: Signature, *, in_place: bool) -> dict[str, Any]:
    """What engine.json says of caches."""
    return {
        "in_place": in_place,
        "cache_row_bytes": row_bytes(signature),
        "caches_in_8_bits": len(in_eight_bits(signature)),
    }


class Caches:
    """Turns float caches into stored ones, and back.

    Args:
        scales: of those in int8, by the name of the input.
        halves: those in float16. Caches that are in neither are float32.
    """

    def __init__(self, scales: Mapping[str, np.ndarray] | None = None, halves: Collection[str] = ()) -> None:
        self._scales = dict(scales or {})
        self._halves = frozenset(halves)

    @classmethod
    def read(cls, directory: Path, signature: Signature) -> Caches:
        """Those of the engine in a folder."""
        halves = in_sixteen_bits(signature)
        if not in_eight_bits(signature):
            return cls(halves=halves)
        with np.load(directory / FILE, allow_pickle=False) as found:
            return cls(dict(found), halves)

    def write(self, directory: Path) -> None:
        """Writes the scales, if there are any."""
        if self._scales:
            np.savez(directory / FILE, allow_pickle=False, **self._scales)

    @property
    def dtypes(self) -> dict[str, str]:
        """How those are stored that are not float32."""
        return {**dict.fromkeys(self._scales, "int8"), **dict.fromkeys(self._halves, "float16")}

    def given(self, inputs: Arrays) -> frozenset[str]:
        """The caches among the inputs that have to be stored."""
        return frozenset(name for name in self.dtypes if name in inputs and inputs[name].dtype == np.float32)

    def stored(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """The inputs as the engine takes them: in int8 rounded to nearest even, and clipped."""
        return {**inputs, **{name: self._stored(name, inputs[name]) for name in self.given(inputs)}}

    def real(self, name: str, cache: np.ndarray) -> np.ndarray:
        """A cache as float32."""
        return np.asarray(cache * self._scales.get(name, np.float32(1)), np.float32)

    def as_given(self, outputs: Mapping[str, Any], floats: Mapping[str, str]) -> dict[str, Any]:
        """The outputs, with those caches as float32 that were given so: `floats`, by the output their input."""
        return {**outputs, **{out: self.real(name, np.asarray(outputs[out])) for out, name in floats.items()}}

    def _stored(self, name: str, cache: np.ndarray) -> np.ndarray:
        if name in self._halves:
            return cache.astype(np.float16)
        rounded = np.rint(cache / self._scales[name])
        return np.asarray(np.clip(rounded, -128, 127), np.int8)
