"""The calls of a decoder: a model that keeps what it has seen in caches, which are inputs and outputs of a call.

    logits, *caches = decoder(ids, past, count, *caches)

`ids` (batch, time) are the next tokens of each row, padded on the right; `past` (batch) says how many tokens the row's
cache holds already, and `count` (batch) how many of its new ones are no padding. A cache has room for all tokens, on
its third axis: (batch, heads, length, width). `logits` (batch, vocabulary) are those of the token that follows the last
one of each row. `Signature.states` pairs the caches. An engine may keep them in float16, or in int8 with scales of its
own: its signature says so.

    logits, *caches = decoder(ids, past, count, back, *caches)

A decoder that checks drafts gives logits of several tokens of a row. `back` (kept) says how far before the last new
token of its row each of them stands, 0 for the last one itself, and `logits` (batch, kept, vocabulary) are those that
follow each. What would stand before the first new token is taken for the first.

Where a cache may be shorter than a text, since tokens are dropped from it, two things are told apart:

    logits, *caches = decoder(ids, past, count, position, *caches)

`position` (batch) is how many tokens of the text stand before `ids`, and `past` how many of them the cache still holds.
A key keeps the position at which it was made, whatever is dropped before it. Of a decoder that drops by importance each
layer has one more cache, `importance.N` (batch, heads, length, 1): the attention that its entries got so far, which is
the sum of softmax(scores) over all queries since an entry was written, and over the query heads that share its
key. Needs NumPy only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping

import numpy as np

from ..errors import DataError
from .signature import Signature, TensorSpec

IDS, PAST, COUNT, BACK, POSITION, LOGITS = "ids", "past", "count", "back", "position", "logits"
IMPORTANCE = "importance."
"""What the names of the caches begin with that hold attention, before the number of the layer."""

POLICIES = ("window", "importance")
"""How entries are chosen that a full cache drops."""


def caches(signature: Signature) -> list[TensorSpec]:
    """The inputs that are caches."""
    return [signature.input(name) for name in signature.states]


def max_length(signature: Signature) -> int:
    """How many tokens the caches hold."""
    return min(int(spec.shape[2]) for spec in caches(signature))


def evicts(signature: Signature) -> bool:
    """Whether entries may be dropped from the caches."""
    return any(spec.name == POSITION for spec in signature.inputs)


def policies(signature: Signature) -> tuple[str, ...]:
    """How entries may be chosen that are dropped."""
    if not evicts(signature):
        return ()
    return POLICIES if rates(signature) else POLICIES[:1]


def rates(signature: Signature) -> bool:
    """Whether some caches hold the attention that entries got, so that a call which is made twice adds to it twice."""
    return any(name.startswith(IMPORTANCE) for name in signature.states)


def vocabulary(signature: Signature) -> int | None:
    """How many tokens there are; None before the outputs are known."""
    size = next((spec.shape[-1] for spec in signature.outputs if spec.name == LOGITS), None)
    return size if isinstance(size, int) else None


def looks_back(signature: Signature) -> bool:
    """Whether a call takes `back`, and gives logits of several tokens of a row."""
    return any(spec.name == BACK for spec in signature.inputs)


def longest_draft(signature: Signature) -> int:
    """How many tokens of a draft one call checks, at most: one place of `back` is that of the token before them."""
    if not looks_back(signature):
        return 0
    axes = (signature.input(BACK).shape[0], signature.input(IDS).shape[1])
    return min(signature.axes[axis].max if isinstance(axis, str) else axis for axis in axes) - 1


def class_scores(signature: Signature) -> frozenset[str]:
    """The outputs that are class scores, of which a rank of 3 alone would not tell it."""
    return frozenset([LOGITS] if signature.states and looks_back(signature) else [])


def empty_caches(signature: Signature, batch: int) -> dict[str, np.ndarray]:
    """Caches that hold nothing yet, for so many rows."""
    return {
        spec.name: np.zeros([batch if isinstance(size, str) else size for size in spec.shape], spec.dtype)
        for spec in caches(signature)
    }


def row_bytes(signature: Signature) -> int:
    """Bytes that the caches of one row take."""
    return sum(math.prod(map(int, spec.shape[1:])) * np.dtype(spec.dtype).itemsize for spec in caches(signature))


def in_eight_bits(signature: Signature) -> list[str]:
    """The caches that an engine keeps in 8 bits."""
    return [spec.name for spec in caches(signature) if spec.dtype == "int8"]


def in_sixteen_bits(signature: Signature) -> list[str]:
    """The caches that an engine keeps in float16."""
    return [spec.name for spec in caches(signature) if spec.dtype == "float16"]


def as_floats(signature: Signature) -> Signature:
    """What a call takes and gives whose caches are the model's own: float32, whatever they are kept in."""
    return as_stored(signature, dict.fromkeys((*in_eight_bits(signature), *in_sixteen_bits(signature)), "float32"))


def as_stored(signature: Signature, dtypes: Mapping[str, str]) -> Signature:
    """The same with these dtypes of caches, by the name of the input."""
    changed = {**dtypes, **{signature.states[name]: dtype for name, dtype in dtypes.items()}}
    inputs, outputs = (
        tuple(dataclasses.replace(spec, dtype=changed.get(spec.name, spec.dtype)) for spec in specs)
        for specs in (signature.inputs, signature.outputs)
    )
    return dataclasses.replace(signature, inputs=inputs, outputs=outputs)


def numbers(signature: Signature) -> tuple[str, ...]:
    """The inputs that are no caches."""
    return tuple(spec.name for spec in signature.inputs if spec.name not in signature.states)


def call(
    names: Collection[str],
    ids: np.ndarray,
    past: np.ndarray,
    count: np.ndarray,
    back: np.ndarray | None,
    position: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """The inputs of these names; where they are not said, `back` is the last token, and nothing was dropped."""
    given = {
        IDS: ids, PAST: past, COUNT: count, BACK: np.zeros(1, np.int64) if back is None else back,
        POSITION: past if position is None else position,
    }  # fmt: skip
    return {name: given[name] for name in names}


def asked_for(logits: np.ndarray, back: np.ndarray | None) -> np.ndarray:
    """What a call with this `back` asks for: where it says nothing, those of the last token, (batch, vocabulary)."""
    return logits[:, 0] if back is None and logits.ndim == 3 else logits


def completed(signature: Signature, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Data of a decoder, which may be tokens alone: whole prompts, with nothing before them."""
    given = dict(batch)
    if IDS not in given or given[IDS].ndim != 2:
        return given
    rows, length = given[IDS].shape
    given[IDS] = given[IDS].astype(signature.input(IDS).dtype)
    given.setdefault(PAST, np.zeros(rows, signature.input(PAST).dtype))
    given.setdefault(COUNT, np.full(rows, length, signature.input(COUNT).dtype))
    if evicts(signature):
        given.setdefault(POSITION, given[PAST])
    if looks_back(signature):
        given.setdefault(BACK, np.zeros(1, signature.input(BACK).dtype))
    if missing := [name for name in signature.states if name not in given]:
        if len(missing) < len(signature.states):
            raise DataError(
                f"data hold some of the caches, and not {missing[0]!r}", expected="all of them, or none", found=missing
            )
        given.update(empty_caches(signature, rows))
    return given


def made_up(
    signature: Signature, batch: Mapping[str, np.ndarray], generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """A random batch with tokens of the whole vocabulary, rows of different lengths, and caches filled up to `past`.

    Of a decoder that checks drafts, logits of any of the new tokens are wanted.
    """
    rows, length = batch[IDS].shape
    room = max_length(signature)
    past = generator.integers(0, room - length + 1, rows)
    filled = np.arange(room) < past[:, None]
    made = {
        **{name: array if name not in signature.states else _up_to(array, filled) for name, array in batch.items()},
        IDS: generator.integers(0, vocabulary(signature) or 2, (rows, length)).astype(batch[IDS].dtype),
        PAST: past.astype(batch[PAST].dtype),
        COUNT: generator.integers(1, length + 1, rows).astype(batch[COUNT].dtype),
    }
    if evicts(signature):
        dropped = generator.integers(0, (signature.positions or room) - room + 1, rows)
        made[POSITION] = (past + dropped).astype(batch[POSITION].dtype)
    if looks_back(signature):
        made[BACK] = generator.integers(0, length, len(batch[BACK])).astype(batch[BACK].dtype)
    return made


def next_tokens(
    signature: Signature, batch: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], rows: int
) -> dict[str, np.ndarray]:
    """The call of one token in each of so many rows, behind what another call left in its caches.

    Row r is one of those of the other call without its first r entries, so that no two of them are alike.

    Args:
        batch: the inputs of the other call.
        outputs: what it gave.
    """
    room, length = max_length(signature), batch[IDS].shape[1]
    numbers = np.arange(rows)
    source = numbers % len(batch[IDS])
    filled = np.minimum(np.minimum(batch[PAST], room - length) + batch[COUNT], room - 1)[source]
    gone = np.minimum(numbers, filled)
    past = (filled - gone).astype(batch[PAST].dtype)
    made = {
        name: _up_to(
            np.stack([np.roll(outputs[made][row], -first, axis=1) for row, first in zip(source, gone, strict=True)]),
            np.arange(room) < past[:, None],
        )
        for name, made in signature.states.items()
    }
    made |= {
        IDS: batch[IDS][source, numbers % length][:, None], PAST: past, COUNT: np.ones(rows, batch[COUNT].dtype)
    }  # fmt: skip
    if evicts(signature):
        made[POSITION] = (batch[POSITION] + batch[COUNT])[source]
    if looks_back(signature):
        made[BACK] = np.zeros_like(batch[BACK])
    return {spec.name: made[spec.name] for spec in signature.inputs}


def _up_to(cache: np.ndarray, filled: np.ndarray) -> np.ndarray:
    return np.where(filled[:, None, : cache.shape[2], None], cache, 0).astype(cache.dtype)


def in_the_middle(signature: Signature, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The call with caches that are half full, as generation meets them on the average: what is timed."""
    rows, length = batch[IDS].shape
    half = min(max_length(signature) // 2, max_length(signature) - length)
    past = np.full(rows, half, batch[PAST].dtype)
    back = {BACK: np.zeros_like(batch[BACK])} if looks_back(signature) else {}
    position = {POSITION: past} if evicts(signature) else {}
    return {**batch, **back, **position, PAST: past, COUNT: np.full(rows, length, batch[COUNT].dtype)}
