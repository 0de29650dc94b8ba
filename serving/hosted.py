"""What the models of a repository share, within the interpreter that Triton's Python backend starts."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..compiler.engine import Engine, load

_OLD_NUMPY = int(np.__version__.partition(".")[0]) < 2
_forget = ctypes.pythonapi.PyCapsule_SetDestructor
_forget.argtypes = [ctypes.py_object, ctypes.c_void_p]


def open_engine(arguments: Mapping[str, str], wanted: Mapping[str, Any], config: Mapping[str, Any]) -> Engine:
    """The engine of a model, on the device of its instance.

    Args:
        arguments: that Triton gives to `initialize`.
        wanted: what stands in serve.json.
        config: of the model.
    """
    options: dict[str, Any] = {}
    if arguments["model_instance_kind"] == "GPU":
        options = _on_gpu(int(arguments["model_instance_device_id"]), wanted["gpu_option"])
    elif (copies := sum(group["count"] for group in config["instance_group"])) > 1:
        options = {"threads": max(1, len(os.sched_getaffinity(0)) // copies)}
    home = Path(arguments["model_repository"]) / arguments["model_version"]
    return load(home / wanted["bundle"], wanted["engine"], options=options)


def read(tensor: Any) -> np.ndarray:
    """The array of one of Triton's tensors."""
    return tensor.as_numpy() if _OLD_NUMPY else np.from_dlpack(tensor)


def tensor(backend: Any, name: str, array: np.ndarray) -> Any:
    """A tensor of Triton's.

    The backend of Triton 24.10 does not see NumPy 2's arrays: it would answer with an empty tensor, and say nothing.
    Through DLPack it does, if nothing calls back into Python once it lets go of the memory, which it may do in a thread
    that has no interpreter. The array is copied, so that it owns what the capsule points to.
    """
    if array.ndim == 0:
        array = array.reshape(1)
    if _OLD_NUMPY:
        return backend.Tensor(name, np.ascontiguousarray(array))
    capsule = np.array(array, order="C").__dlpack__()
    _forget(capsule, None)
    return backend.Tensor.from_dlpack(name, capsule)


def _on_gpu(number: int, option: str | None) -> dict[str, Any]:
    """Options that put the engine on a GPU; a target without one takes the first that it sees."""
    if option:
        return {option: number}
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[number] if number < len(visible) else str(number)
    return {}
