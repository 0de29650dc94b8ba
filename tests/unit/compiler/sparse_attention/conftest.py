"""What the kinds of sparse attention compute, in NumPy."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from enginesmith.compiler.sparse_attention.kinds import Blocks, Kind, TopK, Window

small = runpy.run_path(str(Path(__file__).parents[3] / "small_decoder.py"))


def _seen(kind: Kind, scores: np.ndarray) -> np.ndarray:
    """Which keys the last of them sees, whose scores (keys) these are."""
    count = len(scores)
    seen = np.zeros(count, bool)
    if isinstance(kind, Window):
        seen[max(count - kind.width, 0) :] = True
        seen[: kind.sinks] = True
    elif isinstance(kind, TopK):
        seen[np.argsort(-scores, kind="stable")[: kind.count]] = True
    else:
        assert isinstance(kind, Blocks)
        own = (count - 1) // kind.size
        means = [scores[number * kind.size : (number + 1) * kind.size].mean() for number in range(own)]
        for number in (own, *np.argsort(-np.array(means), kind="stable")[: kind.count]):
            seen[number * kind.size : (number + 1) * kind.size] = True
    return seen


def attend(kind: Kind, query: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """The result (width) of one head for the last token: query (width), keys and values (keys, width) up to it."""
    scores = scale * (keys @ query)
    scores = np.where(_seen(kind, scores), scores, -np.inf)
    weights = np.exp(scores - scores.max())
    return np.asarray(weights / weights.sum() @ values)


def logits_after(kind: Kind, tokens: list[int]) -> np.ndarray:
    """The logits of the small decoder that follow a whole text."""
    w = small["weights"]()
    h = w["embedding"][tokens] + w["place"][: len(tokens)]
    q, k, v = ((h @ w[name]).reshape(-1, small["HEADS"], small["WIDTH"]) for name in ("wq", "wk", "wv"))
    mixed = [attend(kind, q[-1, head], k[:, head], v[:, head], 0.5) for head in range(small["HEADS"])]
    return np.asarray((h[-1] + np.concatenate(mixed) @ w["wo"]) @ w["head"])


@pytest.fixture(scope="session")
def reference():
    """`attend` and `logits_after`."""
    return attend, logits_after
