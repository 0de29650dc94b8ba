"""How likely an engine finds given texts: each token by those before it, on the calls that generation makes.

    perplexity = exp(-mean ln p(token t | tokens before t))        over all tokens but the first of each text

A model that finds all of V tokens equally likely has a perplexity of V; one that is always sure and right has 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

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
