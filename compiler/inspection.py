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
    built = [engine["name"] for engine in manifest["engines"] if engine["status"] in ("ready", "built")]
    graphs = {name: facts for name in built if (facts := _engine_graph(path / "engines" / name))}
    return {
        "kind": "bundle",
        "created": manifest["created"],
        "passed": manifest["verdict"]["passed"],
        "best": manifest["verdict"]["best"],
        "source": manifest["source"],
        **_signature(Signature.from_json(manifest["signature"])),
        "engines": engines,
        "precisions": {name: facts["precisions"] for name, facts in graphs.items()},
        "operators": {name: facts["operators"] for name, facts in graphs.items()},
        "size_bytes": size_bytes(path),
    }


def _engine(path: Path) -> dict[str, Any]:
    info = EngineInfo.read(path)
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
        **_engine_graph(path),
        "size_bytes": size_bytes(path),
    }


def _engine_graph(path: Path) -> dict[str, Any]:
    """Facts of an engine that is an ONNX graph; none of one in a format of its runtime."""
    entry = path / EngineInfo.read(path).entry
    if entry.suffix != ".onnx":
        return {}
    from .graph import Graph
    from .sources.onnx_file import graph_facts

    return graph_facts(Graph.load(entry))


def _model(path: Path) -> dict[str, Any]:
    """A model file or factory, as far as it tells without inputs."""
    from .sources import describe_source
    from .sources.detect import detect

    if not path.exists() and ".py:" not in str(path):
        raise SourceError(f"{str(path)!r} does not exist", expected="a model file, a bundle or an engine's folder")
    if path.is_file() and detect(path) == "onnx":
        from .sources.onnx_file import describe  # without torch

        return describe(path)
    return dict(describe_source(str(path)))


def _signature(signature: Signature) -> Mapping[str, Any]:
    return {
        "inputs": [{"name": s.name, "shape": signature.describe(s), "dtype": s.dtype} for s in signature.inputs],
        "outputs": [{"name": s.name, "shape": signature.describe(s), "dtype": s.dtype} for s in signature.outputs],
    }
