"""Generation on the CPU beside onnxruntime-genai: a Llama of GPT-2's size in 4 bits, milliseconds a token, interleaved.

The model has 124M random weights, the prompt 128 tokens, and 64 new ones are found greedily. Both round weights to
nearest in blocks of 32, ours with zero points, as by default, and without, theirs without; how far the logits after the
prompt are from those in fp32 stands beside the times, as random weights have no perplexity to compare. Exits with 1
where each of our engines takes longer for the whole answer, or is farther off.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import generation
import numpy as np
import torch
import transformers
from _results import write

import enginesmith
from enginesmith.compiler.difference import relative_l2
from enginesmith.compiler.states import completed

WORKER = Path(__file__).with_name("genai_worker.py")
OURS = {"engine int4-weights": {}, "engine int4-weights, symmetric": {"symmetric": True}}
THEIRS = "onnxruntime-genai int4"
FURTHER = 1.1
"""Our error is at most so many times theirs."""


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
        model.save_pretrained(Path(folder) / "model")
        (Path(folder) / "model" / "tokenizer.json").write_bytes(
            (generation.SAMPLE / "gpt" / "tokenizer.json").read_bytes()
        )
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024}  # the builder wants one
        (Path(folder) / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
        genai = Genai(options.genai_python, Path(folder) / "model", Path(folder) / "genai")
        errors = {THEIRS: relative_l2(np.array(genai.ask(ids, 0), np.float32), exact)}
        candidates: dict[str, generation.Answer] = {
            "transformers": generation.eager(model, ids),
            THEIRS: lambda count: [int(token) for token in genai.ask(ids, count)],
        }
        for name, quantization in OURS.items():
            bundle = enginesmith.compile(
                model, Path(folder) / name, decoder={"max_length": 1024, "batch": 1}, quantization=quantization,
                targets=["onnxruntime-cpu:threads=2"], precisions=["int4-weights"], random_calibration=True,
                passes=["simplify", "dedupe", "fuse-attention", "fuse-transformer"], benchmark=False, max_samples=1,
            )  # fmt: skip
            engine = stack.enter_context(bundle.load(bundle.manifest["engines"][0]["name"]))
            errors[name] = relative_l2(_logits(engine, ids), exact)
            candidates[name] = generation.engine(engine, ids)
        found = generation.race(candidates, options.rounds, 0)
    for name, row in found.items():
        row.pop("same_tokens")
        row["answer_ms"] = row["prompt_ms"] + (generation.NEW - 1) * row["token_ms"]
        if name in errors:
            row["logits_relative_l2"] = errors[name]
        print(f"{name:24} " + ", ".join(f"{key} {value:.3g}" for key, value in row.items()))
    ratios = {name: found[THEIRS]["answer_ms"] / found[name]["answer_ms"] for name in OURS}
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} times as fast for the whole answer")
    write("generation_genai", {"candidates": found, "answer_ratios": ratios}, options.out)
    passed = (ratios[name] >= 1 and errors[name] <= FURTHER * errors[THEIRS] for name in OURS)
    return 0 if any(passed) else 1


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
