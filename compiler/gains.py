"""Whether engines are worth what they cost in accuracy, and what becomes of those that are not.

lower precision            is told where it is slower than full precision on the same target
an optional step, such     is dropped unless it is measured faster than its sibling, the engine without that step,
as sparse weights          and stays within its bounds on the error
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .manifest import Benchmark, EngineRecord, SpeedUp, Validation
from .signature import Signature
from .states import in_eight_bits
from .validation.metrics import TOLERANCES

if TYPE_CHECKING:
    from ..targets.base import EngineInfo

LEVEL = 1.03
"""Ratio of two medians up to which they are called equal."""

FASTER = 1.02
"""Ratio to its sibling's speed that an engine has to beat with its whole interval; less is not worth another model."""

STEPS = {"pruned": "pruned", "sparse": "made sparse", "sparse-attention": "attended to sparsely", "aligned": "aligned"}
"""Optional steps, as names of engines end, and what they do in a sentence."""

LOSSY = "int8"
"""The precision whose bounds hold for an engine with a lossy step: it approximates the model, as 8 bits do."""

STORED = "int8-weights"
"""Likewise where caches are kept in 8 bits: keys and values are rounded as weights are, and products are not."""

_LOSSY = ("-pruned", "-sparse")
"""Steps that change results, in the names of engines; the latter is sparse weights and sparse attention."""


def is_lossy(engine: EngineRecord) -> bool:
    """Whether an optional step of an engine changes its results."""
    return _is_lossy(engine["name"])


def judged_as(info: EngineInfo) -> str:
    """The precision whose bounds hold for an engine."""
    if _is_lossy(info.name):
        return LOSSY
    stored = [STORED] if in_eight_bits(info.signature) else []
    return max((info.precision, *stored), key=list(TOLERANCES).index)


def _is_lossy(name: str) -> bool:
    return any(step in name for step in _LOSSY)


def drop(engines: Sequence[EngineRecord], benchmark: Benchmark | None, signature: Signature) -> None:
    """Notes in the records of engines with a sibling why they are dropped: wrong, or not faster at the optimum sizes.

    What was not measured stays, as nothing speaks against it.
    """
    ratios = _against_siblings(benchmark, signature.sizes())
    for engine in engines:
        if engine["sibling"] is None:
            continue
        validation, ratio = engine["validation"], ratios.get(engine["name"])
        if validation is not None and not validation["passed"]:
            engine["dropped"] = f"its results are not close enough to the reference: {problem(validation)}"
        elif ratio is not None and ratio["low"] <= FASTER:
            engine["dropped"] = (
                f"it is not faster than {ratio['against']}: {ratio['ratio']:.2f} times its speed, "
                f"95 % interval {ratio['low']:.2f} to {ratio['high']:.2f}, which has to lie above {FASTER:g}"
            )


def notes(engines: Sequence[EngineRecord], benchmark: Benchmark | None, signature: Signature) -> list[str]:
    """What the verdict says of engines that lost accuracy and gained nothing, or whose gain is not known."""
    ratios = _against_siblings(benchmark, signature.sizes())
    found = []
    for engine in engines:
        if engine["dropped"]:
            found.append(f"{engine['name']} is dropped: {engine['dropped']}")
        elif engine["sibling"] is not None and engine["status"] in ("ready", "built") and engine["name"] not in ratios:
            found.append(
                f"{engine['name']} was not measured against {engine['sibling']}, which it has to be faster than"
            )
    return [*found, *_slower([engine for engine in engines if engine["sibling"] is None], benchmark)]


def _against_siblings(benchmark: Benchmark | None, sizes: Mapping[str, int]) -> dict[str, SpeedUp]:
    timings = benchmark["timings"] if benchmark else []
    return {t["candidate"]: ratio for t in timings if t["sizes"] == sizes and (ratio := t["against_sibling"])}


def problem(validation: Validation) -> str:
    """The first thing that is wrong with an engine's results."""
    failures = [f"output {output['output']}: {text}" for output in validation["outputs"] for text in output["failures"]]
    budget = validation["budget"]
    if budget and not budget["holds"]:
        failures.insert(0, f"budget {budget['text']}, {budget['problem'] or budget['value']}")
    return failures[0] if failures else "no sample was judged"


def _slower(engines: Sequence[EngineRecord], benchmark: Benchmark | None) -> list[str]:
    """Engines that lost accuracy and gained nothing: slower somewhere than the same target's in full precision."""
    full = {engine["target"]: engine["name"] for engine in engines if engine["precision"] == "fp32"}
    timings = benchmark["timings"] if benchmark else []
    p50_ms = {(timing["candidate"], timing["batch"], *timing["sizes"].items()): timing["p50_ms"] for timing in timings}
    found = []
    for engine in engines:
        name, against = engine["name"], full.get(engine["target"])
        mine = {key[1:]: value for key, value in p50_ms.items() if key[0] == name}
        if engine["precision"] == "fp32" or not mine:
            continue
        if against is None:
            found.append(f"{name} was not compared with fp32 on the same target; add --precision fp32")
            continue
        other = {key[1:]: value for key, value in p50_ms.items() if key[0] == against}
        ratios = {key[0]: value / other[key] for key, value in mine.items() if key in other}
        if slower := {batch: ratio for batch, ratio in ratios.items() if ratio > LEVEL}:
            where = ", ".join(f"{ratio:.2f} times its time at batch {batch}" for batch, ratio in slower.items())
            found.append(f"{name} is slower than {against}: {where}")
    return found
