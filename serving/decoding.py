"""A language model with its cache as a service: a prompt goes in, and its tokens come back one by one.

    ids (length)            the prompt
    max_new_tokens (1)      and the options of `Engine.generate`, each of them if it is wanted
    token (1)               of each answer

That is a decoupled model of Triton: one request, many answers, the last of which is empty and marked as the last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..compiler.generation.choice import Choice
from ..compiler.generation.continuous import Request
from ..compiler.generation.generate import stops
from ..compiler.generation.prompts import rows_of
from ..compiler.generation.sampling import sampling_of
from ..errors import EnginesmithError, UsageError
from .config import MARK, Kind, instances
from .layout import TYPES
from .settings import Serving

PROMPT, TOKEN = "ids", "token"
OPTIONS: Mapping[str, tuple[str, int]] = {
    "max_new_tokens": ("int32", 1),
    "temperature": ("float32", 1),
    "top_k": ("int32", 1),
    "top_p": ("float32", 1),
    "seed": ("int64", 1),
    "stop": ("int64", -1),
}
"""Dtype and size of each option; -1 is any. A request that says anything of how to sample is sampled."""

TEXT, CANCEL = "text", "cancel"
"""Parameters of requests: a text's name, which its client makes up, and that of one which is to end."""

NEW_TOKENS = 128
"""Where a request does not say how many."""


def decoder_config(name: str, settings: Serving, *, engine: str, kind: Kind) -> str:
    """The text of config.pbtxt.

    Raises:
        UsageError: settings of merging, which has no meaning here: requests share calls of the engine by themselves.
    """
    given = settings.of_the_queue()
    given += [name for name, said in (("max_batch", settings.max_batch), ("no_merge", not settings.merge)) if said]
    if given:
        raise UsageError(
            f"{given[0]} is not for a language model with its cache",
            expected="no options of merging and queues",
            hint="requests share the calls of the engine token by token; how many do, was said by --decoder batch",
        )
    lines = [f"name: {json.dumps(name)}", 'backend: "python"', "max_batch_size: 0"]
    lines.append("model_transaction_policy { decoupled: true }")
    lines.append(f'input {{ name: "{PROMPT}" data_type: TYPE_INT64 dims: [-1] }}')
    for option, (dtype, size) in OPTIONS.items():
        lines.append(f'input {{ name: "{option}" data_type: TYPE_{TYPES[dtype]} dims: [{size}] optional: true }}')
    lines.append(f'output {{ name: "{TOKEN}" data_type: TYPE_INT64 dims: [1] }}')
    lines.append(instances(settings, kind))
    lines.append(f'parameters {{ key: "{MARK}" value {{ string_value: {json.dumps(engine)} }} }}')
    return "\n".join(lines) + "\n"


def request_of(
    given: Mapping[str, np.ndarray],
    stop: Sequence[int],
    take: Callable[[int], Any],
    done: Callable[[EnginesmithError | None], Any],
) -> Request:
    """What a request's arrays ask for.

    Args:
        stop: tokens that end a text where the request names none.

    Raises:
        DataError: the prompt is none.
        RecipeError: an option that is out of range.
    """
    options = {name: array.tolist() for name, array in given.items() if name in OPTIONS}
    one = {name: values[0] for name, values in options.items() if name != "stop"}
    how = {name: one.get(name) for name in ("temperature", "top_k", "top_p")}
    drawn = any(value is not None for value in how.values())
    sampling = sampling_of(do_sample=drawn, **how)
    (prompt,) = rows_of([given[PROMPT]])
    ends = stops(options.get("stop", stop))
    choice = Choice(sampling, one.get("seed", 0))
    return Request(prompt, one.get("max_new_tokens", NEW_TOKENS), choice, ends, take, done)
