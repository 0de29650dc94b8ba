"""The targets by name. A target is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..compiler.options import build, split
from ..errors import UnknownNameError

if TYPE_CHECKING:
    from .base import Target

TARGETS = {
    "onnxruntime-cpu": "onnxruntime_cpu:OnnxRuntimeCpu",
    "onnxruntime-cuda": "onnxruntime_cuda:OnnxRuntimeCuda",
    "openvino": "openvino:OpenVINO",
    "tensorrt": "tensorrt:TensorRT",
    "tensorrt-rtx": "tensorrt_rtx:TensorRTRTX",
    "torch-inductor": "torch_inductor:TorchInductor",
    "torchscript": "torchscript:TorchScript",
}
"""Name of a target: module in this package and class."""


def get_target(name: str, options: Mapping[str, Any] | None = None) -> Target:
    """Makes a target with these options.

    Raises:
        UnknownNameError: no target or no option of that name.
        RecipeError: an option with a wrong value.
    """
    if name not in TARGETS:
        raise UnknownNameError("target", name, TARGETS)
    module, _, cls = TARGETS[name].partition(":")
    made: Target = build(getattr(importlib.import_module(f".{module}", __name__), cls), options or {}, name)
    return made


def parse_target(text: str) -> Target:
    """Makes a target from its text form, for instance ``tensorrt:workspace_gib=4``."""
    return get_target(*split(text))
