"""Reading a prompt of 1,024 tokens: engines beside torch.compile, interleaved.

The model is GPT-2 124M with random weights: in fp32 on the CPU, and in fp16 on a GPU with ``--gpu``. An engine reads
the prompt into an empty cache and gives the logits that follow; torch.compile runs the model without a cache, on the
last logits alone, which is less work. Exits with 1 where the fastest engine takes longer, or the logits of one differ
by more than `RELATIVE_L2` says.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from _results import write

import enginesmith
from enginesmith.compiler.difference import relative_l2
from enginesmith.targets import parse_target

LENGTH = 1024
PEER = "torch.compile"
ENGINES = {
    "fp32": {
        "onnxruntime-cpu": "onnxruntime-cpu:threads={threads}",
        "torch-inductor": "torch-inductor:threads={threads}",
    },
    "fp16": {"onnxruntime-cuda": "onnxruntime-cuda", "torch-inductor": "torch-inductor:device=cuda"},
}
"""By the precision: that of a CPU, and that of a GPU."""

RELATIVE_L2 = {"fp32": 1e-3, "fp16": 2e-2}


def main() -> int:
    options = parse_options()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    precision = "fp16" if options.gpu else "fp32"
    config = transformers.GPT2Config(
        n_layer=options.layers, n_positions=options.tokens + 1, bos_token_id=None, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, options.tokens))
    engines = ENGINES[precision]
    targets = [spec.format(threads=options.threads) for spec in engines.values()]
    rewrites = dict.fromkeys(name for target in targets for name in parse_target(target).rewrites(precision))
    with tempfile.TemporaryDirectory() as folder:
        bundle = enginesmith.compile(
            model,
            Path(folder) / "bundle",
            decoder={"max_length": options.tokens + 1, "batch": 1},
            targets=targets,
            precisions=[precision],
            passes=["simplify", "dedupe", *rewrites],
            random_calibration=True,
            benchmark=False,
            max_samples=1,
        )
        with contextlib.ExitStack() as stack:
            candidates = {PEER: compiled(model, ids, gpu=options.gpu)}
            for name in engines:
                candidates[name] = prompt_of(stack.enter_context(bundle.load(f"{name}-{precision}")), ids)
            logits = {name: call() for name, call in candidates.items()}  # the first call compiles
            found = race(candidates, options.rounds, options.seed)
    peer = logits[PEER].astype(np.float32)
    errors = {name: relative_l2(logits[name].astype(np.float32), peer) for name in engines}
    for name, prompt_ms in found.items():
        print(f"{name:16} {prompt_ms:9.2f} ms for {options.tokens} tokens")
    ratio = found[PEER] / min(found[name] for name in engines)
    print(f"the fastest engine is {ratio:.2f} times as fast; relative L2 of the logits {max(errors.values()):.1e}")
    results = {
        "tokens": options.tokens,
        "precision": precision,
        "prompt_ms": found,
        "ratio": ratio,
        "relative_l2": errors,
    }
    write("generation_prefill_gpu" if options.gpu else "generation_prefill", results, options.out)
    return 0 if ratio >= 1 and max(errors.values()) <= RELATIVE_L2[precision] else 1


def prompt_of(engine: enginesmith.Engine, ids: np.ndarray) -> Callable[[], np.ndarray]:
    """The engine on an empty cache, which its runner keeps where it can."""
    from enginesmith.compiler.generation.steps import steps_of

    steps = steps_of(engine._open_runner(), engine.signature, 1)
    past, count = np.zeros(1, np.int64), np.array([ids.shape[1]])
    return lambda: np.array(steps(ids, past, count))


def compiled(model: transformers.PreTrainedModel, ids: np.ndarray, *, gpu: bool) -> Callable[[], np.ndarray]:
    """The logits that follow the prompt, by torch.compile."""
    device = "cuda" if gpu else "cpu"
    model = model.to(device, torch.float16 if gpu else torch.float32)
    prompt = torch.from_numpy(ids).to(device)
    call = torch.compile(lambda tokens: model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1])

    def run() -> np.ndarray:
        with torch.inference_mode():
            return call(prompt).cpu().numpy()  # waits for the device

    return run


def race(candidates: dict[str, Callable[[], np.ndarray]], rounds: int, seed: int) -> dict[str, float]:
    """Median milliseconds of a call."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffle = list(candidates), random.Random(seed)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            start = time.perf_counter()
            candidates[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=LENGTH)
    parser.add_argument("--gpu", action="store_true", help="in fp16 on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: generation_prefill.json, or _gpu, in the results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
