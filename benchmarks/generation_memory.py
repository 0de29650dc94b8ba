"""Peak memory of generation on the CPU against what it has to hold: the engine's weights and the caches of its rows.

GPT-2 with random weights is compiled for each precision. A process of its own loads the engine, reads a prompt of 128
tokens for each row and finds new ones until the caches are full. Its peak resident memory while it generates, less
what it had before it loaded the engine, is compared with the bytes of the engine's files and of the caches. Exits with
1 where it is more than `AT_MOST` times that. The peak of loading stands beside it: ONNX Runtime packs weights for its
products then, of which the largest is there twice for that time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from _results import write

import enginesmith
from enginesmith.compiler.states import row_bytes

AT_MOST = 1.1
PROMPT = 128
PRECISIONS = ("fp32", "int8-weights", "int4-weights")
WORKER = """
import json, sys
import enginesmith, onnxruntime

def resident(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(what))

def forget_the_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

bundle, name, prompt, new, rows = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
before = resident("VmRSS")
forget_the_peak()
with enginesmith.load(bundle, name) as engine:
    loading = resident("VmHWM")
    forget_the_peak()
    engine.generate([prompt] * rows, new)
    print(json.dumps({"loading": loading - before, "generating": resident("VmHWM") - before}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS))
    parser.add_argument("--out", type=Path, help="default: generation_memory.json in the results")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=options.layers, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).eval()
    new = options.max_length - PROMPT
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, PROMPT).tolist()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        bundle = enginesmith.compile(
            model,
            Path(folder) / "bundle",
            decoder={"max_length": options.max_length, "batch": options.rows},
            targets=[f"onnxruntime-cpu:threads={options.threads}"],
            precisions=options.precisions,
            passes=["simplify", "dedupe", "fuse-attention"],
            random_calibration=True,
            benchmark=False,
            max_samples=1,
        )
        del model
        for record in bundle.manifest["engines"]:
            arguments = [str(bundle.path), record["name"], json.dumps(prompt), str(new), str(options.rows)]
            done = subprocess.run(
                [sys.executable, "-c", WORKER, *arguments], check=True, capture_output=True, text=True
            )
            measured = json.loads(done.stdout)
            with bundle.load(record["name"]) as engine:
                caches = options.rows * row_bytes(engine.signature)
            needed = record["size_bytes"] + caches
            found[record["precision"]] = {
                "weight_bytes": record["size_bytes"],
                "cache_bytes": caches,
                "loading_peak_bytes": measured["loading"],
                "peak_bytes": measured["generating"],
                "ratio": measured["generating"] / needed,
            }
    for precision, row in found.items():
        held = " + ".join(f"{row[key] / 1e6:.1f}" for key in ("weight_bytes", "cache_bytes"))
        peaks = f"peak {row['peak_bytes'] / 1e6:.1f} MB, of loading {row['loading_peak_bytes'] / 1e6:.1f} MB"
        print(f"{precision:14} weights + caches {held} MB; {peaks}; {row['ratio']:.2f} times, at most {AT_MOST}")
    write("generation_memory", {"prompt_tokens": PROMPT, "new_tokens": new, "engines": found}, options.out)
    return 0 if all(row["ratio"] <= AT_MOST for row in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
