"""The graphs of a bundle: that of an engine, and that of the model itself, captured again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import EnginesmithError, SourceError, UsageError
from ...passes import parse_pass
from ...passes.base import Context
from ...targets import get_target
from ...targets.base import EngineInfo
from ..bundle import Bundle
from ..data import Data, open_data
from ..graph import Graph
from ..graph.probe import Session
from ..manifest import EngineRecord
from ..recipe import Recipe
from ..signature import Signature
from ..storage.cache import Cache
from ..trial import calibration_of, load, load_budget
from ..validation.reference import ReferenceOutputs
from .distance import distance, worst
from .parts import prepared

if TYPE_CHECKING:
    from ..capture import Captured

_HINT = "compare two engines instead: --against and the name of one"
CHECKED = 4
CHANGED = 1e-2
"""A captured graph farther than this (relative L2) from the bundle's record is one of another model."""


def graph_of_engine(bundle: Bundle, record: EngineRecord, captured: Graph | None, recipe: Recipe) -> Graph:
    """What an engine was built from: the graph in its folder, or the captured one with the recorded passes run again.

    Args:
        captured: only needed where the engine's format holds no graph.

    Raises:
        UsageError: the engine was built from the torch module.
        SourceError: a graph must be rebuilt and there is none captured.
    """
    folder = bundle.path / "engines" / record["name"]
    info = EngineInfo.read(folder)
    if get_target(info.target, info.options).capabilities.consumes != "graph":
        raise UsageError(
            f"engine {record['name']!r} was built from the torch module, so it has no nodes that could be named",
            expected="an engine that is built from a graph",
            hint="debug an engine of another target in the same precision",
        )
    if (folder / info.entry).suffix == ".onnx":
        return prepared(Graph.load(folder / info.entry))
    if captured is None:
        raise SourceError(
            f"engine {record['name']!r} holds no graph, and the model to capture it from cannot be loaded",
            hint="compile the model again",
        )
    graph = captured.clone()
    signature = Signature.from_json(bundle.manifest["signature"])
    data = open_data(recipe.data, signature, seed=recipe.seed)
    context = Context(signature, data, calibration_of(recipe, signature, data, Cache()), load_budget(recipe))
    for step in bundle.manifest["passes"]:
        if record["name"] in step["engines"]:
            parse_pass(step["text"])(graph, context)
    return prepared(graph)


def captured_graph(bundle: Bundle, recipe: Recipe, scratch: Path) -> Graph:
    """The graph of the model, captured as it was for this bundle. Its weights are mapped from `scratch`.

    Raises:
        SourceError: the model cannot be loaded or captured any more, or is another than it was.
    """
    if recipe.model.startswith("<") or not recipe.model:
        raise SourceError(
            f"the model of {str(bundle.path)!r} was given in Python, and cannot be loaded from its recipe", hint=_HINT
        )
    try:
        captured = _capture(bundle, recipe, scratch)
    except EnginesmithError as error:
        raise SourceError(
            f"the model of {str(bundle.path)!r} cannot be loaded any more: {error.message}",
            expected=error.expected,
            found=error.found,
            hint=_HINT,
        ) from error
    if captured.graph is None:
        reasons = "; ".join(f"{a['exporter']}: {a['reason']}" for a in captured.record["attempts"])
        raise SourceError(f"the model of {str(bundle.path)!r} makes no graph", found=reasons, hint=_HINT)
    graph = prepared(captured.graph)
    _check_unchanged(bundle, graph)
    return graph


def _capture(bundle: Bundle, recipe: Recipe, scratch: Path) -> Captured:
    from ..capture import capture

    model = load(recipe)
    data: Data = open_data(recipe.data, model.signature, seed=recipe.seed)
    record = bundle.manifest["capture"]
    opset = record["opset"] or 0
    return capture(
        model,
        exporter="torchscript" if record["exporter"] == "torchscript" else "auto",
        opset=opset or None,
        opset_range=(opset or 9, opset or 20),
        samples=data,
        seed=recipe.seed,
        directory=scratch,
        log=lambda line: None,
        cache=Cache(),
    )


def _check_unchanged(bundle: Bundle, graph: Graph) -> None:
    signature = Signature.from_json(bundle.manifest["signature"])
    session = Session(graph)
    for sample in ReferenceOutputs(bundle.path / "reference", signature, max_samples=CHECKED):
        found = dict(zip(graph.output_names, session(sample.inputs), strict=True))
        floats = {name: array for name, array in sample.outputs.items() if array.dtype.kind == "f"}
        same = all(name in found and found[name].shape == array.shape for name, array in floats.items())
        difference = worst([distance(array, found[name]) for name, array in floats.items()]) if same else math.inf
        if not difference <= CHANGED:
            raise SourceError(
                f"the model of {str(bundle.path)!r} is another than it was when the bundle was made",
                expected="the outputs in reference/outputs.npz",
                found=f"a relative L2 of {difference:.2g} from them",
                hint=_HINT,
            )
