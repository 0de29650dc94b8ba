"""The targets by name. A target is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..compiler.extensions import is_own, load_class, named
from ..compiler.options import build, split
from ..errors import UnknownNameError

if TYPE_CHECKING:
    from .base import Target

TARGETS = {
    "onnxruntime-cpu": "onnxruntime_cpu:OnnxRuntimeCpu",
    "onnxruntime-cuda": "onnxruntime_cuda:OnnxRuntimeCuda",
    "openvino": "openvino:OpenVINO",
    "pipeline": "pipeline:Pipeline",
    "tensorrt": "tensorrt:TensorRT",
    "tensorrt-rtx": "tensorrt_rtx:TensorRTRTX",
    "torch-inductor": "torch_inductor:TorchInductor",
    "torchscript": "torchscript:TorchScript",
}
"""Name of a target: module in this package and class."""

COMPOSED = frozenset(("pipeline",))
"""Targets whose engines are made of other targets' engines."""


def is_known(name: str) -> bool:
    """Whether there is a target of that name, ours or the user's."""
    return name in TARGETS or named("target", name) is not None


def get_target(name: str, options: Mapping[str, Any] | None = None) -> Target:
    """Makes a target with these options; one of the user's is known by its name once its file was named.

    Raises:
        UnknownNameError: no target or no option of that name.
        RecipeError: an option with a wrong value.
    """
    if own := named("target", name):
        found: Target = build(own, options or {}, name)
        return found
    if name not in TARGETS:
        raise UnknownNameError("target", name, TARGETS)
    module, _, cls = TARGETS[name].partition(":")
    made: Target = build(getattr(importlib.import_module(f".{module}", __name__), cls), options or {}, name)
    return made


def parse_target(text: str) -> Target:
    """Makes a target from its text form: ``tensorrt:workspace_gib=4`` or ``my_target.py:MyTarget:option=value``.

    Raises: see `get_target`.
    """
    name, options = split(text)
    if not is_own(text):
        return get_target(name, options)
    from .base import Target

    return get_target(load_class(name, "target", Target, TARGETS).name, options)
