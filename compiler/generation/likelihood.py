"""How likely an engine finds given texts: each token by those before it, on the calls that generation makes.

    perplexity = exp(-mean ln p(token t | tokens before t))        over all tokens but the first of each text

A model that finds all of V tokens equally likely has a perplexity of V; one that is always sure and right has 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import RecipeError
from ...targets.base import Runner
from ..signature import Signature
from .choice import check_number
from .eviction import Eviction, check_eviction, steps_for
from .generate import check_decoder
from .prompts import check_texts, most_rows, rows_of, side_by_side


def log_likelihoods(
    runner: Runner, signature: Signature, texts: Any, eviction: Eviction | None = None
) -> list[np.ndarray]:
    """The ln p of each token but the first of each text; see `Engine.log_likelihoods`."""
    check_decoder(signature)
    rows = rows_of(texts)
    check_texts(signature, rows, evicts=eviction is not None)
    check_eviction(signature, eviction, prefixes=False)
    most = most_rows(signature)
    return [
        values
        for start in range(0, len(rows), most)
        for values in _read(runner, signature, rows[start : start + most], eviction)
    ]


def perplexity(runner: Runner, signature: Signature, texts: Any, eviction: Eviction | None = None) -> float:
    """Of all texts together; see `Engine.perplexity`."""
    return float(np.exp(-np.concatenate(log_likelihoods(runner, signature, texts, eviction)).mean()))


def log_likelihood(outputs: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The metric `perplexity`: ln p of the token `next` (rows) by the outputs `logits` (rows, vocabulary).

    Raises:
        RecipeError: there are no such logits, or no such tokens.
    """
    logits, tokens = outputs.get("logits"), inputs.get("next")
    if logits is None or logits.ndim != 2:
        raise RecipeError(
            "metric perplexity is of a language model", expected="an output logits of (rows, vocabulary)",
            found=", ".join(f"{name} {array.shape}" for name, array in outputs.items()),
        )  # fmt: skip
    if tokens is None:
        raise RecipeError(
            "metric perplexity needs the token that follows each prompt", expected="next (rows) in the data",
            found=", ".join(inputs), hint="add it to --data beside ids; see docs/generation.md",
        )  # fmt: skip
    within = tokens.dtype.kind in "iu" and tokens.shape == logits.shape[:1]
    if not within or ((tokens < 0) | (tokens >= logits.shape[1])).any():
        raise RecipeError(
            "metric perplexity cannot read next in the data",
            expected=f"{len(logits)} whole numbers from 0 to {logits.shape[1] - 1}",
            found=f"{tokens.dtype} of shape {tokens.shape}",
        )
    return log_probabilities(logits, tokens)


def log_probabilities(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The ln of the softmax of logits (rows, vocabulary) at one token of each row, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    found: np.ndarray = shifted[np.arange(len(tokens)), tokens] - np.log(np.exp(shifted).sum(axis=1))
    return found


def _read(
    runner: Runner, signature: Signature, rows: Sequence[np.ndarray], eviction: Eviction | None
) -> list[np.ndarray]:
    """Of texts that are read side by side, a token of each in a call."""
    ids, lengths = side_by_side(rows)
    steps = steps_for(runner, signature, len(rows), eviction)
    found = np.empty((len(rows), ids.shape[1] - 1))
    one = np.ones_like(lengths)
    for at in range(found.shape[1]):
        # A text that has ended is filled up, and writes where nothing reads it.
        logits = steps(ids[:, at : at + 1], np.full_like(lengths, at), one)
        live = np.flatnonzero(lengths > at + 1)
        for best in logits[live].max(axis=1):
            check_number(best, f"after token {at + 1} of a text")
        found[live, at] = log_probabilities(logits[live], ids[live, at + 1])
    return [values[: length - 1] for values, length in zip(found, lengths, strict=True)]
