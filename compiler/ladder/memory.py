"""Remembers what came of rungs, so that a search that was interrupted goes on where it ended.

A rung is known again where the model, its data, the machine, the code and the engines of the rung are the same.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..build import Job
from ..extensions import code_of
from ..manifest import LadderStep
from ..recipe import Recipe
from ..reuse import described
from ..storage.cache import key
from ..storage.fingerprint import compile_key, is_repeatable
from ..variants import Variant
from .rungs import Rung
from .trials import Contender

IRRELEVANT = (
    *("targets", "precisions", "require", "baselines", "benchmark"),
    *("effort", "time_limit_s", "timeout_s", "align", "prune", "sparsify", "sparse_attention"),
)
"""Fields of a recipe that decide which steps are tried, and not what comes of one."""


class Memory:
    """The rungs of compiles, in the cache."""

    def __init__(self, job: Job, model_fingerprint: str) -> None:
        self._job = job
        self._base = compile_key(_relevant(job.recipe), job.machine, model_fingerprint)
        self._keeps = is_repeatable(job.recipe) and not job.recipe.pruned_weights

    def recall(self, rung: Rung, incumbent: Variant) -> tuple[list[LadderStep], Contender | None] | None:
        """What came of a rung, with the engine that was kept back in its folder; None where that is not known."""
        if not self._keeps or not rung.candidates:
            return None
        with self._job.cache.reading("trials", self._key(rung, incumbent)) as kept:
            if kept is None:
                return None
            found: dict[str, Any] = json.loads((kept.content / "rung.json").read_text())
            steps: list[LadderStep] = [LadderStep(**{**step, "resumed": True}) for step in found["steps"]]  # type: ignore[typeddict-item]
            if found["winner"] is None:
                return steps, None
            variant = next(variant for variant in rung.candidates if variant.name == found["winner"])
            shutil.copytree(kept.content / "engine", self._job.folder / "engines" / variant.name)
        return steps, Contender(variant, found["record"], tuple(found["passes"]))

    def keep(self, rung: Rung, incumbent: Variant, steps: list[LadderStep], winner: Contender | None) -> None:
        """Remembers a rung in which nothing was left out for want of time."""
        if not self._keeps or not rung.candidates or any(out_of_time(step) for step in steps):
            return
        with tempfile.TemporaryDirectory(dir=self._job.scratch) as name:
            folder = Path(name) / "rung"
            folder.mkdir()
            found: dict[str, Any] = {"steps": steps, "winner": None, "record": None, "passes": []}
            if winner:
                found |= {"winner": winner.variant.name, "record": winner.record, "passes": list(winner.passes)}
                shutil.copytree(self._job.folder / "engines" / winner.variant.name, folder / "engine")
            (folder / "rung.json").write_text(json.dumps(found, default=float))
            what = {
                "model": described(self._job.recipe.model),
                "target": str(incumbent.target),
                "precision": incumbent.precision,
                "rung": rung.name,
            }
            self._job.cache.put("trials", self._key(rung, incumbent), folder, what=what)

    def _key(self, rung: Rung, incumbent: Variant) -> str:
        return key({"base": self._base, "rung": rung.name, "against": _identity(incumbent), "of": rung_identity(rung)})


def rung_identity(rung: Rung) -> list[Any]:
    """What a rung tries."""
    return [*map(_identity, rung.candidates), dict(rung.left_out), rung.asked]


def out_of_time(step: LadderStep) -> bool:
    """Whether a step was left out for want of time."""
    return step["status"] == "skipped" and step["reason"].startswith("no time")


def _identity(variant: Variant) -> list[Any]:
    sources = [variant.target.source, *(rewrite.source for rewrite in variant.passes)]
    own = [code_of(source) for source in sources if source]
    return [variant.name, str(variant.target), variant.precision, [str(rewrite) for rewrite in variant.passes], own]


def _relevant(recipe: Recipe) -> Recipe:
    defaults = {name: Recipe.model_fields[name].get_default(call_default_factory=True) for name in IRRELEVANT}
    return recipe.model_copy(update=defaults)
