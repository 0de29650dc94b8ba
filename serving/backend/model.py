# Triton's Python backend on an engine of enginesmith. It needs enginesmith, NumPy and the engine's runtime, and stands
# in the folder of a model's version, with serve.json beside it.
#
# Triton hands over requests that wait together. They are joined along the first axis, run at once and taken apart.
# Where the whole fails, each is run by itself, so that what is wrong with one does not become its neighbours' answer.

import ctypes
import json
import os
import sys
from pathlib import Path

import triton_python_backend_utils as pb_utils

_WANTED = json.loads(Path(__file__).with_name("serve.json").read_text())
sys.path[:0] = _WANTED["path"]  # the interpreter within the server takes no notice of PYTHONPATH

import numpy as np  # noqa: E402

import enginesmith  # noqa: E402
from enginesmith.errors import EnginesmithError  # noqa: E402

_OLD_NUMPY = int(np.__version__.partition(".")[0]) < 2
_forget = ctypes.pythonapi.PyCapsule_SetDestructor
_forget.argtypes = [ctypes.py_object, ctypes.c_void_p]


class TritonPythonModel:
    def initialize(self, args):
        home = Path(args["model_repository"]) / args["model_version"]
        config = json.loads(args["model_config"])
        self._merged = config["max_batch_size"] > 0
        options = {}
        if args["model_instance_kind"] == "GPU":
            options = _on_gpu(int(args["model_instance_device_id"]), _WANTED["gpu_option"])
        elif (copies := sum(group["count"] for group in config["instance_group"])) > 1:
            options = {"threads": max(1, len(os.sched_getaffinity(0)) // copies)}
        self._engine = enginesmith.load(home / _WANTED["bundle"], _WANTED["engine"], options=options)
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
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        array = tensor.as_numpy() if _OLD_NUMPY else np.from_dlpack(tensor)
        return array if array.ndim == rank else array.reshape(array.shape[:rank])

    def _alone(self, arrays, request):
        try:
            outputs = self._engine.run(arrays)
        except EnginesmithError as error:
            return pb_utils.InferenceResponse([], pb_utils.TritonError(str(error)))
        return self._answer({name: outputs[name] for name in self._wanted(request)})

    def _wanted(self, request):
        asked = request.requested_output_names()
        return [name for name in self._outputs if name in asked]

    def _answer(self, outputs):
        return pb_utils.InferenceResponse([_tensor(name, array) for name, array in outputs.items()])


def _on_gpu(number, option):
    """Options that put the engine on a GPU; a target without one takes the first that it sees."""
    if option:
        return {option: number}
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[number] if number < len(visible) else str(number)
    return {}


def _tensor(name, array):
    if array.ndim == 0:
        array = array.reshape(1)
    if _OLD_NUMPY:
        return pb_utils.Tensor(name, np.ascontiguousarray(array))
    # The backend of Triton 24.10 does not see NumPy 2's arrays: it would answer with an empty tensor, and say nothing.
    # Through DLPack it does, if nothing calls back into Python once it lets go of the memory, which it may do in a
    # thread that has no interpreter. The array is copied, so that it owns what the capsule points to.
    capsule = np.array(array, order="C").__dlpack__()
    _forget(capsule, None)
    return pb_utils.Tensor.from_dlpack(name, capsule)
