"""Sparse attention of decoders on the CPU: the time of a token over a long cache, and what it costs in perplexity.

Time: a model as Llama is, with random weights and a cache of 8,192 tokens, is built with dense attention
(GroupQueryAttention) and with each kind of sparse attention in all layers. A call is one token behind `--past` others; the
rounds are interleaved, in random order. What the engine with one kind computes is not judged here: random weights
attend evenly, so that no kind would be close.

Perplexity: the model of samples/text, which is trained, on windows of 512 tokens that it never saw, token by token. Its
keys are as many as its cache holds: a kind sees the same share of them as of the long cache. The pass measures each
layer on other text and chooses with its budget of 0.01; the table has the perplexity of its choice beside that of all
layers sparse.

The two are different models: a time of the first and a perplexity of the second do not make a claim about one engine.
For that, compile your model with --sparse-attention and data, and see what is dropped. Exits with 1 where no window is
faster than dense attention at the longest text, with the whole 95 % interval of the ratio of medians.
"""

from __future__ import annotations

import argparse
import random
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
from enginesmith.compiler.engine import engine_info
from enginesmith.compiler.generation.steps import Steps, steps_of
from enginesmith.compiler.trial import open_runner

LENGTH = 8192
ENGINE = "onnxruntime-cpu-fp32"
SHARES = (8, 16)
"""A kind sees this part of a cache, an eighth and a sixteenth."""

SINKS, BLOCK = 4, 64
SAMPLE = Path(__file__).parents[1] / "samples" / "text"
WINDOW = 512
"""Tokens of the sample's cache and of its texts."""

EVERYTHING = 1e9
"""A budget that all layers keep."""


def main() -> int:
    options = parse_options()
    torch.manual_seed(0)
    results: dict[str, Any] = {"length": options.length, "threads": options.threads}
    with tempfile.TemporaryDirectory() as folder:
        if not options.no_time:
            results["times"] = times(Path(folder), options)
        if not options.no_perplexity:
            results["perplexities"] = perplexities(Path(folder), options)
    write("sparse_attention", results, options.out)
    if options.no_time:
        return 0
    longest = results["times"][str(max(options.past))]
    return 0 if any(row["low"] > 1 for name, row in longest.items() if name.startswith("window")) else 1


def kinds(length: int, block: int) -> dict[str, str]:
    """Options of the pass by name, for a cache of so many tokens."""
    found = {}
    for share in SHARES:
        seen = length // share
        found[f"window, 1/{share}"] = f"window={seen - SINKS},sinks={SINKS}"
        found[f"top k, 1/{share}"] = f"top_k={seen}"
        found[f"blocks, 1/{share}"] = f"blocks={seen // block - 1},block={block}"
    return found


def times(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds a token by length of the text and kind."""
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1024, num_hidden_layers=options.layers,
        num_attention_heads=8, num_key_value_heads=options.key_heads, max_position_embeddings=options.length,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = np.random.default_rng(0).integers(0, 1024, (1, options.length // SHARES[0] + 8))
    np.savez(folder / "text.npz", ids=ids)
    engines = {"dense": None, **kinds(options.length, BLOCK)}
    bundles = {
        name: compiled(
            model, folder / str(number), options, kind and f"{kind},budget={EVERYTHING},calls=1",
            decoder={"max_length": options.length}, data=str(folder / "text.npz"),
        )
        for number, (name, kind) in enumerate(engines.items())
    }  # fmt: skip
    signature = engine_info(bundles["dense"].path, ENGINE).signature
    generator = np.random.default_rng(0)
    shapes = {name: signature.input(name).shape for name in signature.states}
    caches = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    opened = {name: open_runner(bundle.path, bundle.engine(ENGINE)) for name, bundle in bundles.items()}
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
            f"{ratio['ratio']:.2f}x of dense (95 % {ratio['low']:.2f} to {ratio['high']:.2f})"
        )
    return found


def perplexities(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Of the sample on held-out text, with all layers sparse and with those that the pass chooses."""
    model = transformers.AutoModelForCausalLM.from_pretrained(SAMPLE / "gpt", dtype=torch.float32).eval()
    texts = windows("test.npz")[: options.texts]
    np.savez(folder / "text.npz", ids=windows("calibration.npz"))
    engines: dict[str, str | None] = {"dense": None}
    for name, kind in kinds(WINDOW, 8).items():
        engines |= {f"{name}, all layers": f"{kind},budget={EVERYTHING},calls=1", f"{name}, chosen": f"{kind},calls=32"}
    found: dict[str, dict[str, Any]] = {}
    for number, (name, kind) in enumerate(engines.items()):
        bundle = compiled(
            model, folder / f"sample{number}", options, kind,
            decoder={"max_length": WINDOW}, data=str(folder / "text.npz"),
        )  # fmt: skip
        with bundle.load(ENGINE) as engine:
            value = engine.perplexity(texts.tolist())
        record = next((one for one in bundle.manifest["passes"] if one["text"].startswith("sparse-attention")), None)
        rows = record["details"].get("sparse_attention", []) if record else []
        found[name] = {"perplexity": value, "layers": sum(row["chosen"] for row in rows)}
        change = value / found["dense"]["perplexity"] - 1
        print(f"{name:28} perplexity {value:.3f} ({change:+.2%}), {found[name]['layers']} layers sparse")
    return found


def windows(file: str) -> np.ndarray:
    """Windows of `WINDOW` tokens, joined from shorter ones, which follow each other in test.npz."""
    with np.load(SAMPLE / file) as arrays:
        tokens = arrays["ids"].reshape(-1)
    return np.asarray(tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW))


def compiled(
    model: transformers.PreTrainedModel, place: Path, options: argparse.Namespace, kind: str | None, **others: Any
) -> enginesmith.Bundle:
    """The model with fused attention, and with sparse attention where a kind is given, which fp32 need not allow."""
    passes: Sequence[str] = ["simplify", "dedupe", "fuse-attention"]
    return enginesmith.compile(
        model,
        place,
        targets=[f"onnxruntime-cpu:threads={options.threads}"],
        precisions=["fp32"],
        passes=[*passes, f"sparse-attention:{kind}"] if kind else passes,
        benchmark=False,
        max_samples=1,
        **others,
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens that the cache holds")
    parser.add_argument("--past", type=int, nargs="+", default=[LENGTH // 2, LENGTH - 1])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--key-heads", type=int, default=8, help="of 8 heads of queries")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--texts", type=int, default=8, help="of 512 tokens, that perplexity is of")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--no-perplexity", action="store_true")
    parser.add_argument("--out", type=Path, help="default: sparse_attention.json in the results")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
