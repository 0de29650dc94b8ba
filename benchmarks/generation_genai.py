"""Generation on the CPU beside onnxruntime-genai: a Llama of GPT-2's size in 4 bits, milliseconds a token, interleaved.

The model has 124M random weights, the prompt 128 tokens, and 64 new ones are found greedily. Both round weights to
nearest: ours in blocks of 32 with zero points, as by default, and without, and in blocks of 128; theirs, as by default,
in blocks of 32 without. How far the logits after the prompt are from those in fp32 stands beside the times, and as
random weights have no perplexity, that of the model of samples/text, brought to 4 bits in the same ways, on text that
it never saw. Exits with 1 where each of our engines takes longer for the whole answer, or has a perplexity above theirs
by more than `HIGHER` says.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import generation
import numpy as np
import torch
import transformers
from _results import write

import enginesmith
from enginesmith.compiler.benchmark.intervals import speed_up
from enginesmith.compiler.difference import relative_l2
from enginesmith.compiler.states import completed

WORKER = Path(__file__).with_name("genai_worker.py")
OURS: dict[str, dict[str, Any]] = {
    "engine int4-weights": {},
    "engine int4-weights, symmetric": {"symmetric": True},
    "engine int4-weights, symmetric, blocks of 128": {"symmetric": True, "block": 128},
}
THEIRS = "onnxruntime-genai int4"
HIGHER = 1.005
"""Our perplexity is at most so many times theirs: ln p has a standard error of 0.002 on that text."""


class Genai:
    """A worker that answers one line after the other."""

    def __init__(self, python: Path, model: Path, output: Path) -> None:
        command = [str(python), str(WORKER), str(model), str(output)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._line() != "ready\n":
            raise SystemExit("onnxruntime-genai did not start: see above")

    def ask(self, ids: np.ndarray, count: int) -> list[float]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ids": ids.tolist(), "count": count}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._line())

    def perplexity(self, texts: np.ndarray) -> float:
        """Of all texts together."""
        return float(np.exp(-np.mean([self.ask(text, -1) for text in texts])))

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def main() -> int:
    options = parse_options()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = llama()
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, generation.PROMPT)
    with torch.inference_mode():
        exact = model(torch.from_numpy(ids)[None]).logits[0, -1].numpy()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        genai = Genai(options.genai_python, kept(model, Path(folder) / "model"), Path(folder) / "genai")
        errors = {THEIRS: relative_l2(np.array(genai.ask(ids, 0), np.float32), exact)}
        candidates: dict[str, generation.Answer] = {
            "transformers": generation.eager(model, ids),
            THEIRS: lambda count: [int(token) for token in genai.ask(ids, count)],
        }
        for name, quantization in OURS.items():
            bundle = compiled(model, Path(folder) / name, quantization)
            engine = stack.enter_context(bundle.load(bundle.manifest["engines"][0]["name"]))
            errors[name] = relative_l2(_logits(engine, ids), exact)
            candidates[name] = generation.engine(engine, ids)
        for answer in candidates.values():  # the first call warms up
            answer(generation.NEW)
        times = generation.timed(candidates, options.rounds, 0)
        perplexities = perplexities_of(options.genai_python, Path(folder))
    found = {}
    for name, pairs in times.items():
        found[name] = {**generation.medians(pairs), "answer_ms": statistics.median(whole for _, whole in pairs)}
        found[name] |= {"logits_relative_l2": errors[name]} if name in errors else {}
        found[name] |= {"perplexity_of_sample": perplexities[name]}
        print(f"{name:46} " + ", ".join(f"{key} {value:.4g}" for key, value in found[name].items()))
    answers = {name: [whole for _, whole in pairs] for name, pairs in times.items()}
    ratios = {name: speed_up(THEIRS, answers[THEIRS], answers[name], 0) for name in OURS}
    for name, ratio in ratios.items():
        interval = f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        print(f"{name}: {interval} times as fast for the whole answer")
    write("generation_genai", {"candidates": found, "answer_ratios": ratios}, options.out)
    passed = (ratios[name]["ratio"] >= 1 and perplexities[name] <= HIGHER * perplexities[THEIRS] for name in OURS)
    return 0 if any(passed) else 1


def kept(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """The model as a folder that onnxruntime-genai's builder reads."""
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((generation.SAMPLE / "gpt" / "tokenizer.json").read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024}  # the builder wants one
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def compiled(model: transformers.PreTrainedModel, folder: Path, quantization: dict[str, Any]) -> enginesmith.Bundle:
    """A bundle with the engine in 4 bits."""
    return enginesmith.compile(
        model, folder, decoder={"max_length": model.config.max_position_embeddings, "batch": 1},
        quantization=quantization, targets=["onnxruntime-cpu:threads=2"], precisions=["int4-weights"],
        passes=["simplify", "dedupe", "fuse-attention", "fuse-transformer"], random_calibration=True, benchmark=False,
        max_samples=1, tolerances={"int4-weights": {"relative_l2": 1, "max_abs": 100, "cosine": 0, "top1": 0}},
    )  # fmt: skip


def perplexities_of(genai_python: Path, folder: Path) -> dict[str, float]:
    """Of the model of samples/text in 4 bits, and by transformers in fp32, on its windows."""
    with np.load(generation.SAMPLE / "test.npz", allow_pickle=False) as file:
        texts = file["ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(generation.SAMPLE / "gpt", dtype=torch.float32).eval()
    with torch.inference_mode():
        ids = torch.from_numpy(texts)
        logits = model(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    found = {"transformers": float(loss.exp())}
    found[THEIRS] = Genai(genai_python, kept(model, folder / "sample"), folder / "genai-sample").perplexity(texts)
    for name, quantization in OURS.items():
        bundle = compiled(model, folder / f"sample, {name}", quantization)
        with bundle.load(bundle.manifest["engines"][0]["name"]) as engine:
            found[name] = engine.perplexity(texts)
    return found


def llama() -> transformers.PreTrainedModel:
    """Of 124M random weights; those of normalizations lie around 1, not at it, where a product with them would go."""
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None  # an answer does not end early
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1, 0.1)
    return model


def _logits(engine: enginesmith.Engine, ids: np.ndarray) -> np.ndarray:
    """Those that follow the prompt."""

    return engine.run(completed(engine.signature, {"ids": ids[None]}))["logits"][0]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--genai-python", type=Path, default=Path(sys.executable),
        help="interpreter with onnxruntime-genai, torch, transformers and onnx-ir",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="default: generation_genai.json in the results")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
