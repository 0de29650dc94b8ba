"""Keeps what prompts left in the caches, so that the beginning of a later prompt need not be read again.

    keep(tokens)        keys and values of all layers, up to the last token; what was not used for longest goes first
    take(prompt)        those of the longest beginning that the prompt shares with one that was kept

The last token of a prompt is always read, as the logits come of it. Needs NumPy only.
"""

from __future__ import annotations

import collections
import threading

import numpy as np

from ...errors import RecipeError
from ...targets.base import Arrays
from .steps import Steps

LEAST = 8
"""Tokens from which on copying is worth it."""


class Prefixes:
    """Beginnings of texts, for one engine. May be used by several threads.

    Args:
        max_bytes: of keys and values that are kept, at most.

    Attributes:
        reused: tokens that need not be read, in all.
        read: tokens that had to be.

    Raises:
        RecipeError: no room at all.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 1:
            raise RecipeError("a prefix cache has no room", expected="1 byte or more", found=max_bytes)
        self._max_bytes = max_bytes
        self._kept: collections.OrderedDict[bytes, tuple[np.ndarray, Arrays]] = collections.OrderedDict()
        self._lock = threading.Lock()
        self.reused = self.read = 0

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return sum(_nbytes(arrays) for _, arrays in self._kept.values())

    def take(self, prompt: np.ndarray, caches: Arrays) -> int:
        """Copies what is known of a prompt into the caches (1, heads, room, width), and gives the number of tokens."""
        with self._lock:
            length, key = max(
                ((_shared(prompt[:-1], tokens), key) for key, (tokens, _) in self._kept.items()), default=(0, b"")
            )
            if length < LEAST:
                length = 0
            else:
                self._kept.move_to_end(key)
                for name, kept in self._kept[key][1].items():
                    caches[name][:, :, :length] = kept[:, :, :length]
            self.reused += length
            self.read += len(prompt) - length
            return length

    def keep(self, prompt: np.ndarray, caches: Arrays) -> None:
        """Keeps what a prompt left in the caches, where it is more than what is known."""
        with self._lock:
            shared = {key: (_shared(prompt, tokens), len(tokens)) for key, (tokens, _) in self._kept.items()}
            if len(prompt) < LEAST or any(length == len(prompt) for length, _ in shared.values()):
                return
            arrays = {name: cache[:, :, : len(prompt)] for name, cache in caches.items()}
            if _nbytes(arrays) > self._max_bytes:
                return
            for key in [key for key, (length, whole) in shared.items() if length == whole]:
                del self._kept[key]  # the new one begins with it
            self._kept[prompt.tobytes()] = prompt.copy(), {name: array.copy() for name, array in arrays.items()}
            while self.nbytes > self._max_bytes:
                self._kept.popitem(last=False)


def read(steps: Steps, prompt: np.ndarray, caches: Arrays, prefixes: Prefixes | None) -> np.ndarray:
    """Reads one prompt into the caches that `steps` has, and gives the logits (1, vocabulary) that follow."""
    past = prefixes.take(prompt, caches) if prefixes is not None else 0
    logits = steps(prompt[None, past:], np.array([past]), np.array([len(prompt) - past]))
    if prefixes is not None:
        prefixes.keep(prompt, caches)
    return logits


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two texts share at their beginning."""
    length = min(len(one), len(other))
    apart = np.flatnonzero(one[:length] != other[:length])
    return int(apart[0]) if len(apart) else length


def _nbytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
