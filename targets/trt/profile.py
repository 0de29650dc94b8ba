"""What TensorRT's profiler tells of the layers of an engine, with the nodes that its inspector names."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..base import Arrays
from ..profile import LayerTime, Profile, calls_for, medians, parts_of
from .layers import TENSORS
from .runner import SessionRunner, WorkerRunner

_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]\x1e\x1f]+)\]")


def profile(runner: SessionRunner | WorkerRunner, inputs: Arrays) -> Profile:
    """Runs an engine under TensorRT's profiler, and closes it."""
    with contextlib.closing(runner):
        runner.run(inputs)
        start = time.perf_counter()
        runner.run(inputs)
        runs, layers = runner.profile(inputs, calls_for(1000 * (time.perf_counter() - start)))
    return read_layers(runs, layers)


def read_layers(runs: Sequence[Mapping[str, float]], layers: Sequence[Any]) -> Profile:
    """Layers with their times; `layers` are the inspector's dicts, or text where TensorRT wrote no JSON."""
    told = {str(layer.get("Name", "")): layer for layer in layers if isinstance(layer, dict)}
    found = [_layer(name, ms, told.get(name, {})) for name, ms in medians(runs).items()]
    note = "under its profiler TensorRT runs without a CUDA graph"
    return Profile(tuple(found), "TensorRT's profiler", len(runs), notes=(note,))


def _layer(name: str, ms: float, facts: Mapping[str, Any]) -> LayerTime:
    nodes = dict.fromkeys((*_ONNX_LAYER.findall(str(facts.get("Metadata", ""))), *parts_of(name)))
    outputs = tuple(str(tensor.get("Name", "")) for tensor in facts.get(TENSORS[1]) or [])
    operator = str(facts.get("LayerType") or _guessed(name))
    return LayerTime(name, operator, ms, "cuda", nodes=tuple(nodes), outputs=outputs)


def _guessed(name: str) -> str:
    """The type of a layer that the inspector does not list, as those that TensorRT adds when it runs."""
    return "Reformat" if name.startswith("Reformatting CopyNode") else "unknown"
