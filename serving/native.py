"""Engines that a backend of Triton's runs by itself, without Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..targets.base import EngineInfo

OURS = ("engine.json", "build.log", "reproduce.sh", "results.json", "accuracy.json")
"""Files of an engine's folder that are no part of the engine."""


@dataclasses.dataclass(frozen=True)
class Native:
    """How a backend opens an engine.

    Attributes:
        platform: name of backend and format together.
        file: the engine's file, in the folder of the version.
        parameters: of the backend.
    """

    backend: str
    platform: str
    file: str
    parameters: Mapping[str, str]


def native(info: EngineInfo) -> Native:
    """How Triton's own backends open an engine.

    Raises:
        UsageError: none does.
    """
    if info.target in ("onnxruntime-cpu", "onnxruntime-cuda"):
        return Native("onnxruntime", "onnxruntime_onnx", info.entry, _onnxruntime(info.options))
    if info.target == "tensorrt":
        return Native("tensorrt", "tensorrt_plan", info.entry, {})
    raise UsageError(
        f"engine {info.name} is for no backend of Triton's own",
        expected="an engine of onnxruntime-cpu, onnxruntime-cuda or tensorrt",
        found=info.target,
        hint="--form python serves it through enginesmith",
    )


def engine_files(folder: Path) -> list[Path]:
    """What the backend reads: the engine, and the weights that lie beside it."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in OURS)


def _onnxruntime(options: Mapping[str, Any]) -> dict[str, str]:
    """Threads as the engine was measured with; the backend's other defaults are those of the targets."""
    found = {"intra_op_thread_count": options.get("threads"), "inter_op_thread_count": options.get("inter_threads")}
    parallel = {"execution_mode": "1"} if (options.get("inter_threads") or 1) > 1 else {}
    return {**{name: str(value) for name, value in found.items() if value}, **parallel}
