"""Generates with a draft: a faster engine proposes tokens, and one call of the engine itself checks them all.

    text        the prompt and the tokens so far, of which the last is in no cache yet
    proposed    d[1..k], what the draft finds likeliest, one after the other
    one call    on text[-1], d[1], ..., d[k] gives what the engine finds likeliest after each: t[0..k]
    taken       t[0], and t[i] as long as t[i - 1] = d[i]: what the engine finds by itself, whatever is proposed

What was proposed and not taken lies in the caches behind the tokens of the text: nothing sees it, and later tokens are
written over it. Needs NumPy and the engine's runtime only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from ...errors import EngineMismatchError, RecipeError
from ...targets.base import Runner
from ..signature import Signature
from ..states import longest_draft, max_length, vocabulary
from .choice import Choice, Stream, check_number
from .steps import Choosing, Steps, likeliest, steps_of


@dataclasses.dataclass
class Speculation:
    """What drafts brought, summed over all answers that it is given to.

    Attributes:
        proposed: tokens of the draft.
        accepted: those of them that the engine found too.
        calls: of the engine, beside those that read a prompt.
        tokens: new ones that these calls gave.
    """

    proposed: int = 0
    accepted: int = 0
    calls: int = 0
    tokens: int = 0

    @property
    def tokens_per_call(self) -> float | None:
        """On the average, at least 1, which is what a call gives without a draft; None before any call."""
        return self.tokens / self.calls if self.calls else None


class Proposer:
    """The greedy search of a draft, which goes on with a text that grows in another way than it proposed.

    It may fill its cache: after that it proposes nothing.
    """

    def __init__(self, runner: Runner, signature: Signature) -> None:
        self._steps = steps_of(runner, signature, 1)
        self._room = max_length(signature)
        self._past = 0

    def __call__(self, text: list[int], most: int) -> list[int]:
        """At most so many tokens that may follow. All but the last token of a text come back in the next one.

        Raises:
            EngineError: the draft fails, or gives logits that are no numbers.
        """
        wanted = min(most, self._room - len(text) + 1)  # the last one that is found is not read
        if wanted < 1:
            return []
        tokens = [self._read(text[self._past :], 1)]
        if isinstance(self._steps, Choosing):
            found = [(int(token[0]), best[0]) for token, best in self._steps.tokens(np.array([self._past]), wanted)]
            for number, (_, best) in enumerate(found, 1):
                check_number(best, _where(number))
            self._past += wanted - 1
            return [token for token, _ in found]
        while len(tokens) < wanted:
            tokens.append(self._read(tokens[-1:], len(tokens) + 1))
        return tokens

    def _read(self, tokens: list[int], number: int) -> int:
        """The likeliest token that follows these, which is the one of that number in a draft."""
        found, best = likeliest(self._steps, np.array([tokens]), np.array([self._past]), np.array([len(tokens)]))
        check_number(best[0], _where(number))
        self._past += len(tokens)
        return int(found[0])

    def keep(self, tokens: int) -> None:
        """Forgets what was read behind so many tokens of the text: what was proposed and not taken."""
        self._past = min(self._past, tokens)


def _where(number: int) -> str:
    return f"for token {number} of a draft"


def check_draft(
    signature: Signature, prompts: int, draft: Signature | None, counts: Speculation | None, *, do_sample: bool
) -> None:
    """Whether an engine can check what a draft proposes.

    Raises:
        RecipeError: sampling or several prompts, which no draft is for; counts without a draft.
        EngineMismatchError: the engine gives logits of one token a call, or the draft is of another vocabulary.
    """
    if draft is None:
        if counts is not None:
            raise RecipeError("speculation counts what a draft brings, and there is none", expected="draft=ENGINE")
        return
    if do_sample:
        raise RecipeError(
            "a draft is for greedy search: what is drawn by chance is not compared with what it proposes",
            expected="do_sample=False",
            found="do_sample=True",
        )
    if prompts > 1:
        raise RecipeError(
            "a draft is for one prompt at a time: rows would take different numbers of tokens from a call",
            expected="one prompt",
            found=f"{prompts} prompts",
            hint="give each by itself, or leave the draft out",
        )
    if not longest_draft(signature):
        raise EngineMismatchError(
            "the engine checks no drafts: its calls give the logits of one token",
            expected="an engine that takes 'back'",
            found=", ".join(spec.name for spec in signature.inputs if spec.name not in signature.states),
            hint="compile it with --decoder speculative_tokens=4; the draft needs no such thing",
        )
    if vocabulary(draft) != vocabulary(signature):
        raise EngineMismatchError(
            "the draft is of another vocabulary than the engine",
            expected=f"{vocabulary(signature)} tokens",
            found=f"{vocabulary(draft)} tokens",
            hint="take a draft with the same tokenizer",
        )


def speculate(
    steps: Steps,
    propose: Proposer,
    prompt: np.ndarray,
    logits: np.ndarray,
    *,
    longest: int,
    choice: Choice,
    max_new_tokens: int,
    ends: Collection[int],
    stream: Stream | None,
    counts: Speculation,
) -> list[int]:
    """The new tokens of one row.

    Args:
        steps: calls on caches (1, heads, room, width) that hold the prompt.
        logits: those (vocabulary) that follow the prompt.
        longest: tokens that may be proposed for one call.
    """
    text: list[int] = prompt.tolist()
    end = len(text) + max_new_tokens

    def add(token: int) -> bool:
        """Whether more tokens are to come."""
        text.append(token)
        if stream is not None:
            stream(0, text[-1])
        return text[-1] not in ends and len(text) < end

    def add_chosen(token: int, best: np.floating[Any]) -> bool:
        choice.check(best)
        return add(token)

    more = add(choice(logits))
    while more:
        more = advance(steps, propose, text, min(longest, end - len(text) - 1), add_chosen, counts)
    return text[len(prompt) :]


def advance(
    steps: Steps,
    propose: Proposer,
    text: list[int],
    most: int,
    add: Callable[[int, np.floating[Any]], bool],
    counts: Speculation,
) -> bool:
    """One call of the engine on one row, which checks what the draft proposes. Whether more tokens are to come.

    Args:
        most: tokens that may be proposed; the engine adds one by itself.
        add: takes the next token and its logit, puts it at the end of `text`, and says whether more are to come.
    """
    before = len(text)
    proposed = propose(text, most)
    call = np.array([[text[-1], *proposed]])
    back = np.arange(len(proposed), -1, -1)
    tokens, best = likeliest(steps, call, np.array([before - 1]), np.array([call.shape[1]]), back)
    counts.calls += 1
    counts.proposed += len(proposed)
    more = True
    for token, logit, guess in zip(tokens[0], best[0], [*proposed, None], strict=True):
        more = add(int(token), logit)
        counts.tokens += 1
        if text[-1] != guess:
            break
        counts.accepted += 1
        if not more:
            break
    propose.keep(len(text) - 1)
    return more
