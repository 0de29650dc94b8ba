"""Quantizes with NNCF for OpenVINO, under an interpreter of its own: see benchmarks/README.md.

`python nncf_worker.py MODEL DATA OUTPUT OPTIONS`: DATA is an .npz whose arrays are named `batch/input`, OUTPUT an .xml,
OPTIONS a JSON object of what `nncf.quantize` takes, enumerations by their names.
"""

import json
import sys

import nncf
import numpy as np
import openvino

ENUMERATIONS = {"preset": nncf.QuantizationPreset, "model_type": nncf.ModelType}


def main(model: str, data: str, output: str, options: str) -> None:
    batches: dict[int, dict[str, np.ndarray]] = {}
    with np.load(data) as file:
        for key in file.files:
            number, _, name = key.partition("/")
            batches.setdefault(int(number), {})[name] = file[key]
    dataset = nncf.Dataset([batches[number] for number in sorted(batches)])
    given = json.loads(options)
    given |= {name: kind[given[name]] for name, kind in ENUMERATIONS.items() if name in given}
    made = nncf.quantize(openvino.Core().read_model(model), dataset, subset_size=len(batches), **given)
    openvino.save_model(made, output, compress_to_fp16=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
