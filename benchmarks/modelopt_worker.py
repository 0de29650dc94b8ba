"""Quantizes with NVIDIA's Model-Optimizer, under an interpreter of its own: see benchmarks/README.md.

`python modelopt_worker.py MODEL DATA OUTPUT OPTIONS`: DATA is an .npz whose arrays are named `batch/input`, OPTIONS a
JSON object of what `modelopt.onnx.quantization.quantize` takes.
"""

import json
import sys

import numpy as np
from modelopt.onnx.quantization import quantize
from onnxruntime.quantization import CalibrationDataReader


class Reader(CalibrationDataReader):
    def __init__(self, path: str) -> None:
        batches: dict[int, dict[str, np.ndarray]] = {}
        with np.load(path) as file:
            for key in file.files:
                number, _, name = key.partition("/")
                batches.setdefault(int(number), {})[name] = file[key]
        self._batches = [batches[number] for number in sorted(batches)]
        self.rewind()

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)

    def get_first(self) -> dict[str, np.ndarray]:
        return self._batches[0]

    def rewind(self) -> None:
        self._left = iter(self._batches)


def main(model: str, data: str, output: str, options: str) -> None:
    quantize(
        model,
        quantize_mode="int8",
        calibration_data_reader=Reader(data),
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=output,
        log_level="ERROR",
        **json.loads(options),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
