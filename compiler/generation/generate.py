"""Prompts in, new tokens out: one call for the prompts, then one for each token of all rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from ...errors import EngineError, EngineMismatchError, RecipeError
from ...targets.base import Runner
from ..signature import Signature
from ..states import COUNT, IDS, LOGITS, PAST, longest_draft, looks_back
from .choice import Choice, Stream
from .eviction import Eviction, check_eviction, steps_for
from .following import following
from .prefixes import Prefixes, read
from .prompts import check, rows_of, side_by_side
from .sampling import sampling_of
from .speculative import Proposer, Speculation, check_draft, speculate
from .steps import caches_of, steps_of


def generate(
    runner: Runner,
    signature: Signature,
    prompts: Any,
    *,
    max_new_tokens: int,
    do_sample: bool,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    stop: Iterable[int],
    seed: int,
    stream: Stream | None,
    prefixes: Prefixes | None = None,
    draft: tuple[Runner, Signature] | None = None,
    speculation: Speculation | None = None,
    eviction: Eviction | None = None,
) -> list[list[int]]:
    """The new tokens of each row; see `Engine.generate`."""
    check_decoder(signature)
    rows = rows_of(prompts)
    check(signature, rows, max_new_tokens, evicts=eviction is not None)
    check_eviction(signature, eviction, prefixes=prefixes is not None, draft=draft is not None)
    if prefixes is not None and len(rows) > 1:
        raise RecipeError(
            "prefixes are of one prompt at a time", expected="one prompt", found=f"{len(rows)} prompts",
            hint="give each to Engine.batcher(prefixes=...), which runs them side by side",
        )  # fmt: skip
    if draft is not None:
        check_decoder(draft[1])
    check_draft(signature, len(rows), draft[1] if draft else None, speculation, do_sample=do_sample)
    sampling = sampling_of(do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p)
    choices = [Choice(sampling, (seed, row), row=row) for row in range(len(rows))]
    ends = stops(stop)
    ids, counts = side_by_side(rows)
    if prefixes is None:
        steps = steps_for(runner, signature, len(rows), eviction)
        logits = steps(ids, np.zeros_like(counts), counts)
    else:
        caches = caches_of(runner, signature, 1)
        steps = steps_of(runner, signature, 1, caches)
        logits = read(steps, rows[0], caches, prefixes)
    if draft is not None:
        tokens = speculate(
            steps, Proposer(*draft), rows[0], logits[0], longest=longest_draft(signature), choice=choices[0],
            max_new_tokens=max_new_tokens, ends=ends, stream=stream, counts=speculation or Speculation(),
        )  # fmt: skip
        return [tokens]
    next_tokens = following(steps, logits, counts, choices, sampling, max_new_tokens)
    found: list[list[int]] = [[] for _ in rows]
    live = list(range(len(rows)))
    while live:
        latest = next_tokens(live)
        for row in live:
            found[row].append(int(latest[row]))
            if stream is not None:
                stream(row, found[row][-1])
        live = [row for row in live if found[row][-1] not in ends and len(found[row]) < max_new_tokens]
    return found


def check_decoder(signature: Signature) -> None:
    """Whether an engine is a decoder.

    Raises:
        EngineError: it has no cache.
        EngineMismatchError: its caches are of other shapes than generation needs.
    """
    if not signature.states:
        raise EngineError(
            "the engine has no cache, so it generates nothing",
            expected="an engine of a language model that was compiled with its cache",
            found=", ".join(map(str, signature.inputs)),
            hint="compile a folder of transformers, or a factory that gives a causal language model, without --input",
        )
    shapes = {spec.name: spec.shape for spec in (*signature.inputs, *signature.outputs)}
    batch = shapes.get(IDS, ("",))[0]
    for name, output in signature.states.items():
        shape = shapes.get(name, ())
        if len(shape) != 4 or shape[0] != batch or not all(isinstance(n, int) for n in shape[1:]):
            raise EngineMismatchError(
                f"cache {name!r} of the engine has the wrong shape",
                expected="(batch, heads, max_length, width)",
                found=shape or "no such input",
                hint="compile the model again",
            )
        if shapes.get(output) != shape:
            raise EngineMismatchError(
                f"cache {name!r} of the engine does not come back as it went in",
                expected=shape,
                found=shapes.get(output, "no such output"),
                hint="compile the model again",
            )
    if missing := [name for name in (IDS, PAST, COUNT, LOGITS) if name not in shapes]:
        raise EngineMismatchError(f"the engine has caches, and no {missing[0]!r}", hint="compile the model again")
    form = ("batch", "kept", "vocabulary") if looks_back(signature) else ("batch", "vocabulary")
    if len(shapes[LOGITS]) != len(form):
        raise EngineMismatchError(
            "the logits of the engine have the wrong shape",
            expected=f"({', '.join(form)})",
            found=shapes[LOGITS],
            hint="compile the model again",
        )


def stops(stop: Iterable[int]) -> Collection[int]:
    """The tokens that end a row.

    Raises:
        RecipeError: something else.
    """
    ends = frozenset([stop] if isinstance(stop, (int, np.integer)) else stop)
    if wrong := [end for end in ends if not isinstance(end, (int, np.integer))]:
        raise RecipeError("stop is no token", expected="token numbers", found=repr(wrong[0]))
    return frozenset(int(end) for end in ends)
