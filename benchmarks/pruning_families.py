"""Which axes of each family of models change together, and that changing them leaves working graphs.

Every model is captured by both exporters. Of each graph, every group of axes that may shrink loses 30 % of its
positions, drawn at random; in another copy every group that may grow gets an odd number of new ones, which must leave
the outputs as they are; in a third one every group is put in another order, which must as well: an axis that was
forgotten, or that belongs elsewhere, mixes up channels and shows.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from _results import RESULTS, write
from models import seeded
from pruning_cases import CASES, Case
from torch import nn

from enginesmith.compiler.capture import capture
from enginesmith.compiler.data import other_sizes, random_batch, resized
from enginesmith.compiler.difference import worst_relative_l2
from enginesmith.compiler.dimensions import Dim, Dimensions
from enginesmith.compiler.dimensions.resize import resize
from enginesmith.compiler.graph import Graph, probe
from enginesmith.compiler.graph.cost import costs
from enginesmith.compiler.graph.editing import flattened
from enginesmith.compiler.signature import Signature, parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.errors import CaptureError
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context

RATIO = 0.3
NEW = 3
LIMIT = 1e-5
"""Relative L2 between the outputs before and after growing."""

REORDERED = 1e-4
"""The same for another order, in which sums are rounded otherwise; random weights carry that from layer to layer."""

TELLS = 1e-2
"""What other inputs must change at least: outputs that all inputs share would hide what is wrong."""

EXPORTERS: tuple[Literal["dynamo", "torchscript"], ...] = ("dynamo", "torchscript")


class One(list[dict[str, np.ndarray]]):
    """Samples of one batch."""

    description = "made-up inputs"
    random = True


def batch_of(signature: Signature, seed: int = 0) -> dict[str, np.ndarray]:
    """Random numbers, words of a small vocabulary, and a mask that hides the last quarter."""
    batch = random_batch(signature, np.random.default_rng(seed))
    for name, array in batch.items():
        if name.endswith("mask"):
            batch[name] = np.ones_like(array)
            batch[name][:, -(array.shape[1] // 4) :] = 0
        elif array.dtype.kind == "i":
            batch[name] = np.random.default_rng(seed).integers(0, 100, array.shape, dtype=array.dtype)
    return batch


def livened(case: Case) -> nn.Module:
    """The model with random numbers for what is initialized to a constant, and statistics for its batch norms.

    With biases of 0, scales of 1 and a layer scale of 1e-6, mixing up channels would go unseen. Scales below 1 keep the
    branches of residual blocks small, as training does: else rounding grows from block to block.
    """
    model = seeded(case.make)
    signature = parse_inputs(case.inputs, case.dynamic)
    batch = random_batch(signature, np.random.default_rng(2), signature.sizes("max"))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.min() == parameter.max():
                zero = bool((parameter == 0).all())
                nn.init.normal_(parameter, 0, 0.1) if zero else nn.init.uniform_(parameter, 0.3, 0.6)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for module in norms:
            module.momentum = 1.0
            module.train()
        if norms:
            model(*(torch.from_numpy(array) for array in batch.values()))
    return model.eval()


def captured(case: Case, exporter: Literal["dynamo", "torchscript"], folder: Path) -> tuple[Graph, Signature]:
    """The graph of a model with its constants in initializers, and the signature with its outputs."""
    model = load_model(livened(case), inputs=parse_inputs(case.inputs, case.dynamic))
    result = capture(
        model,
        exporter=exporter,
        opset_range=(13, 20),
        samples=One([batch_of(model.signature)]),
        seed=0,
        directory=folder,
        log=lambda line: None,
        required=True,
    )
    assert result.graph is not None
    for text in ("simplify", "dedupe"):
        parse_pass(text)(result.graph, Context(model.signature))
    return flattened(result.graph), model.signature


def shrunk(graph: Graph, generator: np.random.Generator) -> Graph:
    """A copy whose groups lose a share of their positions, drawn at random."""
    work = graph.clone()
    dimensions = Dimensions(work)
    resize(
        dimensions,
        {
            group.dim: np.sort(generator.choice(group.size, max(1, round(group.size * (1 - RATIO))), replace=False))
            for group in dimensions.groups
            if not group.why_not("shrink")
        },
    )
    return work


def grown(graph: Graph) -> Graph:
    """A copy whose groups have new positions behind those that they had."""
    work = graph.clone()
    dimensions = Dimensions(work)
    chosen: dict[Dim, np.ndarray] = {
        group.dim: np.append(np.arange(group.size), [-1] * NEW)
        for group in dimensions.groups
        if not group.why_not("grow")
    }
    resize(dimensions, chosen)
    return work


def reordered(graph: Graph, generator: np.random.Generator) -> Graph:
    """A copy whose groups have their positions in another order."""
    work = graph.clone()
    dimensions = Dimensions(work)
    resize(
        dimensions,
        {g.dim: generator.permutation(g.size) for g in dimensions.groups if not g.why_not("shrink")},
    )
    return work


def size(graph: Graph, sizes: Mapping[str, int]) -> dict[str, int]:
    """Parameters and multiply-adds."""
    weights = [v.const_value for v in graph.model.graph.initializers.values() if v.const_value is not None]
    return {
        "parameters": sum(tensor.size for tensor in weights if tensor.dtype.is_floating_point()),
        "macs": sum(cost.macs for cost in costs(graph, sizes).values()),
    }


def measure(case: Case, exporter: Literal["dynamo", "torchscript"], folder: Path) -> dict[str, Any]:
    """What one model has and what came of changing it."""
    try:
        graph, signature = captured(case, exporter, folder)
    except CaptureError as error:
        return {"captured": False, "reason": str(error.found or error)[:300]}
    sizes = signature.sizes()
    inputs = batch_of(signature)
    others = [resized(signature, inputs, other) for other in other_sizes(signature)]
    expected = probe.run(graph, inputs)
    start = time.perf_counter()
    groups = [group for group in Dimensions(graph).groups if group.of("writes")]
    seconds = time.perf_counter() - start
    reasons = [[group.why_not(change).rpartition(" (")[0] for group in groups] for change in ("shrink", "grow")]
    found: dict[str, Any] = {
        "captured": True,
        "groups": len(groups),
        "shrinkable": sum(not reason for reason in reasons[0]),
        "growable": sum(not reason for reason in reasons[1]),
        "refused": collections.Counter(filter(None, reasons[0])),
        "refused_to_grow": collections.Counter(filter(None, reasons[1])),
        "analysis_s": seconds,
        "other_inputs_differ_by": worst_relative_l2(probe.run(graph, batch_of(signature, 3)), expected),
        "before": size(graph, sizes),
    }
    smaller = shrunk(graph, np.random.default_rng(1))
    smaller.verify()
    outputs = probe.run(smaller, inputs)
    found["after"] = size(smaller, sizes)
    found["shapes_kept"] = {n: a.shape for n, a in outputs.items()} == {n: a.shape for n, a in expected.items()}
    found["finite"] = all(bool(np.isfinite(array).all()) for array in outputs.values())
    for name, changed in (("grow", grown(graph)), ("reorder", reordered(graph, np.random.default_rng(2)))):
        changed.verify()
        found[f"{name}_error"] = max(
            worst_relative_l2(probe.run(changed, at), probe.run(graph, at)) for at in (inputs, *others)
        )
    return found


def broken(found: Mapping[str, Any]) -> bool:
    """Whether a promise is broken. An exporter that cannot take a model breaks none."""
    if not found["captured"]:
        return False
    works = found["shapes_kept"] and found["finite"] and found["shrinkable"] and found["other_inputs_differ_by"] > TELLS
    return not (works and found["grow_error"] < LIMIT and found["reorder_error"] < REORDERED)


def line(name: str, exporter: str, found: Mapping[str, Any]) -> str:
    """One row for people."""
    if not found["captured"]:
        return f"{name:<32} {exporter:<12} not captured: {found['reason'][:100]}"
    before, after = found["before"], found["after"]
    return (
        f"{name:<32} {exporter:<12} {found['shrinkable']:>3} of {found['groups']:>3} shrink, "
        f"{found['growable']:>3} grow  "
        f"MACs {before['macs'] / 1e6:8.1f} -> {after['macs'] / 1e6:8.1f} M  "
        f"parameters {before['parameters'] / 1e6:6.2f} -> {after['parameters'] / 1e6:6.2f} M  "
        f"grow {found['grow_error']:.1e}  reorder {found['reorder_error']:.1e}  "
        f"other inputs {found['other_inputs_differ_by']:.1e}  {found['analysis_s']:.1f} s"
        f"{'  BROKEN' if broken(found) else ''}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--exporters", nargs="+", choices=EXPORTERS, default=list(EXPORTERS))
    parser.add_argument(
        "--out", type=Path, help="where to write the results, in place of results/pruning_families.json"
    )
    arguments = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for all of attention, which cannot be exported
    path = arguments.out or RESULTS / "pruning_families.json"
    results: dict[str, Any] = {
        "ratio": RATIO,
        "new": NEW,
        "grow_limit": LIMIT,
        "reorder_limit": REORDERED,
        "models": {},
    }
    with contextlib.suppress(FileNotFoundError):
        results["models"] = json.loads(path.read_text())["results"]["models"]
    for name in arguments.models:
        case = CASES[name]
        for exporter in arguments.exporters:
            with tempfile.TemporaryDirectory(prefix="enginesmith-") as folder:
                found = measure(case, exporter, Path(folder))
            results["models"].setdefault(name, {"family": case.family})[exporter] = found
            print(line(name, exporter, found), flush=True)
            for kind in ("refused", "refused_to_grow"):
                for reason, count in found.get(kind, {}).items():
                    print(f"    {kind.replace('_', ' ')}: {count} x {reason}", flush=True)
    results["models"] = {name: results["models"][name] for name in CASES if name in results["models"]}
    write("pruning_families", results, arguments.out)
    return int(any(broken(model[e]) for model in results["models"].values() for e in EXPORTERS if e in model))


if __name__ == "__main__":
    sys.exit(main())
