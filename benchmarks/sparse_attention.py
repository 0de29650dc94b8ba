"""Sparse attention of decoders on the CPU: the time of a token over a long cache, and what it costs in perplexity.

Time: a model as Llama is, with random weights and a cache of 8,192 tokens, is built with dense attention
(GroupQueryAttention) and with each kind of sparse attention in all layers. A call is one token behind `--past` others;
the rounds are interleaved, in random order. What is computed is not judged here: random weights attend evenly, so that
no kind would be close.

Perplexity: the model of samples/text, which is trained on windows of 128 tokens, on such that it never saw, token by
token and with a cache as long. A kind sees a half, a quarter or an eighth of them: in all layers, and in those that the
pass chooses on other text with its budget of 0.01. So short a text leaves little out; of long ones this says nothing.

The two are different models: a time of the first and a perplexity of the second make no claim about one engine. For
that, compile your model with --sparse-attention and data, and see what is dropped. Exits with 1 where no window is
faster than dense attention at the longest text, with the whole 95 % interval of the ratio of medians, or where a choice
of the pass changes the perplexity by 1 % or more.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _results import write

import enginesmith
from enginesmith.compiler.benchmark.intervals import speed_up
from enginesmith.compiler.calibration import Calibration
from enginesmith.compiler.data import open_data
from enginesmith.compiler.engine import engine_info
from enginesmith.compiler.generation.steps import Steps, steps_of
from enginesmith.compiler.graph import Graph
from enginesmith.compiler.graph.editing import flattened
from enginesmith.compiler.sparse_attention.found import layers
from enginesmith.compiler.sparse_attention.kinds import Blocks, Kind, TopK, Window
from enginesmith.compiler.sparse_attention.rewrite import rewrite
from enginesmith.compiler.states import empty_caches
from enginesmith.compiler.trial import open_runner
from enginesmith.passes.base import Context
from enginesmith.passes.sparse_attention import SparseAttention
from enginesmith.targets._onnxruntime_states import shares_buffers

LENGTH = 8192
ENGINE = "onnxruntime-cpu-fp32"
SHARES, BLOCK = (8, 16), 64
"""Of a long cache a kind sees an eighth or a sixteenth, in blocks of 64."""

SAMPLE_SHARES, SAMPLE_BLOCK = (2, 4, 8), 4
SINKS = 4
SAMPLE = Path(__file__).parents[1] / "samples" / "text"
WINDOW = 128
"""Tokens of the sample's cache and of its texts: beyond what it was trained on, perplexity is another matter."""

BUDGET = 0.01
"""Of the mean ln p, and what a choice may change perplexity by on other text."""


def main() -> int:
    options = parse_options()
    torch.manual_seed(0)
    results: dict[str, Any] = {"length": options.length, "threads": options.threads}
    passed = True
    with tempfile.TemporaryDirectory() as folder:
        if not options.no_perplexity:
            results["perplexities"] = perplexities(Path(folder), options)
            passed &= all(abs(row["change"]) < BUDGET for row in results["perplexities"].values() if row["bounded"])
        if not options.no_time:
            results["times"] = times(Path(folder), options)
            longest = results["times"][str(max(options.past))]
            passed &= any(row["low"] > 1 for name, row in longest.items() if name.startswith("window"))
    write("sparse_attention", results, options.out)
    return 0 if passed else 1


def kinds(length: int, shares: Sequence[int], block: int) -> dict[str, Kind]:
    """By name, for a cache of so many tokens."""
    found: dict[str, Kind] = {}
    for share in shares:
        seen = length // share
        found[f"window, 1/{share}"] = Window(seen - SINKS, SINKS)
        found[f"top k, 1/{share}"] = TopK(seen)
        found[f"blocks, 1/{share}"] = Blocks(block, seen // block - 1)
    return found


def times(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds a token by length of the text and kind."""
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1024, num_hidden_layers=options.layers,
        num_attention_heads=8, num_key_value_heads=options.key_heads, max_position_embeddings=options.length,
    )  # fmt: skip
    bundle = compiled(transformers.LlamaForCausalLM(config).eval(), folder / "long", options, options.length)
    signature = engine_info(bundle.path, ENGINE).signature
    generator = np.random.default_rng(0)
    empty = empty_caches(signature, 1)
    caches = {name: generator.standard_normal(cache.shape, dtype=np.float32) for name, cache in empty.items()}
    places = {"dense": bundle.path}
    for number, (name, kind) in enumerate(kinds(options.length, SHARES, BLOCK).items()):
        places[name] = with_graph(bundle, folder / f"long{number}", in_all_layers(graph_of(bundle), kind))
    opened = {name: open_runner(place, bundle.engine(ENGINE)) for name, place in places.items()}
    steps = {name: steps_of(runner, signature, 1, caches) for name, runner in opened.items()}
    found = {str(past): race(steps, past, options) for past in options.past}
    for runner in opened.values():
        runner.close()
    return found


def race(steps: Mapping[str, Steps], past: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians of interleaved rounds, and how many times as fast as dense attention; one token behind `past` others.

    The candidates share caches, as each writes the same keys and values to the same place.
    """
    token, before, one = np.array([[7]]), np.array([past]), np.array([1])
    measured: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(options.seed)
    for turn in range(options.rounds + 2):  # the first two warm up
        shuffle.shuffle(order)
        for name in order:
            start = time.perf_counter()
            steps[name](token, before, one)
            if turn > 1:
                measured[name].append((time.perf_counter() - start) * 1e3)
    found = {}
    for name, taken in measured.items():
        ratio = speed_up("dense", measured["dense"], taken, options.seed)
        found[name] = {"ms": float(np.median(taken)), **{key: ratio[key] for key in ("ratio", "low", "high")}}
        print(
            f"{past:5} tokens before, {name:14} {found[name]['ms']:8.2f} ms a token, "
            f"{ratio['ratio']:.2f}x of dense (95 % {ratio['low']:.2f} to {ratio['high']:.2f})",
            flush=True,
        )
    return found


def perplexities(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Of the sample on held-out text, with all layers sparse and with those that the pass chooses."""
    model = transformers.AutoModelForCausalLM.from_pretrained(SAMPLE / "gpt", dtype=torch.float32).eval()
    bundle = compiled(model, folder / "sample", options, WINDOW)
    signature = engine_info(bundle.path, ENGINE).signature
    np.savez(folder / "text.npz", ids=windows("calibration.npz"))
    context = Context(signature, calibration=Calibration(open_data(str(folder / "text.npz"), signature)))
    found: dict[str, dict[str, Any]] = {}

    def judge(name: str, place: Path, layers: int, *, bounded: bool) -> None:
        with enginesmith.load(place, ENGINE, verify=False) as engine:
            value = engine.perplexity(windows("test.npz")[: options.texts].tolist())
        change = value / found["dense"]["perplexity"] - 1 if found else 0.0
        found[name] = {"perplexity": value, "change": change, "layers": layers, "bounded": bounded}
        print(f"{name:28} perplexity {value:.3f} ({change:+.2%}), {layers} layers sparse", flush=True)

    judge("dense", bundle.path, 0, bounded=False)
    for number, (name, kind) in enumerate(kinds(WINDOW, SAMPLE_SHARES, SAMPLE_BLOCK).items()):
        graph = in_all_layers(graph_of(bundle), kind)
        place = with_graph(bundle, folder / f"all{number}", graph)
        judge(f"{name}, all layers", place, graph.operators()["If"], bounded=False)
        graph = graph_of(bundle)
        chosen = pass_with(kind, options).apply(graph, context)
        rows = chosen.details["sparse_attention"]
        place = with_graph(bundle, folder / f"chosen{number}", graph)
        judge(f"{name}, chosen", place, sum(row["chosen"] for row in rows), bounded=True)
    return found


def pass_with(kind: Kind, options: argparse.Namespace) -> SparseAttention:
    """The pass that may use this kind."""
    if isinstance(kind, Window):
        return SparseAttention(window=kind.width, sinks=kind.sinks, calls=options.calls, budget=BUDGET)
    if isinstance(kind, TopK):
        return SparseAttention(top_k=kind.count, calls=options.calls, budget=BUDGET)
    return SparseAttention(blocks=kind.count, block=kind.size, calls=options.calls, budget=BUDGET)


def graph_of(bundle: enginesmith.Bundle) -> Graph:
    """That of the dense engine, to be changed."""
    return flattened(Graph.load(bundle.path / "engines" / ENGINE / "model.onnx"))


def in_all_layers(graph: Graph, kind: Kind) -> Graph:
    """The graph, with sparse attention in all layers."""
    rewrite(graph, {layer.name: kind for layer in layers(graph)})
    return graph


def with_graph(bundle: enginesmith.Bundle, place: Path, graph: Graph) -> Path:
    """A copy of a bundle in which the dense engine has another graph."""
    shutil.copytree(bundle.path, place)
    file = place / "engines" / ENGINE / "model.onnx"
    graph.save(file)
    if not shares_buffers(file, engine_info(place, ENGINE).signature.states):
        raise SystemExit(f"{place.name}: caches are not written in place")
    return place


def windows(file: str) -> np.ndarray:
    """Windows of `WINDOW` tokens, joined from shorter ones, which follow each other in test.npz."""
    with np.load(SAMPLE / file) as arrays:
        tokens = arrays["ids"].reshape(-1)
    return np.asarray(tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW))


def compiled(
    model: transformers.PreTrainedModel, place: Path, options: argparse.Namespace, length: int
) -> enginesmith.Bundle:
    """The model with fused attention."""
    return enginesmith.compile(
        model,
        place,
        decoder={"max_length": length},
        targets=[f"onnxruntime-cpu:threads={options.threads}"],
        precisions=["fp32"],
        passes=["simplify", "dedupe", "fuse-attention"],
        benchmark=False,
        max_samples=1,
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens that the cache holds")
    parser.add_argument("--past", type=int, nargs="+", default=[LENGTH // 2, LENGTH - 1])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--key-heads", type=int, default=8, help="of 8 heads of queries")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--texts", type=int, default=88, help="of 128 tokens, that perplexity is of")
    parser.add_argument("--calls", type=int, default=64, help="of the model for one measurement of the pass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--no-perplexity", action="store_true")
    parser.add_argument("--out", type=Path, help="default: sparse_attention.json in the results")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
