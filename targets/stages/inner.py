"""The target of a pipeline's stages: its text within the options of another target, and the device of each stage."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import RecipeError
from ..base import Target


def parse_inner(text: str) -> Target:
    """A target from its text, whose options are joined by ``+``; a tuple's items too: those without ``=`` go on with
    the option before.
    """
    from .. import parse_target

    name, colon, tail = text.partition(":")
    if name.endswith(".py"):
        cls, colon, tail = tail.partition(":")
        name = f"{name}:{cls}"
    items: list[str] = []
    for item in filter(None, tail.replace(",", "+").split("+")):
        if "=" in item or not items:
            items.append(item)
        else:
            items[-1] += f"+{item}"
    return parse_target(f"{name}{colon}{','.join(items)}")


def joined(text: str) -> str:
    """Options of a target joined by ``+``, as they stand within the options of another."""
    return text.replace(",", "+")


def device_of(inner: Target, devices: Sequence[str], number: int) -> str:
    """Where a stage runs, ``cuda:N`` or ``cpu``.

    Args:
        devices: one for each stage, one for all, or none for GPUs 0, 1, ... or the CPU.

    Raises:
        RecipeError: a device that the stages' target does not run on.
    """
    on_gpu, chooses = "cpu" not in inner.capabilities.devices, "device_id" in inner.options()
    if not devices:
        return f"cuda:{number if chooses else 0}" if on_gpu else "cpu"
    text = devices[number if len(devices) > 1 else 0]
    kind, _, index = text.partition(":")
    known = kind == "cuda" and index.isdecimal() and (chooses or index == "0") if on_gpu else text == "cpu"
    if not known:
        expected = ("cuda:0, cuda:1, ..." if chooses else "cuda:0") if on_gpu else "cpu"
        raise RecipeError(f"stages of {inner.name} do not run on {text!r}", expected=expected)
    return text
