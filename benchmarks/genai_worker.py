"""Generates with onnxruntime-genai, under an interpreter of its own: see benchmarks/README.md.

`python genai_worker.py MODEL OUTPUT`: MODEL is a folder of transformers, which is converted to OUTPUT in 4 bits as its
own builder does by default. Then each line on stdin, a JSON object `{"ids": [...], "count": n}`, is answered by a line
with the new tokens; n is 0 for the logits that follow, and -1 for the ln p of each token but the first.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np


def main(source: str, output: str) -> None:
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", output]
    subprocess.run(
        [*builder, "-p", "int4", "-e", "cpu", "-c", f"{output}-cache"],
        check=True,
        cwd=Path(output).parent,
        stdout=sys.stderr,
    )
    settings = Path(output) / "genai_config.json"
    config = json.loads(settings.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 2
    settings.write_text(json.dumps(config))

    import onnxruntime_genai

    model = onnxruntime_genai.Model(output)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["count"] < 0:
            print(json.dumps(likelihoods(model, asked["ids"])), flush=True)
            continue
        length = len(asked["ids"]) + asked["count"]
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, min_length=length, max_length=max(length, len(asked["ids"]) + 1))
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(asked["ids"])
        found = []
        for _ in range(asked["count"]):
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        print(json.dumps(found or generator.get_logits()[0, -1].tolist()), flush=True)


def likelihoods(model, ids):
    """The ln p of each token after those before it, which are read one by one."""
    import onnxruntime_genai

    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(ids) + 1)
    generator, found = onnxruntime_genai.Generator(model, parameters), []
    for token, following in itertools.pairwise(ids):
        generator.append_tokens([token])
        logits = generator.get_logits()[0, -1].astype("float64")
        logits -= logits.max()
        found.append(float(logits[following] - np.log(np.exp(logits).sum())))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
