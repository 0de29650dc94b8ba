"""Calls of a decoder one after the other, and the tokens between them, chosen where the logits lie.

On a GPU a call of one token a row, and the choice of the next one, are the launch of one CUDA graph. The host takes a
token while the device is at the next one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...compiler.generation.sampling import AMONG, GREEDY, Sampling, kind_of, options_of
from ...compiler.states import (
    BACK,
    COUNT,
    IDS,
    PAST,
    POSITION,
    asked_for,
    call,
    max_length,
    numbers,
    vocabulary,
)
from ...errors import EngineError
from .._torch import to_array

if TYPE_CHECKING:
    from .decoding import DecodingRunner

AHEAD = 2
"""Tokens that the device may be ahead of the host."""

ALIGNMENT = 16
"""Bytes; a program for a GPU copies an input that begins elsewhere, and writes into the copy."""


class Calls:
    """Calls on some rows of caches, and how their tokens are chosen. All methods are called in a turn of the runner.

    Raises:
        EngineError: the caches lie where no program for a GPU writes into them.
    """

    def __init__(self, runner: DecodingRunner, batch: int, caches: Mapping[str, torch.Tensor]) -> None:
        self._runner, self._batch, self._caches = runner, batch, caches
        self._device = device = runner.device
        self._on_gpu = runner.on_gpu
        if self._on_gpu:
            check_places(caches)
        self._fitting: set[tuple[Any, ...]] = set()
        self._chosen = torch.zeros((2, batch), dtype=torch.int64, device=device)  # tokens, and room for largest logits
        self._best = self._chosen[1].view(torch.float32)[:batch]
        self._one = {
            name: torch.zeros(1 if name == BACK else batch, dtype=torch.int64, device=device)
            for name in numbers(runner.signature)
        }
        self._one[IDS] = self._chosen[0][:, None]
        self._one[COUNT] += 1
        self._counting = [self._one[name] for name in (PAST, POSITION) if name in self._one]
        wide = functools.partial(torch.ones, dtype=torch.float64, device=device)
        self._draws = wide((max_length(runner.signature) + 1, batch))
        self._number = torch.zeros(1, dtype=torch.int64, device=device)
        self._temperature, self._top_p = wide((batch, 1)), wide((batch, 1))
        self._samplings: tuple[Sampling | None, ...] = ()
        self._top_k = torch.ones((batch, 1), dtype=torch.int64, device=device)
        self._logits = torch.zeros((batch, 1), device=device)
        self._taken = torch.zeros((AHEAD, 2, batch), dtype=torch.int64, pin_memory=self._on_gpu)
        event: Any = torch.cuda.Event
        self._events = [event() for _ in range(AHEAD)] if self._on_gpu else []
        self._following: dict[str, Callable[[], None]] = {}

    def again(self) -> Calls:
        """The same with empty caches."""
        for cache in self._caches.values():
            cache.zero_()
        return self

    def __call__(self, given: Mapping[str, np.ndarray]) -> torch.Tensor:
        """The logits of a call: (batch, vocabulary), or (batch, kept, vocabulary)."""
        named = {name: torch.from_numpy(np.array(array)).to(self._device) for name, array in given.items()}
        self._logits = self._runner.launch(self._with_caches(named))[0]
        return self._logits

    def _with_caches(self, named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All inputs of a call.

        Raises:
            DataError: they are not those that the engine takes.
        """
        given = {**named, **self._caches}
        kind = tuple((name, tensor.dtype, tensor.shape) for name, tensor in named.items())
        if kind not in self._fitting:
            self._runner.signature.check(given)
            self._fitting.add(kind)
        return given

    def begin(
        self, past: np.ndarray, limit: int, samplings: Sequence[Sampling | None], draws: np.ndarray | None
    ) -> None:
        """Starts behind a call that left logits, and so many tokens in the caches."""
        self._kind = kind_of(samplings)
        for place in self._counting:
            place.copy_(torch.from_numpy(np.array(past)))
        self._number.zero_()
        if any(samplings) and draws is not None:
            self._draws[: len(draws)] = torch.from_numpy(draws)
            self._set(samplings)
        if limit > 1 and self._kind not in self._following:
            self._following[self._kind] = self._captured(self._kind)

    def _set(self, samplings: Sequence[Sampling | None]) -> None:
        if tuple(samplings) == self._samplings:
            return
        self._samplings = tuple(samplings)
        options = options_of(samplings, vocabulary(self._runner.signature) or 1)
        for name, place in (("temperature", self._temperature), ("top_k", self._top_k), ("top_p", self._top_p)):
            place.copy_(torch.from_numpy(options[name][:, None]))

    def behind(
        self, last: np.ndarray, past: np.ndarray, samplings: Sequence[Sampling | None], chance: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """A call with these tokens, and the choice of the next: tokens (batch) and largest logits (batch)."""
        self.begin(past, 2, samplings, chance[None])
        self._one[IDS].copy_(torch.from_numpy(last[:, None]))
        self._following[self._kind]()
        self._send(0)
        return self.take(0)

    def start(self, step: int) -> None:
        """Starts the choice of a token, and before all but the first the call that gives its logits."""
        if step:
            self._following[self._kind]()
        else:
            rows = self._logits.reshape(self._batch, -1, self._logits.shape[-1])[:, 0]
            self._choose(self._kind, rows, *rows.max(dim=-1))
        self._send(step % AHEAD)

    def _send(self, at: int) -> None:
        """Starts to copy what was chosen to a place of the host."""
        self._taken[at].copy_(self._chosen, non_blocking=True)
        if self._on_gpu:
            self._events[at].record()

    def take(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens (batch) and the largest logits (batch) of a choice, once it is made."""
        at = step % AHEAD
        if self._on_gpu:
            self._events[at].synchronize()
        tokens, bests = self._taken[at].numpy().copy()
        return tokens, bests.view(np.float32)[: self._batch]

    def _follow(self, kind: str) -> None:
        """The call on the tokens chosen last, and the next choice."""
        logits, best, token = self._runner.launch(self._with_caches(self._one))
        for place in self._counting:
            place += 1
        self._choose(kind, logits.reshape(self._batch, -1), best, token)

    def _choose(self, kind: str, logits: torch.Tensor, best: torch.Tensor, token: torch.Tensor) -> None:
        if kind != GREEDY:
            token = self._drawn(logits, best, among=kind == AMONG)
            self._number += 1
        self._chosen[0].copy_(token)
        self._best.copy_(best)

    def _drawn(self, logits: torch.Tensor, best: torch.Tensor, *, among: bool) -> torch.Tensor:
        """Tokens as `compiler.generation.sampling` draws them on the host, in float64 too."""
        scores = logits.double() / self._temperature
        highest = best.double()[:, None] / self._temperature
        if among:
            ordered, order = torch.sort(scores, dim=-1, descending=True, stable=True)
            least = ordered.gather(1, self._top_k - 1)
            shares = torch.exp(torch.where(ordered < least, -torch.inf, ordered) - highest)
            sums = shares.cumsum(dim=-1)
            out = sums - shares >= self._top_p * sums[:, -1:]
            weights = torch.zeros_like(shares).scatter(1, order, torch.where(out, 0.0, shares))
        else:
            weights = torch.exp(scores - highest)
        sums = weights.cumsum(dim=-1)
        chance = self._draws.index_select(0, self._number)[0]
        passed = sums <= sums[:, -1:] * chance[:, None]
        token: torch.Tensor = passed.sum(dim=-1).clamp_max(logits.shape[-1] - 1)
        return token

    def _captured(self, kind: str) -> Callable[[], None]:
        """What `_follow` does, as a CUDA graph where there can be one.

        The call that is made before a capture writes where the first call writes anew.
        """
        places = (*self._one.values(), self._number)
        before = [place.clone() for place in places]
        launch = self._runner.captured(functools.partial(self._follow, kind))
        for place, value in zip(places, before, strict=True):
            place.copy_(value)
        return launch


def check_places(caches: Mapping[str, torch.Tensor]) -> None:
    """Whether programs for a GPU write into these caches.

    Raises:
        EngineError: the first into which they do not.
    """
    for name, cache in caches.items():
        if cache.data_ptr() % ALIGNMENT:
            raise EngineError(
                f"cache {name!r} of a row does not begin at a multiple of {ALIGNMENT} bytes",
                expected=f"rows of a multiple of {ALIGNMENT} bytes",
                found=f"rows of {cache[0].nbytes} bytes",
                hint="compile it with --decoder max_length=, a multiple of 8",
            )


class Steps:
    """Calls one after the other on the same caches. Not for several threads at once; make one for each."""

    def __init__(self, runner: DecodingRunner, calls: Calls) -> None:
        self._runner, self._calls = runner, calls

    def __call__(
        self,
        ids: np.ndarray,
        past: np.ndarray,
        count: np.ndarray,
        back: np.ndarray | None = None,
        position: np.ndarray | None = None,
    ) -> np.ndarray:
        """The logits (batch, vocabulary) that follow, or with `back` (batch, kept, vocabulary)."""
        given = call(numbers(self._runner.signature), ids, past, count, back, position)
        with self._runner.turn():
            return asked_for(to_array(self._calls(given)), back)

    def likeliest(
        self, ids: np.ndarray, past: np.ndarray, count: np.ndarray, back: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest tokens that follow, and the largest logits, as `Finding` tells."""
        given = call(numbers(self._runner.signature), ids, past, count, back, None)
        with self._runner.turn():
            logits = self._calls(given)
            best, tokens = (logits[:, 0] if back is None and logits.ndim == 3 else logits).max(dim=-1)
            return to_array(tokens), to_array(best)

    def tokens(
        self, past: np.ndarray, limit: int, sampling: Sampling | None = None, draws: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The next tokens and largest logits, as `Choosing` tells."""
        with self._runner.turn():
            self._calls.begin(past, limit, [sampling] * len(past), draws)
        started = 0
        for step in range(limit):
            with self._runner.turn():
                for number in range(started, min(limit, step + AHEAD)):
                    self._calls.start(number)
                started = min(limit, step + AHEAD)
                found = self._calls.take(step)
            yield found

    def token(
        self, last: np.ndarray, past: np.ndarray, samplings: Sequence[Sampling | None], chance: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that follow, and the largest logits, as `Choosing` tells."""
        with self._runner.turn():
            return self._calls.behind(last, past, samplings, chance)
