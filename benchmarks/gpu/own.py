"""enginesmith's engines of a row, built through the public API by one target each.

fp16      that precision with the target's defaults
int8      8 bits where the target has them, within LOSSY_BUDGET
fp8       likewise
auto      what the ladder picks within the budget of fp16
auto-int8 what it picks within LOSSY_BUDGET
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import enginesmith
from enginesmith.compiler.trial import open_runner
from enginesmith.compiler.variants import builds
from enginesmith.targets import parse_target
from gpu.peers import Openers, Step
from gpu.row import FP16_BUDGET, Row

OWN = "enginesmith "
"""What the names of our steps and candidates begin with."""

KINDS = ("fp16", "fused", "int8", "fp8", "auto", "auto-int8")
LOSSY_BUDGET = 0.06
"""Relative L2 that INT8 and mixed precision may cost, where they are asked for."""

ROWS_IN_INT8 = ("resnet50 b32", "bert_base b32")
"""The rows that are to be 1.3 times as fast as the best peer within LOSSY_BUDGET."""

TARGETS = {
    "cuda": ("onnxruntime-cuda", "tensorrt", "torch-inductor:device=cuda"),
    "cpu": ("onnxruntime-cpu", "torchscript"),
}
AGREEMENT = {"fp16": {"top1": 0.9}, "int8": {"top1": 0.8}, "fp8": {"top1": 0.8}, "mixed": {"top1": 0.8}}
"""The best of 1,000 classes is nearly a toss-up where weights are random: the relative L2 decides."""

VALIDATED = 8
"""Batches that engines are validated on at most."""


def steps(
    row: Row, targets: Sequence[str], kinds: Sequence[str], *, effort: str = "quick", time_limit_s: float = 300
) -> dict[str, Step]:
    """A step for each target and kind that it has; those in INT8 on rows that have a goal for it."""
    found = {}
    for text in targets:
        target = parse_target(text)
        lossy = row.name in ROWS_IN_INT8 and row.device == "cuda"
        int8, fp8 = (lossy and builds(target, precision) for precision in ("int8", "fp8"))
        has = {"fused": bool(target.rewrites("fp16")), "int8": int8, "fp8": fp8, "auto-int8": int8 or fp8}
        for kind in kinds:
            if not has.get(kind, True):
                continue
            prepare = functools.partial(compile, target=text, kind=kind, effort=effort, time_limit_s=time_limit_s)
            opener = functools.partial(engine, target=text, kind=kind)
            found[f"{OWN}{text} {kind}"] = Step(prepare, opener, needs_gpu=target.capabilities.gpu_to_build)
    return found


def compile(row: Row, *, target: str, kind: str, effort: str, time_limit_s: float) -> dict[str, Any]:
    """Builds a bundle in the row's folder, and tells what the ladder found."""
    fields: dict[str, Any] = {
        "inputs": row.inputs,
        "data": str(row.data),
        "targets": [target],
        "precisions": [row.half],
        "max_samples": VALIDATED,
        "reference_device": row.device,
        "tolerances": AGREEMENT,
        "baselines": [],
        "benchmark": False,
    }
    if kind == "fused":
        fields["passes"] = ["simplify", "dedupe", *parse_target(target).rewrites("fp16")]
    if kind in ("int8", "fp8"):
        fields |= {"precisions": [kind], "budget": f"relative_l2={LOSSY_BUDGET}"}
    if kind.startswith("auto"):
        budget = LOSSY_BUDGET if kind == "auto-int8" else FP16_BUDGET
        fields |= {"precisions": ["auto"], "benchmark": True, "rounds": 6, "effort": effort}
        fields |= {"time_limit_s": time_limit_s, "budget": f"relative_l2={budget}"}
    bundle = enginesmith.compile(row.measured.source, bundle_folder(row, target, kind), **fields)
    ladder = bundle.manifest.get("ladder")
    shown = ("step", "what", "status", "reason", "ratio", "relative_l2")
    return {
        "asked": {key: value for key, value in fields.items() if key not in ("data", "inputs")},
        "engines": {engine["name"]: _facts(bundle.path, engine) for engine in bundle.manifest["engines"]},
        "ladder": ladder
        and {
            "seconds": round(ladder["seconds"], 1),
            "complete": ladder["complete"],
            "steps": [{key: step[key] for key in shown} for step in ladder["steps"]],
        },
    }


def engine(row: Row, *, target: str, kind: str) -> Openers:
    """What opens the engine of a bundle: the ladder's pick, or the one that was asked for; it has to be right.

    Raises:
        RuntimeError: it is not, or was not built.
    """
    path = bundle_folder(row, target, kind)
    manifest = json.loads((path / "manifest.json").read_text())
    ladder = manifest.get("ladder")
    picked = set(ladder["picks"].values()) if ladder else {found["name"] for found in manifest["engines"]}
    engines = [found for found in manifest["engines"] if found["name"] in picked]
    for found in engines:
        if found["status"] == "ready" and found["validation"]["passed"]:
            return {f"{OWN}{target} {kind}": functools.partial(open_runner, path, found)}
    failures = [
        output["failures"] for found in engines if found["validation"] for output in found["validation"]["outputs"]
    ]
    raise RuntimeError(f"no engine is right: {[found['reason'] for found in engines]}, {failures}")


def bundle_folder(row: Row, target: str, kind: str) -> Path:
    return row.folder / re.sub(r"[^\w.-]+", "-", f"{target}-{kind}")


def _facts(path: Path, engine: Any) -> dict[str, Any]:
    facts = {key: engine[key] for key in ("status", "reason", "build_s", "size_bytes", "cached")}
    file = path / "engines" / engine["name"] / "engine.json"
    return {**facts, "options": json.loads(file.read_text())["options"] if file.exists() else None}
