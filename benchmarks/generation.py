"""Generation on the CPU: milliseconds a token of GPT-2 124M beside transformers' generate, interleaved.

The model has random weights, the prompt 128 tokens, and 64 new ones are found greedily, by all candidates the same in
fp32. A round times each candidate twice, in random order: the whole answer, and the prompt alone, from which the time
of a token follows. Exits with 1 where the engine in fp32 gives other tokens, or the engines are not as many times as
fast as `AT_LEAST` says. The tokens of engines with fewer bits may differ.

With `--sample` the model is that of samples/text, which is trained, and each candidate's perplexity on text that it
never saw stands beside its times. Weights of 4 bits are in blocks of 32 and of 128 there, rounded to nearest and by
GPTQ, and caches of 8 bits have a scale for each channel or one. The fp32 engine also runs with the one of 4 bits as its
draft, which must not change a token; the share of proposed tokens that it takes, and how many tokens a call gives, are
beside the times. The model is so small that engines of fewer bits, and a draft, need not be faster; the perplexity of
fp32 must be the model's.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from _results import write

import enginesmith

PROMPT, NEW = 128, 64
AT_LEAST = {"engine fp32": 1.0, "the fastest engine": 3.0}
"""Times as fast as the best of transformers in fp32, where reading the weights bounds all alike."""

PRECISIONS = ("fp32", "int8-dynamic", "int8-weights", "int4-weights")
SAMPLE = Path(__file__).parents[1] / "samples" / "text"
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, str | int], str | None]] = {
    "": (PRECISIONS, {}, None),
    ", GPTQ": (("int8-weights", "int4-weights"), {"rounding": "gptq"}, None),
    ", blocks of 128": (("int4-weights",), {"block": 128}, None),
    ", blocks of 128, GPTQ": (("int4-weights",), {"block": 128, "rounding": "gptq"}, None),
    ", caches of 8 bits": (("fp32", "int4-weights"), {}, "kv-cache"),
    ", caches of 8 bits, one scale": (("fp32",), {}, "kv-cache:per_channel=false"),
}
"""Of the sample: what is added to a name, precisions, options of quantization, and a pass behind the others."""

CHECKING, PROPOSING, DRAFTED = "engine fp32", "engine int4-weights", 4
"""Of the sample: the engine that checks drafts of so many tokens, and the one that proposes them."""

Answer = Callable[[int], list]
"""Finds so many new tokens."""


def main() -> int:
    options = parse_options()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model, ids = sample() if options.sample else random_model()
    perplexities: dict[str, float] = {}
    drafts: dict[str, enginesmith.Speculation] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        candidates = {"transformers": eager(model, ids), "transformers, static cache": eager(model, ids, "static")}
        if options.sample:
            perplexities = dict.fromkeys(candidates, perplexity_of(model))
        engines: dict[str, enginesmith.Engine] = {}
        variants = VARIANTS if options.sample else {"": (options.precisions, {}, None)}
        for suffix, (precisions, quantization, also) in variants.items():
            start = time.perf_counter()
            place = options.bundle or Path(folder) / "bundle"
            place = place / str(len(candidates)) if options.sample else place
            bundle = compiled(model, place, precisions, quantization, also, options)
            print(f"compiled{suffix} in {time.perf_counter() - start:.0f} s")
            for record in bundle.manifest["engines"]:
                name = f"engine {record['precision']}{suffix}"
                engines[name] = stack.enter_context(bundle.load(record["name"]))
                candidates[name] = engine(engines[name], ids)
                if options.sample:
                    perplexities[name] = engines[name].perplexity(held_out())
        if options.sample:
            name = f"{CHECKING}, draft {PROPOSING.removeprefix('engine ')}"
            drafts[name] = enginesmith.Speculation()
            candidates[name] = engine(engines[CHECKING], ids, engines[PROPOSING], drafts[name])
        found = race(candidates, options.rounds, options.seed)
    best = min(row["token_ms"] for name, row in found.items() if name.startswith("transformers"))
    for name, row in found.items():
        row["speed_up"] = best / row["token_ms"]
        times = f"{row['token_ms']:7.2f} ms a token, {row['prompt_ms']:7.1f} ms for the prompt and one"
        if name in perplexities:
            row["perplexity"] = perplexities[name]
            times += f", perplexity {row['perplexity']:.3f}"
        if name in drafts:
            row["accepted"] = drafts[name].accepted / drafts[name].proposed
            row["tokens_per_call"] = drafts[name].tokens / drafts[name].calls
            times += f", {row['accepted']:.0%} of the draft taken, {row['tokens_per_call']:.2f} tokens a call"
        print(f"{name:42} {times}, {row['speed_up']:.2f}x")
    reached = {
        "engine fp32": found["engine fp32"]["speed_up"],
        "the fastest engine": max(row["speed_up"] for name, row in found.items() if name.startswith("engine")),
    }
    passed = found["engine fp32"]["same_tokens"] and reached["engine fp32"] >= AT_LEAST["engine fp32"]
    if options.sample:
        passed = passed and math.isclose(perplexities["engine fp32"], perplexities["transformers"], rel_tol=1e-3)
        passed = passed and all(found[name]["same_tokens"] for name in drafts)
    else:
        passed = passed and reached["the fastest engine"] >= AT_LEAST["the fastest engine"]
    what = "generation_sample" if options.sample else "generation"
    results = {"prompt_tokens": PROMPT, "new_tokens": NEW, "candidates": found}
    write(what, results, options.out)
    return 0 if passed else 1


def random_model() -> tuple[transformers.PreTrainedModel, np.ndarray]:
    """GPT-2 124M with random weights, and a random prompt."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=None, eos_token_id=None)).eval()
    return model, np.random.default_rng(0).integers(0, model.config.vocab_size, PROMPT)


def sample() -> tuple[transformers.PreTrainedModel, np.ndarray]:
    """The model of samples/text in float32, and a prompt that it never saw."""
    model = transformers.AutoModelForCausalLM.from_pretrained(SAMPLE / "gpt", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model, held_out().reshape(-1)[:PROMPT]


def held_out() -> np.ndarray:
    """Windows of text that training never saw."""
    with np.load(SAMPLE / "test.npz") as file:
        return np.asarray(file["ids"])


def perplexity_of(model: transformers.PreTrainedModel) -> float:
    """Of the model as transformers runs it, on the held-out windows."""
    ids = torch.from_numpy(held_out())
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp())


def compiled(
    model: transformers.PreTrainedModel,
    place: Path,
    precisions: Sequence[str],
    quantization: Mapping[str, str | int],
    also: str | None,
    options: argparse.Namespace,
) -> enginesmith.Bundle:
    """The model with its cache and fused attention, in each precision."""
    return enginesmith.compile(
        model,
        place,
        decoder={"max_length": 512, "batch": 4, "speculative_tokens": DRAFTED}
        if options.sample
        else {"max_length": options.max_length, "batch": 1},
        targets=[f"onnxruntime-cpu:threads={options.threads}"],
        precisions=precisions,
        quantization=quantization,
        calibration_data=str(SAMPLE / "calibration.npz") if options.sample else None,
        passes=["simplify", "dedupe", "fuse-attention", *([also] if also else [])],
        random_calibration=not options.sample,
        benchmark=False,
        max_samples=1,
    )


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


def engine(
    opened: enginesmith.Engine,
    ids: np.ndarray,
    draft: enginesmith.Engine | None = None,
    counts: enginesmith.Speculation | None = None,
) -> Answer:
    """An engine's greedy search, with a draft or without."""
    return lambda count: opened.generate(ids, count, draft=draft, speculation=counts)[0]


def race(candidates: dict[str, Answer], rounds: int, seed: int, new: int = NEW) -> dict[str, dict[str, float]]:
    """Medians over the rounds, and whether the tokens are those of the first candidate."""
    tokens = {name: answer(new) for name, answer in candidates.items()}  # the first call warms up
    first = next(iter(tokens.values()))
    return {
        name: {**medians(pairs, new), "same_tokens": tokens[name] == first}
        for name, pairs in timed(candidates, rounds, seed, new).items()
    }


def medians(pairs: Sequence[tuple[float, float]], new: int = NEW) -> dict[str, float]:
    """Milliseconds of a token, and of the prompt with the first one, from those of `timed`."""
    return {
        "token_ms": statistics.median((whole - prompt) / (new - 1) for prompt, whole in pairs),
        "prompt_ms": statistics.median(prompt for prompt, _ in pairs),
    }


def timed(
    candidates: dict[str, Answer], rounds: int, seed: int, new: int = NEW
) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds of an answer of one token and of all, of each round, in which all have their turn."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    order, shuffle = list(candidates), random.Random(seed)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            pair = []
            for count in (1, new):
                start = time.perf_counter()
                candidates[name](count)
                pair.append((time.perf_counter() - start) * 1e3)
            times[name].append((pair[0], pair[1]))
    return times


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), help="fp32 must be among them")
    parser.add_argument("--bundle", type=Path, help="keep the engines here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", action="store_true", help="the model of samples/text, with perplexities")
    parser.add_argument("--out", type=Path, help="default: generation.json or generation_sample.json in the results")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
