"""Turns the free-form parts of a manifest (source, details of an engine, environment) into labelled values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .numbers import ABSENT, UNITS, number

LABELS = {
    "fingerprint": "Fingerprint",
    "parameter_bytes": "Size of the parameters",
    "on_cpu": "Fell back to the CPU",
    "slice_s": "Time slice",
    "warmup_s": "Warm-up",
    "sm_clock_mhz": "SM clock",
    "sparse": "2:4 sparse layers",
}
"""Labels that the name of the key alone does not give."""

WORDS = {
    "cpu": "CPU",
    "gpu": "GPU",
    "gpus": "GPUs",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "onnx": "ONNX",
    "sha256": "SHA-256",
    "os": "OS",
}
"""Words with a spelling of their own."""

INLINE = 100
"""Characters up to which the items of a list are shown as one line."""


@dataclasses.dataclass(frozen=True)
class Fact:
    """A label with one text, or a list of texts, or facts of its own; only one of the three is filled."""

    label: str
    text: str = ""
    items: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()


def facts(values: Mapping[str, Any]) -> tuple[Fact, ...]:
    """The entries of a mapping as facts. Inner mappings keep their keys: those are names of packages or providers."""
    return tuple(_fact(label(key), key, value) for key, value in values.items())


def label(key: str) -> str:
    """A key as a heading: ``cpu_nodes`` is "CPU nodes", and a unit at its end is left to the value."""
    if key in LABELS:
        return LABELS[key]
    words = [WORDS.get(word, word) for word in _without_unit(key).split("_")]
    text = " ".join(filter(None, words))
    return text[:1].upper() + text[1:]


def _fact(name: str, key: str, value: Any) -> Fact:
    if isinstance(value, Mapping) and value:
        # {"build_timings_s": {"parse": 0.02}}: the unit of the whole holds for a part that names none.
        unit = key.removeprefix(_without_unit(key))
        parts = ((inner, inner if _without_unit(inner) != inner else inner + unit) for inner in value)
        return Fact(name, facts=tuple(_fact(_without_unit(inner), unit_key, value[inner]) for inner, unit_key in parts))
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        items = tuple(_text("", item) for item in value)
        short = sum(map(len, items)) <= INLINE
        return Fact(name, text=", ".join(items)) if short else Fact(name, items=items)
    return Fact(name, text=_text(key, value))


def _text(key: str, value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        unit = next((show for suffix, show in UNITS.items() if key.endswith(suffix)), None)
        # A seed or a build number is a name, not a quantity: no thousands separators under 10,000.
        return unit(value) if unit else str(value) if isinstance(value, int) and abs(value) < 10_000 else number(value)
    if isinstance(value, Mapping):
        return (
            ", ".join(
                f"{_without_unit(str(inner)).replace('_', ' ')} {_text(str(inner), v)}" for inner, v in value.items()
            )
            or "none"
        )
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_text("", item) for item in value) or "none"
    return str(value) or ABSENT


def _without_unit(key: str) -> str:
    return next((key[: -len(suffix)] for suffix in UNITS if key.endswith(suffix) and key != suffix), key)
