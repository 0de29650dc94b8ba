"""What aligned dimensions gain: GPT-2's vocabulary, MLPs of widths 770 and 1001, and 13 features, which are refused.

Each model is captured once; its engines differ by the options of `align` alone, which stands before what lowers the
graph. All are measured in one interleaved benchmark against the one without it, and compared with torch in fp32. An
engine is kept where the whole interval of its speed-up lies above what `compile --align` asks for.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results import RESULTS, write
from torch import nn

from enginesmith.compiler.benchmark import Candidate, Settings, SizedInputs, benchmark
from enginesmith.compiler.capture import capture
from enginesmith.compiler.difference import relative_l2
from enginesmith.compiler.gains import FASTER
from enginesmith.compiler.graph import Graph
from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import Model, load_model
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context
from enginesmith.targets import parse_target
from enginesmith.targets.base import BuildRequest, Runner, Target

PROMISE = 1.5
"""How many times as fast as the plain engine the aligned one has to be, of the cases that promise it."""

PLAIN = "plain"
VARIANTS = {
    PLAIN: "",
    "align": "align",
    "align 64": "align:multiple=64",
    "align 128": "align:multiple=128",
    "align, flatten": "align:flatten=true",
}


class Layers(nn.Module):
    """One layer after the other, and of the result the best class where asked for."""

    def __init__(self, *layers: nn.Module, best: bool = False) -> None:
        super().__init__()
        self.layers, self.best = nn.Sequential(*layers), best

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y.argmax(-1) if self.best else y


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of `sizes`; its input has `rows` and then the first of them."""

    make: Callable[..., nn.Module]
    rows: tuple[int, int]
    sizes: tuple[int, ...]
    promised: bool = True


def vocabulary(width: int, words: int, *, best: bool = False) -> nn.Module:
    return Layers(nn.LayerNorm(width), nn.Linear(width, words, bias=False), best=best)


def mlp(inputs: int, width: int) -> nn.Module:
    return Layers(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, inputs))


CASES = {
    "vocabulary": Case(vocabulary, (8, 128), (768, 50257)),
    "vocabulary, argmax": Case(functools.partial(vocabulary, best=True), (8, 128), (768, 50257), promised=False),
    "mlp 770": Case(mlp, (32, 128), (3072, 770)),
    "mlp 1001": Case(mlp, (64, 128), (512, 1001)),
    "features 13": Case(mlp, (64, 128), (13, 1024), promised=False),
}
SMALL = {"vocabulary": (64, 1009), "vocabulary, argmax": (64, 1009)}
"""Sizes for a run that shows that all works."""


def measure(case: Case, target: Target, precision: str, settings: Settings) -> dict[str, Any]:
    """One model: all its engines, side by side."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = case.make(*case.sizes).eval()
    x = np.random.default_rng(0).standard_normal((*case.rows, case.sizes[0]), dtype=np.float32)
    with torch.inference_mode():
        expected = module(torch.from_numpy(x)).numpy()
    model = load_model(module, inputs=parse_inputs([f"x:{'x'.join(map(str, x.shape))}"]))
    batches = Batches([{"x": x}])
    found: dict[str, Any] = {"rows": case.rows, "sizes": case.sizes, "variants": {}}
    with tempfile.TemporaryDirectory(prefix="enginesmith-") as scratch:
        folder = Path(scratch)
        base = captured(model, batches, target, folder)
        candidates = []
        for name, align in VARIANTS.items():
            graph = base.clone()
            found["variants"][name] = row = aligned(graph, align, model, batches)
            for text in target.lowering(precision):
                parse_pass(text)(graph, Context(model.signature, batches))
            open_runner = build(graph, target, precision, model, x, folder / name)
            runner = open_runner()
            try:
                (output,) = runner.run({"x": x}).values()
            finally:
                runner.close()
            same = {"agreement": float(np.mean(output == expected))} if expected.dtype.kind == "i" else {}
            row.update(same or {"relative_l2": relative_l2(np.asarray(output, np.float32), expected)})
            candidates.append(Candidate(name, open_runner))
        rows = case.rows[0]
        timed = benchmark(candidates, [SizedInputs({}, rows, {"x": x})], baseline=PLAIN, protocol=settings)
    for timing in timed["timings"]:
        row, ratio = found["variants"][timing["candidate"]], timing["speed_up"]
        row.update({key: timing[key] for key in ("p50_ms", "device_p50_ms", "speed_up", "steady")})
        row["kept"] = ratio is not None and ratio["low"] > FASTER
    found.update(skipped=timed["skipped"], protocol=timed["protocol"])
    return found


class Batches(list[dict[str, np.ndarray]]):
    """Samples."""

    description = "noise"
    random = False


def captured(model: Model, batches: Batches, target: Target, folder: Path) -> Graph:
    """The graph in the highest opset that the target takes, simplified."""
    low, high = target.opset_range() or (13, 20)
    graph = capture(
        model,
        opset_range=(low, min(high, 20)),
        samples=batches,
        seed=0,
        directory=folder,
        log=lambda line: None,
        required=True,
    ).graph
    assert graph is not None
    for text in ("simplify", "dedupe"):
        parse_pass(text)(graph, Context(model.signature, batches))
    return graph


def aligned(graph: Graph, text: str, model: Model, batches: Batches) -> dict[str, Any]:
    """Aligns a graph, and says what that changed."""
    if not text:
        return {}
    result = parse_pass(text)(graph, Context(model.signature, batches))
    refusals = [f"{refusal.node}: {refusal.reason}" for refusal in result.refusals]
    return {"changes": dict(result.changes), "refusals": refusals, **result.details}


def build(
    graph: Graph, target: Target, precision: str, model: Model, x: np.ndarray, folder: Path
) -> Callable[[], Runner]:
    """Builds an engine; returns what loads it."""
    folder.mkdir()
    request = BuildRequest(
        graph=graph,
        model=model,
        signature=model.signature,
        precision=precision,
        sample={"x": x},
        directory=folder,
        cache=folder.parent,
        log=lambda line: None,
    )
    return functools.partial(target.runner, folder, target.build(request))


def show(name: str, found: dict[str, Any]) -> None:
    """A line for each engine."""
    print(f"\n{name}, {' x '.join(map(str, found['rows']))} rows, sizes {found['sizes']}")
    for variant, row in found["variants"].items():
        ratio = row.get("speed_up")
        speed = f"{ratio['ratio']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "baseline"
        close = f"agrees {row['agreement']:.4f}" if "agreement" in row else f"relative L2 {row['relative_l2']:.1e}"
        grown = ", ".join(f"{one['before']} -> {one['after']}" for one in row.get("aligned", ())) or "nothing grew"
        device = f"{row['device_p50_ms']:.3f}" if row.get("device_p50_ms") else "-"
        print(
            f"  {variant:16} {row.get('p50_ms', float('nan')):8.3f} ms, device {device:>7}  {speed:20} {close}  {grown}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--target", default="onnxruntime-cuda")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--small", action="store_true", help="small sizes, which show that all works and nothing else")
    parser.add_argument("--out", type=Path, default=RESULTS / "alignment.json")
    options = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    target = parse_target(options.target)
    settings = Settings(rounds=6, slice_s=0.02, warmup_s=0.1) if options.small else Settings(rounds=15, slice_s=0.2)
    results: dict[str, Any] = {"target": str(target), "precision": options.precision, "promise": PROMISE, "cases": {}}
    for name in options.cases:
        case = CASES[name]
        if options.small:
            case = dataclasses.replace(case, rows=(2, 16), sizes=SMALL.get(name, case.sizes), promised=False)
        results["cases"][name] = found = measure(case, target, options.precision, settings)
        found["promised"] = case.promised
        show(name, found)
    write("alignment", results, options.out)
    broken = [
        name for name, found in results["cases"].items()
        if found["promised"] and found["variants"]["align"]["speed_up"]["ratio"] < PROMISE
    ]  # fmt: skip
    if broken:
        print(f"less than {PROMISE:g} times as fast as without alignment: {', '.join(broken)}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
