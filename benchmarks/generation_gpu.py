"""Generation on a GPU: milliseconds a token of GPT-2 124M in fp16 beside transformers' generate, interleaved.

The model has random weights, biases among them; prompts have 128 tokens, and 256 new ones are found greedily, for one
row and for 32. Candidates are transformers in fp32 and fp16, with a static cache that torch.compile has compiled, and
enginesmith's engines for onnxruntime-cuda and torch-inductor. A round times each candidate twice, in random order: the
whole answer, and the prompt with one token, from which the time of a token follows. Exits with 1 where the best engine
is not as many times as fast as the best of transformers, or takes longer for a token, than `AT_LEAST` and `AT_MOST_MS`
say.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from _results import write
from generation import Answer, race

import enginesmith
from enginesmith.targets import parse_target

PROMPT, NEW = 128, 256
TARGETS = {"onnxruntime-cuda": "onnxruntime-cuda", "torch-inductor": "torch-inductor:device=cuda"}
PEERS = {
    "fp32": "transformers fp32",
    "fp16": "transformers fp16",
    "compiled": "transformers fp16, static cache, torch.compile",
}
AT_LEAST = {1: 5.0, 32: 3.0}
"""Times as fast as the best of transformers, by the number of rows."""

AT_MOST_MS = {1: 0.30}
"""Milliseconds a token; reading the weights takes 0.074."""


def main() -> int:
    options = parse_options()
    torch.manual_seed(0)
    model = random_model()
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (max(options.batches), PROMPT))
    found = {}
    passed = True
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        bundle = compiled(model, options.bundle or Path(folder) / "bundle", options)
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
        single, half = model.cuda(), copy.deepcopy(model).half().cuda()
        with contextlib.ExitStack() as stack:
            engines = {name: stack.enter_context(bundle.load(f"{name}-fp16")) for name in options.engines}
            for batch in options.batches:
                rows = ids[:batch]
                answers = (eager(single, rows), eager(half, rows), eager(half, rows, "static"))
                peers = dict(zip(PEERS, answers, strict=True))
                candidates = {PEERS[name]: peers[name] for name in options.peers}
                own = {f"engine {name} fp16": ours(engine, rows) for name, engine in engines.items()}
                times = race({**candidates, **own}, options.rounds, options.seed, NEW)
                found[str(batch)] = times
                passed = report(batch, times, own) and passed
                results = {"prompt_tokens": PROMPT, "new_tokens": NEW, "max_length": options.max_length, "rows": found}
                write("generation_gpu", results, options.out)
    return 0 if passed else 1


def random_model() -> transformers.PreTrainedModel:
    """GPT-2 124M with random weights. Its own beginning leaves biases at zero, which a compiler takes out."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=None, eos_token_id=None)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def compiled(model: transformers.PreTrainedModel, place: Path, options: argparse.Namespace) -> enginesmith.Bundle:
    """The model with its cache, in fp16, with all that the targets fuse."""
    targets = [TARGETS[name] for name in options.engines]
    rewrites = [rewrite for target in targets for rewrite in parse_target(target).rewrites("fp16")]
    return enginesmith.compile(
        model,
        place,
        decoder={"max_length": options.max_length, "batch": max(options.batches)},
        targets=targets,
        precisions=["fp16"],
        passes=["simplify", "dedupe", *rewrites] if rewrites else [],
        benchmark=False,
        max_samples=1,
    )


def eager(model: transformers.PreTrainedModel, rows: np.ndarray, cache: str | None = None) -> Answer:
    """Transformers' greedy search, by itself or, with a static cache, as it compiles itself."""
    prompt = torch.from_numpy(rows).cuda()
    mask = torch.ones_like(prompt)

    def answer(count: int) -> list[int]:
        found = model.generate(
            prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0,
            cache_implementation=cache,
        )  # fmt: skip
        return found[:, PROMPT:].tolist()

    return answer


def ours(engine: enginesmith.Engine, rows: Sequence[np.ndarray] | np.ndarray) -> Answer:
    """The engine's greedy search."""
    return lambda count: engine.generate(list(rows), count)


def report(batch: int, times: dict[str, dict[str, float]], engines: Collection[str]) -> bool:
    """Prints the times for so many rows; whether the best engine is as fast as it should be."""
    best = min(row["token_ms"] for name, row in times.items() if name not in engines)
    for name, row in times.items():
        row["speed_up"] = best / row["token_ms"]
        print(
            f"{batch:3} rows, {name:47} {row['token_ms']:7.3f} ms a token, {row['prompt_ms']:6.1f} ms for the prompt "
            f"and one, {row['speed_up']:.2f}x",
            flush=True,
        )
    engine = min((times[name] for name in engines), key=lambda row: row["token_ms"])
    return engine["speed_up"] >= AT_LEAST.get(batch, 1.0) and engine["token_ms"] <= AT_MOST_MS.get(batch, np.inf)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--engines", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--bundle", type=Path, help="keep the engine here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: generation_gpu.json in the results")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
