"""What a comparison finds, as plain JSON. Units are in the names; a number that does not exist is None."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from ..manifest import Benchmark, OutputMetrics, Tolerance, Validation

State = Literal["passed", "failed", "information", "skipped"]


class SideRecord(TypedDict):
    """One of the two engines. `created` and `fingerprint` are of its bundle, empty where it has none."""

    path: str
    engine: str
    target: str
    precision: str
    created: str
    fingerprint: str
    size_bytes: int
    gpu_memory_bytes: int | None


class MetricChange(TypedDict):
    """The task metric of both on the same rows, with the 95 % bootstrap interval of B's less A's, row by row.

    Numbers of B are None where its metric is not finite.
    """

    name: str
    a: float
    b: float | None
    change: float | None
    low: float | None
    high: float | None
    rows: int


class Results(TypedDict):
    """What both give on the same inputs, and each beside the record of its reference.

    `a` and `b` are None where there is no record. `between` holds B's outputs with A's as their reference, within the
    looser bounds of the two; `own_record` tells whether each was judged on a record of its own.
    """

    inputs: str
    samples: int
    between: list[OutputMetrics]
    tolerance: Tolerance
    a: Validation | None
    b: Validation | None
    own_record: dict[str, bool]
    metric: MetricChange | None


class Check(TypedDict):
    """One thing that was looked at. `kind` is one of `rules.KINDS`, `name` a size, an output or a quantity.

    `verdict` is a word: faster, equal, slower, unclear or not measured for speed; within bounds, worse or unknown for
    accuracy; equal or different for results; smaller, equal or larger for growth. `state` follows from it by the rules:
    "information" where it would fail, and its kind does not count.
    """

    kind: str
    name: str
    verdict: str
    state: State
    text: str
    numbers: dict[str, float | None]
    seconds: float


class Comparison(TypedDict):
    """The comparison of B with A.

    `verdict` is {"passed", "text", "speed", "accuracy", "results", "reasons"}; `same_model` whether both were made from
    the same source and weights, None where that is not known; `rules` are the fields of `Rules`.
    """

    a: SideRecord
    b: SideRecord
    same_model: bool | None
    rules: dict[str, Any]
    verdict: dict[str, Any]
    checks: list[Check]
    results: Results
    benchmark: Benchmark | None
    notes: list[str]
    seconds: float
