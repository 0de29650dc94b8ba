"""What a model, a bundle or an engine is made of, without running it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SourceError
from ..targets.base import EngineInfo
from .bundle import Bundle
from .signature import Signature
from .storage.files import size_bytes


def inspect(path: Path) -> dict[str, Any]:
    """Facts for people and pipelines: kind, inputs, outputs, sizes, operators, precisions.

    Raises:
        SourceError: the path is no model, bundle or engine.
    """
    if (path / "manifest.json").is_file():
        return _bundle(path)
    if (path / "engine.json").is_file():
        return _engine(path)
    if path.suffix == ".onnx":
        return _graph(path)
    return _model(path)


def _bundle(path: Path) -> dict[str, Any]:
    manifest = Bundle.open(path).manifest
    engines = [
        {
            "engine": engine["name"],
            "status": engine["status"],
            "valid": engine["validation"]["passed"] if engine["validation"] else None,
            "size_bytes": engine["size_bytes"],
            "build_s": engine["build_s"],
            "reason": engine["reason"],
        }
        for engine in manifest["engines"]
    ]
    return {
        "kind": "bundle",
        "created": manifest["created"],
        "passed": manifest["verdict"]["passed"],
        "best": manifest["verdict"]["best"],
        "source": manifest["source"],
        **_signature(Signature.from_json(manifest["signature"])),
        "engines": engines,
        "size_bytes": size_bytes(path),
    }


def _engine(path: Path) -> dict[str, Any]:
    info = EngineInfo.read(path)
    graph = _graph_facts(path / info.entry) if info.entry.endswith(".onnx") else {}
    return {
        "kind": "engine",
        "engine": info.name,
        "target": info.target,
        "precision": info.precision,
        **_signature(info.signature),
        "options": dict(info.options),
        "versions": dict(info.versions),
        "requires": dict(info.requires),
        "details": dict(info.details),
        **graph,
        "size_bytes": size_bytes(path),
    }


def _graph(path: Path) -> dict[str, Any]:
    return {"kind": "ONNX graph", **_graph_facts(path), "size_bytes": path.stat().st_size if path.exists() else 0}


def _graph_facts(path: Path) -> dict[str, Any]:
    from .graph import Graph

    graph = Graph.load(path)
    inputs = [_value(value) for value in graph.model.graph.inputs]
    outputs = [_value(value) for value in graph.model.graph.outputs]
    return {
        "opset": graph.opset,
        "graph inputs": inputs,
        "graph outputs": outputs,
        "operators": dict(graph.operators().most_common()),
        "precisions": graph.precisions(),
        "weight_bytes": graph.weight_bytes,
    }


def _value(value: Any) -> dict[str, str]:
    shape = "?" if value.shape is None else "x".join(str(dim) for dim in value.shape)
    return {"name": str(value.name), "shape": shape or "scalar", "dtype": str(value.dtype)}


def _model(path: Path) -> dict[str, Any]:
    """A TorchScript archive or exported program, as far as it tells without inputs."""
    from .sources import describe_source

    if not path.exists() and ".py:" not in str(path):
        raise SourceError(f"{str(path)!r} does not exist", expected="a model file, a bundle or an engine's folder")
    return dict(describe_source(str(path)))


def _signature(signature: Signature) -> Mapping[str, Any]:
    return {
        "inputs": [{"name": s.name, "shape": signature.describe(s), "dtype": s.dtype} for s in signature.inputs],
        "outputs": [{"name": s.name, "shape": signature.describe(s), "dtype": s.dtype} for s in signature.outputs],
    }
