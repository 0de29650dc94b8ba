"""Checks prompts before anything runs, and puts them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import DataError, RecipeError
from ..signature import Signature
from ..states import IDS, max_length, policies, vocabulary


def rows_of(prompts: Any) -> list[np.ndarray]:
    """A row of tokens for each prompt; one prompt may be given alone.

    Raises:
        DataError: they are no tokens.
    """
    given = list(prompts) if isinstance(prompts, (Sequence, np.ndarray)) and not isinstance(prompts, str) else None
    if given is None:
        raise DataError(
            "prompts are no tokens",
            expected="token numbers, or a list of them for each prompt",
            found=repr(prompts)[:80],
        )
    if not given:
        raise DataError(
            "there are no prompts", expected="token numbers, or a list of them for each prompt", found="none"
        )
    if all(np.isscalar(item) for item in given):
        given = [given]
    return [_row(number, item) for number, item in enumerate(given)]


def most_rows(signature: Signature) -> int:
    """How many rows the engine takes at once."""
    batch = signature.input(IDS).shape[0]
    return signature.axes[batch].max if isinstance(batch, str) else batch


def check(signature: Signature, rows: Sequence[np.ndarray], new_tokens: int, *, evicts: bool = False) -> None:
    """Whether the engine takes these prompts, and has room for so many new tokens.

    Args:
        evicts: a full cache drops tokens, so that what the model was made for is the limit.

    Raises:
        DataError: the first that does not fit.
        RecipeError: fewer than one new token.
    """
    if new_tokens < 1:
        raise RecipeError("max_new_tokens is too small", expected="1 or more", found=new_tokens)
    if len(rows) > (most := most_rows(signature)):
        raise DataError(
            f"{len(rows)} prompts are more than the engine takes at once",
            expected=f"at most {most}",
            found=len(rows),
            hint=f"give fewer, or compile with --decoder batch={len(rows)}",
        )
    room = _room(signature, evicts)
    for number, row in enumerate(rows):
        _check_row(signature, f"prompt {number}", row, evicts)
        if room is not None and len(row) + new_tokens > room:
            where = "in what the model was made for" if evicts else "in the cache"
            drop = ", let a full cache drop tokens (eviction=, --evict)" if policies(signature) else ""
            longer = "" if evicts else f"{drop}, or compile with a larger --decoder max_length"
            raise DataError(
                f"prompt {number} leaves no room for {new_tokens} new tokens {where}",
                expected=f"at most {room} tokens together",
                found=f"{len(row)} and {new_tokens}",
                hint=f"ask for at most {room - len(row)}{longer}",
            )


def check_texts(signature: Signature, rows: Sequence[np.ndarray], *, evicts: bool = False) -> None:
    """Whether the engine can tell how likely these texts are; `evicts` as in `check`.

    Raises:
        DataError: the first that does not fit.
    """
    for number, row in enumerate(rows):
        _check_row(signature, f"text {number}", row, evicts)
        if len(row) < 2:
            raise DataError(
                f"text {number} has one token, and nothing stands before it", expected="at least two tokens", found=1
            )


def side_by_side(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (batch, time), padded with zeros on the right, and the length of each row."""
    counts = np.array([len(row) for row in rows], np.int64)
    ids = np.zeros((len(rows), int(counts.max())), np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return ids, counts


def _room(signature: Signature, evicts: bool) -> int | None:
    """Tokens of a text at most; None for any number."""
    return signature.positions if evicts else max_length(signature)


def _check_row(signature: Signature, what: str, row: np.ndarray, evicts: bool) -> None:
    room, known = _room(signature, evicts), vocabulary(signature)
    wrong = row[(row < 0) | (row >= known)] if known is not None else row[row < 0]
    if len(wrong):
        raise DataError(
            f"{what} holds a token that the model does not know",
            expected=f"0 to {known - 1}" if known is not None else "0 or more",
            found=int(wrong[0]),
            hint="was it made by another tokenizer?",
        )
    if room is not None and len(row) > room:
        raise DataError(
            f"{what} is longer than {'what the model was made for' if evicts else 'the cache'}",
            expected=f"at most {room} tokens",
            found=len(row),
            hint="shorten it" if evicts else "shorten it, or compile with a larger --decoder max_length",
        )


def _row(number: int, prompt: Any) -> np.ndarray:
    try:
        row = np.asarray(prompt)
    except (TypeError, ValueError):
        row = np.empty((0, 0), object)
    if row.ndim == 1 and not row.size:
        raise DataError(f"prompt {number} is empty", expected="at least one token", found="none")
    if row.ndim != 1 or row.dtype.kind not in "iu":
        raise DataError(f"prompt {number} is no row of tokens", expected="whole numbers", found=repr(prompt)[:80])
    return row.astype(np.int64)
