"""What OpenVINO's counters tell of each layer that it executes, and which nodes it was fused from."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from .base import Arrays
from .profile import LayerTime, Profile, calls_for, medians


def profile(compiled: Any, inputs: Arrays) -> Profile:
    """Runs a model that was compiled with PERF_COUNT."""
    request = compiled.create_infer_request()
    names = {name for value in compiled.inputs for name in value.get_names()}
    feed = {name: np.asarray(array, order="C") for name, array in inputs.items() if name in names}
    request.infer(feed)
    start = time.perf_counter()
    request.infer(feed)
    calls = calls_for(1000 * (time.perf_counter() - start))
    runs = []
    kinds: dict[str, str] = {}
    for _ in range(calls):
        request.infer(feed)
        executed = [counter for counter in request.profiling_info if counter.status.name == "EXECUTED"]
        kinds.update((counter.node_name, counter.node_type) for counter in executed)
        runs.append({counter.node_name: 1000 * counter.real_time.total_seconds() for counter in executed})
    origins = _origins(compiled.get_runtime_model())
    layers = (LayerTime(n, kinds[n], ms, "cpu", nodes=origins.get(n, ())) for n, ms in medians(runs).items())
    return Profile(tuple(layers), "OpenVINO's counters", calls)


def _origins(model: Any) -> Mapping[str, tuple[str, ...]]:
    found = {}
    for node in model.get_ops():
        value = node.get_rt_info()["originalLayersNames"]
        text = str(value.astype(str)) if hasattr(value, "astype") else str(value)
        found[node.get_friendly_name()] = tuple(name for name in text.split(",") if name)
    return found
