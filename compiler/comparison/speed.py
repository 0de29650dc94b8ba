"""Times B against A, interleaved."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import EngineError
from ..benchmark import Candidate, Settings, benchmark
from ..manifest import Benchmark
from ..recipe import Recipe, make_recipe
from .checks import speed_checks
from .inputs import opened_like, sized_inputs
from .pair import Pair, pair
from .records import Check
from .rules import Rules


def race(
    a: str | Path, b: str | Path, rules: Rules, sizes: Sequence[Mapping[str, int]], fields: Mapping[str, Any]
) -> list[Check]:
    """The checks of speed alone. Raises as `compare`."""
    recipe = make_recipe(fields, "call")
    return speed_checks(timed(pair(a, b, sizes, recipe), recipe), rules)


def timed(both: Pair, recipe: Recipe, update: Callable[[float, str], None] = lambda fraction, what: None) -> Benchmark:
    """Times both on the first sample, at every size. B may fail, A may not.

    Raises:
        EngineError: A could not be timed.
    """
    sample = both.samples.first()
    assert sample is not None
    result = benchmark(
        [
            Candidate("A", both.a.open),
            Candidate("B", functools.partial(opened_like, both.b, both.a.signature)),
        ],
        sized_inputs(both.a.signature, sample.inputs, both.sizes),
        baseline="A",
        protocol=Settings(
            rounds=recipe.rounds, slice_s=recipe.slice_s, transfers=recipe.with_transfers, seed=recipe.seed
        ),
        on_progress=update,
    )
    if not any(timing["candidate"] == "A" for timing in result["timings"]):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in result["skipped"].items())
        raise EngineError(f"A ({both.a}) could not be timed", found=reasons)
    return result
