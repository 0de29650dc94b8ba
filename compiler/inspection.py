"""What a model, a bundle or an engine is made of, without running it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SourceError
from ..targets.base import EngineInfo
from .bundle import Bundle
from .signature import Signature
from .storage.files import size_bytes

if TYPE_CHECKING:
    from .data import Data
    from .graph import Graph
    from .recipe import Recipe
    from .sources import Model


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


def inspect_groups(source: str, fields: Mapping[str, Any], *, everything: bool = False) -> list[dict[str, Any]]:
    """The dimension groups of a model, as `compiler.dimensions.dump` tells them.

    Args:
        source: an ONNX file, an engine's folder, a bundle, whose best graph is taken, or anything that can be captured.
        fields: of the recipe, for a source that must be captured.

    Raises:
        SourceError: there is no graph: an engine in a format of its runtime.
        CaptureError: no exporter captures the model.
        RecipeError: `fields` do not fit.
    """
    from .dimensions.dump import dump
    from .graph import Graph

    path = Path(source)
    if (path / "manifest.json").is_file():
        path = _best_graph(path)
    if (path / "engine.json").is_file():
        return dump(Graph.load(_graph_file(path)), everything=everything)
    if path.is_file() and _is_onnx(path):
        graph = Graph.load(path)
        graph.verify()
        return dump(graph, everything=everything)
    with tempfile.TemporaryDirectory(prefix="enginesmith-") as folder:
        return dump(_captured(source, fields, Path(folder)), everything=everything)


def _best_graph(bundle: Path) -> Path:
    """The folder of the best engine that is a graph."""
    manifest = Bundle.open(bundle).manifest
    names = [engine["name"] for engine in manifest["engines"] if engine["status"] in ("ready", "built")]
    for name in sorted(names, key=lambda name: name != manifest["verdict"]["best"]):
        if EngineInfo.read(bundle / "engines" / name).entry.endswith(".onnx"):
            return bundle / "engines" / name
    raise SourceError(f"no engine of {str(bundle)!r} is an ONNX graph", hint="inspect the model that it was made from")


def _graph_file(engine: Path) -> Path:
    entry = engine / EngineInfo.read(engine).entry
    if entry.suffix != ".onnx":
        raise SourceError(
            f"engine {str(engine)!r} is no ONNX graph", found=entry.name, hint="inspect the model that it was made from"
        )
    return entry


def _is_onnx(path: Path) -> bool:
    from .sources.detect import detect

    return detect(path) == "onnx"


def _captured(source: str, fields: Mapping[str, Any], folder: Path) -> Graph:
    """The graph of the model that these fields of a recipe describe."""
    from .data import open_data
    from .recipe import make_recipe
    from .trial import load

    recipe = make_recipe({**fields, "model": source})
    model = load(recipe)
    data = open_data(recipe.data, model.signature, seed=recipe.seed)
    return graph_of(recipe, model, data, folder)


def graph_of(recipe: Recipe, model: Model, data: Data, folder: Path, opsets: tuple[int, int] = (9, 20)) -> Graph:
    """The captured graph of a model, after the passes that a compile begins with.

    Args:
        folder: existing folder for what exporters write.
        opsets: lowest and highest to capture in.
    """
    from ..passes import parse_pass
    from ..passes.base import Context
    from .capture import capture
    from .storage.cache import Cache

    captured = capture(
        model,
        exporter=recipe.exporter,
        opset=recipe.opset,
        opset_range=opsets,
        samples=data,
        seed=recipe.seed,
        directory=folder,
        log=lambda line: None,
        required=True,
        cache=Cache(),
    )
    assert captured.graph is not None
    for text in recipe.passes:
        if text != "none":
            parse_pass(text)(captured.graph, Context(model.signature))
    return captured.graph


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
    details = {engine["name"]: engine["details"] for engine in manifest["engines"]}
    caches = {name: row for name, found in details.items() if (row := found.get("cache_row_bytes"))}
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
        "parameters": {name: facts["parameters"] for name, facts in graphs.items()},
        "macs": {name: facts["macs"] for name, facts in graphs.items()},
        "aligned_share": {name: facts["aligned_share"] for name, facts in graphs.items()},
        **({"cache_row_bytes": caches} if caches else {}),
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

    return graph_facts(Graph.load(entry), EngineInfo.read(path).signature.sizes())


def _model(path: Path) -> dict[str, Any]:
    """A model file or factory, as far as it tells without inputs."""
    from .sources import describe_source

    if not path.exists() and ".py:" not in str(path):
        raise SourceError(f"{str(path)!r} does not exist", expected="a model file, a bundle or an engine's folder")
    if path.is_file() and _is_onnx(path):
        from .sources.onnx_file import describe  # without torch

        return describe(path)
    return dict(describe_source(str(path)))


def _signature(signature: Signature) -> Mapping[str, Any]:
    return {
        "inputs": [{"name": s.name, "shape": signature.describe(s), "dtype": s.dtype} for s in signature.inputs],
        "outputs": [{"name": s.name, "shape": signature.describe(s), "dtype": s.dtype} for s in signature.outputs],
    }
