"""Drops tokens from full caches, so that a text may be longer than they are.

    window          the first tokens and the newest ones stay (attention sinks: Xiao et al., StreamingLLM, 2023)
    importance      so do those of the others that got most attention so far, of each head (Zhang et al., H2O, 2023)

A full cache drops a part of its tokens at a time, and what stays moves up once for all of them. The key of a token
keeps the position at which it stood in the text. Needs NumPy only.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ...errors import EngineMismatchError, RecipeError, UnknownNameError
from ...targets.base import Arrays, Runner
from ..signature import Signature
from ..states import IMPORTANCE, POLICIES, max_length, policies
from .steps import Steps, caches_of, steps_of


@dataclasses.dataclass(frozen=True)
class Eviction:
    """What a full cache keeps.

    Attributes:
        policy: "window" or "importance", which the engine has to be compiled for.
        sinks: so many of the first tokens stay always.
        recent: of importance: this share of what stays besides are the newest tokens.
        share: of the cache that is dropped at a time.

    Raises:
        UnknownNameError: no such policy.
        RecipeError: a number out of range.
    """

    policy: str = "window"
    sinks: int = 4
    recent: float = 0.5
    share: float = 0.25

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UnknownNameError("policy of eviction", self.policy, POLICIES)
        if self.sinks < 0:
            raise RecipeError("sinks of eviction are out of range", expected="0 or more", found=self.sinks)
        for name in ("recent", "share"):
            if not 0 < getattr(self, name) < 1:
                raise RecipeError(
                    f"{name} of eviction is out of range", expected="between 0 and 1", found=getattr(self, name)
                )

    def kept(self, room: int) -> int:
        """How many tokens stay of a full cache."""
        return room - max(1, int(room * self.share))

    def check(self, signature: Signature) -> None:
        """Whether an engine can do it.

        Raises:
            EngineMismatchError: it was not compiled for the policy.
            RecipeError: more sinks than may stay.
        """
        if self.policy not in (known := policies(signature)):
            raise EngineMismatchError(
                f"the engine drops nothing from its caches by {self.policy}",
                expected="an engine that was compiled for it",
                found=", ".join(known) or "one that keeps all tokens",
                hint=f"compile it with --decoder eviction={self.policy}",
            )
        if self.sinks >= self.kept(max_length(signature)):
            raise RecipeError(
                "sinks of eviction leave no room for the newest token",
                expected=f"fewer than {self.kept(max_length(signature))}",
                found=self.sinks,
            )

    def order(self, filled: int, kept: int, importance: np.ndarray | None) -> np.ndarray:
        """Which of the filled entries stay, (heads or 1, kept), in their order.

        Args:
            importance: (heads, filled), of the policy of that name.
        """
        entries, room = np.arange(filled), kept - self.sinks
        if importance is None:
            return np.concatenate([entries[: self.sinks], entries[filled - room :]])[None]
        newest = max(1, int(room * self.recent))
        rated = importance[:, self.sinks : filled - newest]
        best = np.sort(np.argsort(-rated, axis=1, kind="stable")[:, : room - newest], axis=1) + self.sinks
        always = (entries[: self.sinks], entries[filled - newest :])
        first, last = (np.broadcast_to(some, (len(rated), len(some))) for some in always)
        return np.concatenate([first, best, last], axis=1)


class Evicting:
    """Steps whose `past` counts all tokens of a text, those that the caches dropped too.

    Args:
        caches: those of the steps.
        dropped: (batch) how many tokens of each row are gone; kept up to date.
    """

    def __init__(
        self, steps: Steps, signature: Signature, caches: Arrays, eviction: Eviction, dropped: np.ndarray
    ) -> None:
        self._steps = steps
        self._caches = caches
        self._eviction = eviction
        self._dropped = dropped
        self._room = max_length(signature)

    def __call__(
        self,
        ids: np.ndarray,
        past: np.ndarray,
        count: np.ndarray,
        back: np.ndarray | None = None,
        position: np.ndarray | None = None,
    ) -> np.ndarray:
        """The logits (batch, vocabulary) that follow; valid until the next call. A prompt may take several calls."""
        self._dropped[past == 0] = 0
        logits = np.empty(0)
        at = 0
        while at < ids.shape[1]:
            text = past + np.minimum(at, count)
            length = self._length(ids.shape[1] - at, text)
            self._make_room(text, length)
            here = np.clip(count - at, 0, length)
            found = self._steps(ids[:, at : at + length], text - self._dropped, here, back, text)
            logits = np.where((here > 0)[:, None], found, logits) if at else found
            at += length
        return logits

    def _length(self, left: int, text: np.ndarray) -> int:
        """Tokens of the next call. Behind others, several rows take one each: not all engines take more."""
        filled = int((text - self._dropped).max())
        if filled and len(text) > 1:
            return 1
        return min(left, self._room - filled or self._room - self._eviction.kept(self._room))

    def _make_room(self, text: np.ndarray, length: int) -> None:
        filled = text - self._dropped
        for row in np.flatnonzero(filled + length > self._room):
            self._evict(int(row), int(filled[row]))

    def _evict(self, row: int, filled: int) -> None:
        kept = self._eviction.kept(self._room)
        if self._eviction.policy == "window":
            self._keep(row, list(self._caches), self._eviction.order(filled, kept, None))
        else:
            for name in [name for name in self._caches if name.startswith(IMPORTANCE)]:
                importance = np.asarray(self._caches[name][row, :, :filled])[..., 0]
                layer = [other for other in self._caches if other.endswith(f".{name.removeprefix(IMPORTANCE)}")]
                self._keep(row, layer, self._eviction.order(filled, kept, importance))
        self._dropped[row] += filled - kept

    def _keep(self, row: int, names: list[str], order: np.ndarray) -> None:
        for name in names:
            cache = self._caches[name]
            kept = np.take_along_axis(np.asarray(cache[row]), order[..., None], axis=1)
            cache[row, :, : order.shape[1]] = kept


def check_eviction(signature: Signature, eviction: Eviction | None, *, prefixes: bool, draft: bool = False) -> None:
    """Whether tokens may be dropped, beside what else is asked for.

    Raises:
        EngineMismatchError: the engine was not compiled for it.
        RecipeError: a prefix cache or a draft, for which a cache has to hold a whole text.
    """
    if eviction is None:
        return
    eviction.check(signature)
    for name, given in (("prefixes", prefixes), ("draft", draft)):
        if given:
            raise RecipeError(
                f"{name} need caches that hold the whole text", expected="eviction=None", found=eviction.policy
            )


def steps_for(
    runner: Runner, signature: Signature, batch: int, eviction: Eviction | None, caches: Arrays | None = None,
    dropped: np.ndarray | None = None,
) -> Steps:  # fmt: skip
    """Calls for so many rows, as `steps_of`, that drop tokens where they have to and may."""
    if eviction is None:
        return steps_of(runner, signature, batch, caches)
    own = caches_of(runner, signature, batch) if caches is None else caches
    gone = np.zeros(batch, np.int64) if dropped is None else dropped
    return Evicting(steps_of(runner, signature, batch, own), signature, own, eviction, gone)
