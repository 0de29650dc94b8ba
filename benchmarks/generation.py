"""Generation on the CPU: milliseconds a token of GPT-2 124M beside transformers' generate, interleaved.

The model has random weights, the prompt 128 tokens, and 64 new ones are found greedily, by all candidates the same in
fp32. A round times each candidate twice, in random order: the whole answer, and the prompt alone, from which the time
of a token follows. Exits with 1 where the engine in fp32 gives other tokens, or the engines are not as many times as
fast as `AT_LEAST` says. The tokens of engines with fewer bits may differ.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from _results import RESULTS, write

import enginesmith

PROMPT, NEW = 128, 64
AT_LEAST = {"engine fp32": 1.0, "the fastest engine": 3.0}
"""Times as fast as the best of transformers in fp32, where reading the weights bounds all alike."""

PRECISIONS = ("fp32", "int8-dynamic", "int8-weights", "int4-weights")
Answer = Callable[[int], list[int]]
"""Finds so many new tokens."""


def main() -> int:
    options = parse_options()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=None, eos_token_id=None)).eval()
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, PROMPT)
    with tempfile.TemporaryDirectory() as folder:
        candidates = {"transformers": eager(model, ids), "transformers, static cache": eager(model, ids, "static")}
        start = time.perf_counter()
        bundle = enginesmith.compile(
            model,
            options.bundle or Path(folder) / "gpt2",
            decoder={"max_length": options.max_length, "batch": 1},
            targets=[f"onnxruntime-cpu:threads={options.threads}"],
            precisions=options.precisions,
            passes=["simplify", "dedupe", "fuse-attention"],
            random_calibration=True,
            benchmark=False,
            max_samples=1,
        )
        print(f"compiled in {time.perf_counter() - start:.0f} s")
        for record in bundle.manifest["engines"]:
            candidates[f"engine {record['precision']}"] = engine(bundle.load(record["name"]), ids)
        found = race(candidates, options.rounds, options.seed)
    best = min(row["token_ms"] for name, row in found.items() if name.startswith("transformers"))
    for name, row in found.items():
        row["speed_up"] = best / row["token_ms"]
        times = f"{row['token_ms']:7.2f} ms a token, {row['prompt_ms']:7.1f} ms for the prompt and one"
        print(f"{name:28} {times}, {row['speed_up']:.2f}x")
    reached = {
        "engine fp32": found["engine fp32"]["speed_up"],
        "the fastest engine": max(row["speed_up"] for name, row in found.items() if name.startswith("engine")),
    }
    passed = found["engine fp32"]["same_tokens"] and all(reached[name] >= least for name, least in AT_LEAST.items())
    write("generation", {"prompt_tokens": PROMPT, "new_tokens": NEW, "candidates": found}, options.out)
    return 0 if passed else 1


def eager(model: transformers.PreTrainedModel, ids: np.ndarray, cache: str | None = None) -> Answer:
    """Transformers' own greedy search."""
    prompt = torch.from_numpy(ids)[None]
    mask = torch.ones_like(prompt)

    def answer(count: int) -> list[int]:
        found = model.generate(
            prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0,
            cache_implementation=cache, disable_compile=True,
        )  # fmt: skip
        return found[0, PROMPT:].tolist()

    return answer


def engine(opened: enginesmith.Engine, ids: np.ndarray) -> Answer:
    """An engine's greedy search."""
    return lambda count: opened.generate(ids, count)[0]


def race(candidates: dict[str, Answer], rounds: int, seed: int) -> dict[str, dict[str, float]]:
    """Medians over the rounds, and whether the tokens are those of the first candidate."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    tokens = {name: answer(NEW) for name, answer in candidates.items()}  # the first call warms up
    order, shuffle = list(candidates), random.Random(seed)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            pair = []
            for count in (1, NEW):
                start = time.perf_counter()
                candidates[name](count)
                pair.append((time.perf_counter() - start) * 1e3)
            times[name].append((pair[0], pair[1]))
    first = next(iter(tokens.values()))
    return {
        name: {
            "token_ms": statistics.median((whole - prompt) / (NEW - 1) for prompt, whole in pairs),
            "prompt_ms": statistics.median(prompt for prompt, _ in pairs),
            "same_tokens": tokens[name] == first,
        }
        for name, pairs in times.items()
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), help="fp32 must be among them")
    parser.add_argument("--bundle", type=Path, help="keep the engines here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "generation.json")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
