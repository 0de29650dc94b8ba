"""What TensorRT's log tells of 2:4 sparse weights: which layers could run sparse, and which do.

    8.6, 9    (Sparsity) Layers eligible for sparse math: conv1 + relu1, conv2
              (Sparsity) TRT inference plan picked sparse implementation for layers: conv2
    10, 11    (Sparsity) Found 2 layer(s) eligible to use sparse tactics: conv1 + relu1, conv2
              (Sparsity) Chose 1 layer(s) using sparse tactics: conv2
    RTX       nothing: it chooses kernels on the GPU, when an engine is first used

Needs the standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

PREFIX = "(Sparsity)"

_ELIGIBLE = re.compile(
    r"(?:Layers eligible for sparse math|(\d+) layer\(s\) eligible to use sparse tactics):?(.*)", re.S
)
_PICKED = re.compile(
    r"(?:picked sparse implementation for layers|Chose (\d+) layer\(s\) using sparse tactics):?(.*)", re.S
)


def sparse_layers(messages: Iterable[str]) -> dict[str, Any]:
    """The layers that the messages of one build name.

    Returns:
        eligible: layers whose weights have the pattern, and which have sparse kernels.
        picked: those that run sparse, as that is faster.
        source: where this is from.
    """
    told = [message for message in messages if message.startswith(PREFIX)]
    eligible, picked = (_layers(pattern, told) for pattern in (_ELIGIBLE, _PICKED))
    if eligible is None and picked is None:
        return {"eligible": [], "picked": [], "source": "none, the log of the build says nothing of sparse kernels"}
    return {"eligible": eligible or [], "picked": picked or [], "source": "log of the build"}


def _layers(pattern: re.Pattern[str], messages: list[str]) -> list[str] | None:
    """Names of all messages that match, None where none does. Counts alone come before the names, or without them."""
    found = [match for message in messages if (match := pattern.search(message))]
    if not found:
        return None
    names = [name.strip() for match in found for name in match.group(2).split(", ")]
    named = list(dict.fromkeys(filter(None, names)))
    count = max(int(match.group(1) or 0) for match in found)
    return named or ([f"{count} layers, which the log does not name"] if count else [])
