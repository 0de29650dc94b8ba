"""A job with one engine that is a text file: `python reuse_example.py CACHE WORK` builds it once a line comes in."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

from enginesmith.compiler.build import Job
from enginesmith.compiler.data import open_data
from enginesmith.compiler.progress import Progress, Stages
from enginesmith.compiler.recipe import Recipe
from enginesmith.compiler.reuse import build_or_reuse
from enginesmith.compiler.signature import Signature, TensorSpec
from enginesmith.compiler.storage.cache import Cache
from enginesmith.errors import EngineError
from enginesmith.targets.base import Availability, Capabilities, Target

SIGNATURE = Signature((TensorSpec("x", "float32", (2,)),), (TensorSpec("y", "float32", (2,)),))


@dataclasses.dataclass(frozen=True)
class Text(Target):
    facts: str | None = ""
    works: bool = True

    name: ClassVar[str] = "text"
    summary: ClassVar[str] = "for tests"
    capabilities: ClassVar[Capabilities] = Capabilities("module", ("fp32", "fp8"), ("cpu",), calibrated=("fp8",))

    def availability(self):
        return Availability(True, True)

    def built_for(self):
        return None if self.facts is None else {"facts": self.facts}

    def build(self, request):
        print("builds", flush=True)
        if not sys.stdin.isatty() and __name__ == "__main__":
            sys.stdin.readline()
        calibration = None if request.calibration is None else [float(batch["x"][0]) for batch in request.calibration]
        (request.directory / "model").write_text("text" if calibration is None else f"text for {calibration}")
        return self.info(request, "model", {})

    def describe(self, info, request):
        return dataclasses.replace(info, details={"described": (request.directory / info.entry).read_text()})

    def runner(self, directory, info):
        def run(inputs):
            if not self.works:
                raise EngineError("illegal instruction")

        return SimpleNamespace(run=run, close=lambda: None)


class Printed(Progress):
    def update(self, fraction, what):
        print(what, flush=True)


def build(
    cache: Path, work: Path, target: Target | None = None, machine: str = "a", graph=None, signature=SIGNATURE,
    precision: str = "fp32", **fields,
):  # fmt: skip
    """The engine's description, whether it was cached, and the log."""
    target = target or Text()
    directory = work / "engine"
    directory.mkdir(parents=True)
    recipe = Recipe(model="/home/me/net.py:net", timeout_s=60, **fields)
    machine_facts = {"cpu": machine}
    job = Job(recipe, (target,), (), (), machine_facts, Cache(cache), work, work, Stages(Printed(), 1))
    model = SimpleNamespace(fingerprint="f", signature=signature)
    data = open_data(None, signature)
    log: list[str] = []
    info, cached = build_or_reuse(job, target, precision, graph, model, data, directory, log, target.availability())
    return info, cached, log


if __name__ == "__main__":
    _, reused, lines = build(Path(sys.argv[1]), Path(sys.argv[2]))
    print(reused, *lines, sep="; ", flush=True)
