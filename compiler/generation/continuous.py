"""Generates for requests that come and go: those under way share each call of the engine, each at its own position.

    rows 0..n-1     of the caches, one for each request under way
    a prompt        is read into row n by itself; one at a time, so that the others go on in between
    a step          is one call on rows 0..n-1, and gives each its next token
    an end          the last row moves into the place of the one that ended
    a row alone     takes what a draft proposes, where there is one and the row is greedy

Where the runner can, tokens are chosen where the logits lie, for each row in its own way. A request gets the tokens
that it would get alone, whatever runs beside it. Needs NumPy and the engine's runtime only.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from ...errors import EngineError, EngineMismatchError, EnginesmithError
from ...targets.base import Runner
from ..signature import Signature
from ..states import IDS, longest_draft
from .choice import Choice
from .eviction import Eviction, check_eviction, steps_for
from .generate import check_decoder
from .prefixes import Prefixes, read
from .prompts import check, most_rows
from .speculative import Proposer, Speculation, advance, check_draft
from .steps import Choosing, Steps, caches_of

Take = Callable[[int], Any]
Done = Callable[[EnginesmithError | None], Any]


@dataclasses.dataclass(eq=False)
class Request:
    """A text to go on with.

    Attributes:
        prompt: its tokens.
        choice: of each token.
        ends: tokens after which nothing comes.
        take: gets each token as soon as it is known.
        done: called once, after the last token, with what went wrong. Neither may raise: the thread is everybody's.
        text: the prompt and the tokens so far, of which the last is in no cache yet.
    """

    prompt: np.ndarray
    max_new_tokens: int
    choice: Choice
    ends: Collection[int]
    take: Take
    done: Done
    cancelled: bool = False
    text: list[int] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.text = self.prompt.tolist()

    @property
    def last(self) -> int:
        """The newest token."""
        return self.text[-1]

    @property
    def past(self) -> int:
        """How many tokens its cache holds: the last one comes with the next call."""
        return len(self.text) - 1

    @property
    def missing(self) -> int:
        """How many tokens may still come."""
        return len(self.prompt) + self.max_new_tokens - len(self.text)

    def cancel(self) -> None:
        """Ends it before its next token."""
        self.cancelled = True

    def add(self, logits: np.ndarray) -> bool:
        """Takes the token that follows; whether more are to come."""
        return self._added(self.choice(logits))

    def add_chosen(self, token: int, best: np.floating[Any]) -> bool:
        """Takes a token that was chosen where the logits lie, the largest of which comes along; as `add`."""
        self.choice.check(best)
        return self._added(token)

    def _added(self, token: int) -> bool:
        self.text.append(token)
        self.take(token)
        return self.last not in self.ends and self.missing > 0


class Batcher:
    """Runs requests in a thread of its own, until it is closed.

    Args:
        rows: requests that are under way at the same time, at most; more wait. All that the engine takes by default.
        prefixes: what is known of beginnings of prompts.
        eviction: what a full cache keeps; not beside `prefixes`.
        draft: runner and signature of an engine that proposes tokens to a greedy request which is alone.
        speculation: counts what the draft brings.

    Raises:
        EngineError: the engine has no cache.
        EngineMismatchError: its calls are of one number of rows only, or it was not compiled to drop tokens or to
            check drafts; the draft is of another vocabulary.
        RecipeError: counts without a draft, or eviction beside it.
    """

    def __init__(
        self,
        runner: Runner,
        signature: Signature,
        rows: int | None = None,
        prefixes: Prefixes | None = None,
        eviction: Eviction | None = None,
        draft: tuple[Runner, Signature] | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        check_decoder(signature)
        _check_rows(signature)
        check_eviction(signature, eviction, prefixes=prefixes is not None, draft=draft is not None)
        if draft is not None:
            check_decoder(draft[1])
        check_draft(signature, 1, draft and draft[1], speculation, do_sample=False)
        most = most_rows(signature)
        self._runner, self._signature, self._prefixes = runner, signature, prefixes
        self._most = most if rows is None else min(rows, most)
        self._caches = caches_of(runner, signature, self._most)
        self._eviction, self._dropped = eviction, np.zeros(self._most, np.int64)
        self._steps: dict[tuple[int, int], Steps] = {}
        self._propose = Proposer(*draft) if draft is not None else None
        self._drafted: Request | None = None
        self._speculation = speculation or Speculation()
        self._rows: list[Request] = []
        self._reading: Request | None = None
        self._waiting: collections.deque[Request] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="enginesmith-batcher", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Request:
        """Lets a request wait for its turn.

        Raises:
            DataError: the prompt does not fit the engine.
            RecipeError: fewer than one new token.
            EngineError: the batcher is closed.
        """
        check(self._signature, [request.prompt], request.max_new_tokens, evicts=self._eviction is not None)
        with self._changed:
            if self._closed:
                raise EngineError("the batcher is closed", hint="make another one")
            self._waiting.append(request)
            self._changed.notify()
        return request

    def close(self) -> None:
        """Finishes all requests, those that wait too, and ends."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._admit():
                self._step()
        except Exception as problem:
            self._give_up(problem)
            raise

    def _give_up(self, problem: Exception) -> None:
        """Ends all requests after a fault that is none of an engine, so that none waits for ever."""
        error = EngineError(f"generation ended by a fault: {type(problem).__name__}: {problem}")
        error.__cause__ = problem
        with self._changed:
            self._closed = True
            left = [*self._rows, *self._waiting, *([self._reading] if self._reading is not None else [])]
            self._rows.clear()
            self._waiting.clear()
        for request in left:
            request.done(error)

    def _admit(self) -> bool:
        """Reads the next prompt if there is room for it; waits while there is nothing to do. Whether there is more."""
        with self._changed:
            while not self._rows and not self._waiting and not self._closed:
                self._changed.wait()
            if not self._rows and not self._waiting:
                return False
            if gone := [request for request in self._waiting if request.cancelled]:
                self._waiting = collections.deque(request for request in self._waiting if not request.cancelled)
            request = self._waiting.popleft() if self._waiting and len(self._rows) < self._most else None
        for left in gone:
            left.done(None)
        if request is not None:
            self._reading = request
            self._begin(request)
            self._reading = None
        return True

    def _begin(self, request: Request) -> None:
        row = len(self._rows)
        try:
            steps = self._steps_of(slice(row, row + 1))
            caches = {name: cache[row : row + 1] for name, cache in self._caches.items()}
            more = request.add(read(steps, request.prompt, caches, self._prefixes)[0])
        except EnginesmithError as error:
            request.done(error)
            return
        if more:
            self._rows.append(request)
        else:
            request.done(None)

    def _step(self) -> None:
        """The next token of every row."""
        for row in reversed(range(len(self._rows))):
            if self._rows[row].cancelled:
                self._end(row, None)
        if not self._rows:
            return
        if self._propose is not None and len(self._rows) == 1 and self._rows[0].choice.greedy:
            self._speculate(self._rows[0], self._propose)
            return
        try:
            add = self._call(self._rows)
        except EnginesmithError as error:
            for row in reversed(range(len(self._rows))):
                self._end(row, error)
            return
        for row in reversed(range(len(self._rows))):  # from the end: the row that moves has had its token
            try:
                more = add(row)
            except EnginesmithError as error:
                self._end(row, error)
                continue
            if not more:
                self._end(row, None)

    def _call(self, rows: Sequence[Request]) -> Callable[[int], bool]:
        """One call on all rows; what is given lets a row take its token, as `Request.add`."""
        last = np.array([request.last for request in rows])
        past = np.array([request.past for request in rows])
        steps = self._steps_of(slice(0, len(rows)))
        if isinstance(steps, Choosing):
            chance = np.array([request.choice.chance() for request in rows])
            tokens, best = steps.token(last, past, [request.choice.sampling for request in rows], chance)
            return lambda row: rows[row].add_chosen(int(tokens[row]), best[row])
        logits = steps(last[:, None], past, np.ones_like(past))
        return lambda row: rows[row].add(logits[row])

    def _speculate(self, request: Request, propose: Proposer) -> None:
        """The next tokens of the only row."""
        if request is not self._drafted:
            self._drafted = request
            propose.keep(0)
        most = min(longest_draft(self._signature), request.missing - 1)
        try:
            steps = self._steps_of(slice(0, 1))
            more = advance(steps, propose, request.text, most, request.add_chosen, self._speculation)
        except EnginesmithError as error:
            self._end(0, error)
            return
        if not more:
            self._end(0, None)

    def _end(self, row: int, error: EnginesmithError | None) -> None:
        request, last = self._rows[row], self._rows.pop()
        if request is self._drafted:
            self._drafted = None
        if request is not last:
            self._rows[row] = last
            source = len(self._rows)
            for cache in self._caches.values():
                cache[row, :, : last.past] = cache[source, :, : last.past]
            self._dropped[row] = self._dropped[source]
        request.done(error)

    def _steps_of(self, rows: slice) -> Steps:
        """Calls on these rows of the caches."""
        key = (rows.start, rows.stop)
        if key not in self._steps:
            caches = {name: cache[rows] for name, cache in self._caches.items()}
            self._steps[key] = steps_for(
                self._runner, self._signature, rows.stop - rows.start, self._eviction, caches, self._dropped[rows]
            )
        return self._steps[key]


def _check_rows(signature: Signature) -> None:
    """Calls are made on as many rows as there are requests, and on one for a prompt."""
    batch = signature.input(IDS).shape[0]
    if not isinstance(batch, str) and batch != 1:
        raise EngineMismatchError(
            f"the engine takes {batch} rows at a time, no more and no fewer",
            expected="a dynamic batch axis, or one row",
            found=batch,
            hint=f"compile it with --dynamic {IDS}:0=1..{batch}..{batch}",
        )
