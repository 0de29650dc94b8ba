# Triton's Python backend on an engine of enginesmith. It needs enginesmith, NumPy and the engine's runtime, and stands
# in the folder of a model's version, with serve.json beside it.
#
# Triton hands over requests that wait together. They are joined along the first axis, run at once and taken apart.
# Where the whole fails, each is run by itself, so that what is wrong with one does not become its neighbours' answer.

import json
import sys
from pathlib import Path

import triton_python_backend_utils as pb_utils

_WANTED = json.loads(Path(__file__).with_name("serve.json").read_text())
sys.path[:0] = _WANTED["path"]  # the interpreter within the server takes no notice of PYTHONPATH

import numpy as np  # noqa: E402

from enginesmith.errors import DataError, EnginesmithError  # noqa: E402
from enginesmith.serving import hosted  # noqa: E402


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self._merged = config["max_batch_size"] > 0
        self._engine = hosted.open_engine(args, _WANTED, config)
        signature = self._engine.signature
        self._inputs = [(spec.name, len(spec.shape)) for spec in signature.inputs]
        self._outputs = [spec.name for spec in signature.outputs]

    def execute(self, requests):
        given, rows = [], []
        for request in requests:
            arrays = {name: self._read(request, name, rank) for name, rank in self._inputs}
            given.append(arrays)
            rows.append(next(iter(arrays.values())).shape[0] if self._merged else 1)
        if len(requests) == 1 or not self._merged:
            return [self._alone(arrays, request) for arrays, request in zip(given, requests, strict=True)]
        try:
            joined = {name: np.concatenate([arrays[name] for arrays in given]) for name, _ in self._inputs}
            outputs = self._engine.run(joined)
        except EnginesmithError:
            return [self._alone(arrays, request) for arrays, request in zip(given, requests, strict=True)]
        ends = np.cumsum(rows).tolist()
        return [
            self._answer({name: outputs[name][end - count : end] for name in self._wanted(request)})
            for request, end, count in zip(requests, ends, rows, strict=True)
        ]

    def finalize(self):
        self._engine.close()

    def _read(self, request, name, rank):
        array = hosted.read(pb_utils.get_input_tensor_by_name(request, name))
        return array if array.ndim == rank else array.reshape(array.shape[:rank])

    def _alone(self, arrays, request):
        try:
            outputs = self._engine.run(arrays)
        except EnginesmithError as error:
            kinds = pb_utils.TritonError
            kind = kinds.INVALID_ARG if isinstance(error, DataError) else kinds.INTERNAL
            return pb_utils.InferenceResponse([], pb_utils.TritonError(str(error), kind))
        return self._answer({name: outputs[name] for name in self._wanted(request)})

    def _wanted(self, request):
        asked = request.requested_output_names()
        return [name for name in self._outputs if name in asked]

    def _answer(self, outputs):
        return pb_utils.InferenceResponse([hosted.tensor(pb_utils, name, array) for name, array in outputs.items()])
