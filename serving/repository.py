"""A model repository of a bundle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from ..compiler.engine import read_manifest
from ..compiler.signature import Signature
from .settings import Serving

_MODEL = """
import ctypes
import numpy as np
import triton_python_backend_utils as pb
_free = ctypes.pythonapi.PyCapsule_SetDestructor
_free.argtypes = [ctypes.py_object, ctypes.c_void_p]
def tensor(name, array):
    capsule = np.array(array).__dlpack__()
    _free(capsule, None)
    return pb.Tensor.from_dlpack(name, capsule)
class TritonPythonModel:
    def initialize(self, args):
        import enginesmith
        self.engine = enginesmith.load(BUNDLE, ENGINE)
    def execute(self, requests):
        names = [s.name for s in self.engine.signature.inputs]
        rows = [pb.get_input_tensor_by_name(r, names[0]).shape()[0] for r in requests]
        feed = {n: np.concatenate([np.from_dlpack(pb.get_input_tensor_by_name(r, n)) for r in requests]) for n in names}
        out = self.engine.run(feed)
        cut = np.cumsum(rows)[:-1]
        parts = {n: np.split(a, cut) for n, a in out.items()}
        return [pb.InferenceResponse([tensor(n, p[i]) for n, p in parts.items()]) for i in range(len(requests))]
"""
_T = {"float32": "FP32", "int64": "INT64", "int32": "INT32", "float16": "FP16"}


@dataclasses.dataclass(frozen=True)
class Repository:
    """A folder."""

    path: Path
    name: str


def export(bundle: Path, folder: Path, settings: Serving) -> Repository:
    """Writes it."""
    signature = Signature.from_json(read_manifest(bundle)["signature"])
    name = settings.name or bundle.name
    home = folder / name
    (home / "1").mkdir(parents=True)
    (home / "1" / "model.py").write_text(f"BUNDLE, ENGINE = {str(bundle.absolute())!r}, {settings.engine!r}\n" + _MODEL)
    axis = signature.batch_axis
    text = f'name: "{name}"\nbackend: "python"\nmax_batch_size: {signature.axes[axis].max if axis else 0}\n'
    for kind, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for s in specs:
            dims = [d if isinstance(d, int) else -1 for d in (s.shape[1:] if axis else s.shape)]
            text += f"{kind} [ {{ name: {json.dumps(s.name)} data_type: TYPE_{_T[s.dtype]} dims: {dims} }} ]\n"
    text += f"instance_group [ {{ count: {settings.instances} kind: KIND_CPU }} ]\n"
    text += f"dynamic_batching {{ default_queue_policy {{ max_queue_size: {settings.max_queue} }} }}\n"
    (home / "config.pbtxt").write_text(text)
    return Repository(folder, name)
