"""The caches of an engine that keeps them in 8 bits: `real = stored * scale`, with the scales in a file of its own.

What a decoder keeps from call to call stays in 8 bits. Where caches are given as float32, as those of the reference
are, they are stored first, and what comes back is real again. Needs NumPy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..compiler.signature import Signature
from ..compiler.states import in_eight_bits
from .base import Arrays

FILE = "scales.npz"
"""Beside engine.json: by the name of a cache an array that goes with (batch, heads, length, width)."""


class Caches:
    """Turns float caches into stored ones, and back.

    Args:
        scales: by the name of the input; caches that are left out are float.
    """

    def __init__(self, scales: Mapping[str, np.ndarray] | None = None) -> None:
        self._scales = dict(scales or {})

    @classmethod
    def read(cls, directory: Path, signature: Signature) -> Caches:
        """Those of the engine in a folder."""
        if not in_eight_bits(signature):
            return cls()
        with np.load(directory / FILE, allow_pickle=False) as found:
            return cls(dict(found))

    def write(self, directory: Path) -> None:
        """Writes the scales, if there are any."""
        if self._scales:
            np.savez(directory / FILE, allow_pickle=False, **self._scales)

    def given(self, inputs: Arrays) -> frozenset[str]:
        """The caches among the inputs that have to be stored."""
        return frozenset(name for name in self._scales if name in inputs and inputs[name].dtype.kind == "f")

    def stored(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """The inputs as the engine takes them: rounded to nearest even, and clipped."""
        return {**inputs, **{name: self._stored(name, inputs[name]) for name in self.given(inputs)}}

    def real(self, name: str, cache: np.ndarray) -> np.ndarray:
        """A cache as float32."""
        return np.asarray(cache * self._scales[name], np.float32)

    def _stored(self, name: str, cache: np.ndarray) -> np.ndarray:
        rounded = np.rint(cache / self._scales[name])
        return np.asarray(np.clip(rounded, -128, 127), np.int8)
