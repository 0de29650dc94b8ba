"""A plain module whose inputs declare its caches: ``ids``, ``past``, ``count``, and any number of caches.

It may take ``back`` (kept) too, and then gives logits (batch, kept, vocabulary), and ``position`` (batch), where tokens
may be dropped from its caches: see states.py.

Each cache ``x`` comes back as an output that is named as it is: ``forward`` returns ``{"logits": ..., "x": ...}``. An
output that has the name of an input gets ``_out`` appended.
"""

from __future__ import annotations

import dataclasses

from ....errors import RecipeError, SourceError
from ...signature import Signature, TensorSpec
from ...states import BACK, COUNT, IDS, LOGITS, PAST, POSITION, looks_back
from .. import Model

CALL = (IDS, PAST, COUNT)


def with_states(model: Model) -> Model:
    """The model with its caches paired.

    Raises:
        SourceError: it has no cache, or one that does not come back.
        RecipeError: its calls are other than those of a decoder.
    """
    signature = model.signature
    named = {spec.name: spec for spec in signature.inputs}
    if missing := [name for name in CALL if name not in named]:
        raise RecipeError(
            f"a decoder takes {missing[0]!r}, which is not among the inputs",
            expected="inputs ids (batch, time), past (batch) and count (batch) of int64, and the caches",
            found=", ".join(named) or "none",
            hint=f"declare it with --input {missing[0]}:1:int64",
        )
    for name, rank in ((IDS, 2), (PAST, 1), (COUNT, 1), (POSITION, 1)):
        if name in named and (named[name].dtype != "int64" or len(named[name].shape) != rank):
            raise RecipeError(
                f"input {name!r} of the decoder is of another kind", expected=_kind(rank), found=named[name]
            )
    if looks_back(signature):
        _check_back(signature, named[BACK])
    caches = [spec for spec in signature.inputs if spec.name not in (*CALL, BACK, POSITION)]
    if not caches:
        raise SourceError(
            "the model has no cache",
            expected="inputs beside ids, past and count that come back as outputs",
            found="none",
            hint="give a transformers model or folder, or leave --decoder out",
        )
    outputs = {spec.name: spec for spec in signature.outputs}
    _check_logits(signature, outputs.get(LOGITS))
    for spec in caches:
        _check_pair(signature, spec, outputs.get(f"{spec.name}_out"))
    states = {spec.name: f"{spec.name}_out" for spec in caches}
    return dataclasses.replace(model, signature=dataclasses.replace(signature, states=states))


def _check_back(signature: Signature, back: TensorSpec) -> None:
    (axis,) = back.shape if len(back.shape) == 1 else (None,)
    if back.dtype != "int64" or not isinstance(axis, str) or signature.axes[axis].min != 1:
        raise RecipeError(
            "input 'back' of the decoder is of another kind",
            expected="(kept) of int64, an axis that is dynamic from 1 on",
            found=f"{back.dtype} {signature.describe(back)}",
            hint="declare it with --input back:1:int64 --dynamic back:0=kept@1..1..5",
        )


def _check_logits(signature: Signature, logits: TensorSpec | None) -> None:
    expected = "(batch, kept, vocabulary)" if looks_back(signature) else "(batch, vocabulary)"
    if logits is None:
        raise SourceError(
            "the decoder gives no logits",
            expected=f"output 'logits' {expected}",
            found=", ".join(spec.name for spec in signature.outputs),
        )
    kept = signature.input(BACK).shape if looks_back(signature) else ()
    if len(logits.shape) != 2 + len(kept) or logits.shape[1:-1] != kept:
        raise SourceError(
            "the logits of the decoder have the wrong shape", expected=expected, found=signature.describe(logits)
        )


def _check_pair(signature: Signature, given: TensorSpec, returned: TensorSpec | None) -> None:
    if len(given.shape) != 4 or not isinstance(given.shape[2], int):
        raise SourceError(
            f"cache {given.name!r} has the wrong shape",
            expected="(batch, heads, max_length, width), of which the batch alone is dynamic",
            found=signature.describe(given),
        )
    if returned is None:
        raise SourceError(
            f"cache {given.name!r} does not come back",
            expected=f"an output named {given.name!r}, or {given.name}_out",
            found=", ".join(spec.name for spec in signature.outputs),
        )
    if (returned.shape, returned.dtype) != (given.shape, given.dtype):
        raise SourceError(
            f"cache {given.name!r} comes back as something else", expected=str(given), found=str(returned)
        )


def _kind(rank: int) -> str:
    return "(batch, time) of int64" if rank == 2 else "(batch) of int64"
