"""From a model to a graph that reproduces it: the dynamo exporter first, then the TorchScript exporter.

A graph counts only if ONNX Runtime, without optimising it, gives what the reference gives, at two sizes of each dynamic
axis. An exporter that baked the sizes of its example in fails here, and its reason is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...errors import CaptureError, EnginesmithError, RecipeError, SourceError
from ..data import Samples, other_sizes, random_batch, resized
from ..difference import worst_relative_l2
from ..graph import Graph
from ..manifest import Attempt, CaptureRecord
from ..sources import Model
from ..sources.guard import first_line, foreign
from ..sources.onnx_file import open_session, run_session
from ..storage.memory import release
from .exporters import EXPORTERS, MAX_OPSET, Exporter, example_sizes, root_reason
from .kept import export_key, keep, take

if TYPE_CHECKING:
    from ..signature import Signature
    from ..storage.cache import Cache

RELATIVE_L2 = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
"""How far a graph may be from the reference, by the coarsest dtype of the model: sums are rounded in another order."""


@dataclasses.dataclass(frozen=True)
class Captured:
    """The graph, or None where no exporter succeeded; the record says why.

    Attributes:
        path: its file in the given folder, from which its weights are mapped.
    """

    graph: Graph | None
    record: CaptureRecord
    path: Path | None = None


def capture(
    model: Model,
    *,
    exporter: Literal["auto", "dynamo", "torchscript"] = "auto",
    opset: int | None = None,
    opset_range: tuple[int, int],
    samples: Samples | None,
    seed: int,
    directory: Path,
    log: Callable[[str], None],
    required: bool = False,
    cache: Cache | None = None,
) -> Captured:
    """Captures and checks the graph. `opset_range` is what all targets that take a graph accept.

    `directory` must outlive the graph, whose weights are mapped from it. An export that was kept in `cache` takes the
    place of a new one where it passes the checks.

    Raises:
        CaptureError: an ONNX source that does not run at the declared sizes; any failure where `required`.
        RecipeError: an opset that the targets do not accept.
    """
    if opset is not None and not opset_range[0] <= opset <= opset_range[1]:
        raise RecipeError(
            f"opset {opset} is not accepted by every target",
            expected=f"{opset_range[0]} to {opset_range[1]}",
            hint="leave it out, or drop the target that does not take it",
        )
    checks = _check_inputs(model.signature, samples, seed)
    if model.onnx_path is not None:
        return _from_file(model, model.onnx_path, checks, directory, log)
    target = opset or min(opset_range[1], MAX_OPSET)
    chosen: tuple[Exporter, ...] = ("dynamo", "torchscript") if exporter == "auto" else (exporter,)
    attempts: list[Attempt] = []
    for name in chosen:
        log(f"capture: trying the {name} exporter")
        start = time.perf_counter()
        path = directory / name / "captured.onnx"
        path.parent.mkdir(exist_ok=True)
        try:
            graph, differences = _attempt(model, name, target, opset_range, checks, path, log, cache)
        except EnginesmithError as error:
            reason = _short(error)
            log(f"capture: {name} failed: {reason}")
            attempts.append(_record(name, start, reason))
            continue
        attempts.append(_record(name, start, ""))
        record = CaptureRecord(exporter=name, opset=graph.opset, attempts=attempts, checks=differences)
        return Captured(graph, record, path)
    if required:
        raise CaptureError(
            "no exporter captured the model as a graph that reproduces it",
            found="; ".join(f"{a['exporter']}: {a['reason']}" for a in attempts),
            hint="change the model where the reason points, or use targets that take the module itself",
        )
    return Captured(None, CaptureRecord(exporter=None, opset=None, attempts=attempts, checks=[]))


@dataclasses.dataclass(frozen=True)
class _Check:
    """Inputs at one point of the dynamic axes."""

    sizes: dict[str, int]
    inputs: dict[str, np.ndarray]


def _check_inputs(signature: Signature, samples: Samples | None, seed: int) -> list[_Check]:
    sample = next(iter(samples), None) if samples is not None else None
    generator = np.random.default_rng(seed)
    return [
        _Check(sizes, resized(signature, sample, sizes) if sample else random_batch(signature, generator, sizes))
        for sizes in [signature.sizes(), *other_sizes(signature)]
    ]


def _attempt(
    model: Model,
    exporter: Exporter,
    opset: int,
    opset_range: tuple[int, int],
    checks: Sequence[_Check],
    path: Path,
    log: Callable[[str], None],
    cache: Cache | None,
) -> tuple[Graph, list[dict[str, Any]]]:
    if model.stateful:
        raise CaptureError("the model carries state from one call to the next, which a graph cannot")
    if exporter == "dynamo" and model.kind == "torchscript":
        raise CaptureError("it takes no TorchScript")
    key = export_key(model, exporter, opset)
    if cache is not None and take(cache, key, path.parent):
        try:
            found = _checked(model, path, opset_range, checks)
        except EnginesmithError as error:
            log(f"capture: the export in the cache is of no use any more: {_short(error)}")
            shutil.rmtree(path.parent)
            path.parent.mkdir()
        else:
            log("capture: the export was taken from the cache")
            return found
    example = resized(model.signature, checks[0].inputs, example_sizes(model.signature))
    with foreign(lambda error: CaptureError(root_reason(error))):
        EXPORTERS[exporter](model, example, opset, path, log)
    release()
    found = _checked(model, path, opset_range, checks)
    if cache is not None:
        keep(cache, key, path.parent, exporter)
    return found


def _checked(
    model: Model, path: Path, opset_range: tuple[int, int], checks: Sequence[_Check]
) -> tuple[Graph, list[dict[str, Any]]]:
    graph = Graph.load(path)
    if not opset_range[0] <= graph.opset <= opset_range[1]:
        raise CaptureError(f"it gives opset {graph.opset}, where the targets take {opset_range[0]} to {opset_range[1]}")
    graph.verify()
    if dropped := [spec.name for spec in model.signature.inputs if spec.name not in graph.input_names]:
        raise CaptureError(f"it dropped input {dropped[0]!r}, which the model does not use")
    return graph, _compare(model, path, checks)


def _compare(model: Model, path: Path, checks: Sequence[_Check]) -> list[dict[str, Any]]:
    """Relative L2 between graph and reference at each point.

    Raises:
        CaptureError: the graph fails at one, or differs there.
    """
    limit = max(RELATIVE_L2.get(dtype, 0.0) for dtype in _dtypes(model))
    references = []
    for check in checks:
        model.reference.reset()
        references.append(model.reference.run(check.inputs))
    release()  # what torch ran in, before the session takes its own
    session = open_session(path)
    results: list[dict[str, Any]] = []
    for check, expected in zip(checks, references, strict=True):
        at = f"at {_text(check.sizes)}" if check.sizes else "on the check's inputs"
        with foreign(functools.partial(_failed, at)):
            found = run_session(session, check.inputs)
        if set(found) != set(expected):
            raise CaptureError(f"the graph gives outputs {', '.join(found)} instead of {', '.join(expected)}")
        shapes = {n: (found[n].shape, a.shape) for n, a in expected.items() if found[n].shape != a.shape}
        for name, (got, want) in shapes.items():
            raise CaptureError(
                f"output {name!r} of the graph has shape {got} instead of {want} {at}: a size is baked in"
            )
        if not (difference := worst_relative_l2(found, expected)) <= limit:
            raise CaptureError(
                f"the graph differs from the reference {at}: relative L2 {difference:.2g}, above {limit:g}"
            )
        results.append({"sizes": check.sizes, "relative_l2": difference})
    return results


def _failed(at: str, error: BaseException) -> CaptureError:
    return CaptureError(f"the graph fails {at}: {first_line(error)}")


def _from_file(
    model: Model, path: Path, checks: Sequence[_Check], directory: Path, log: Callable[[str], None]
) -> Captured:
    """The graph of an ONNX source, checked as it will be saved."""
    start = time.perf_counter()
    graph = Graph.load(path)
    graph.verify()
    log(f"capture: {path.name} is a graph already")
    copy = directory / "captured.onnx"
    graph.save(copy)
    try:
        results = _compare(model, copy, checks)
    except (CaptureError, SourceError) as error:
        raise CaptureError(
            f"{path.name} does not run at the declared sizes: {error.message}",
            found=error.found,
            hint="check --input and --dynamic, or give --data with values that the model accepts",
        ) from error
    attempt = _record("onnx", start, "")
    return Captured(graph, CaptureRecord(exporter="onnx", opset=graph.opset, attempts=[attempt], checks=results), copy)


def _dtypes(model: Model) -> set[str]:
    found = {spec.dtype for spec in (*model.signature.inputs, *model.signature.outputs)}
    if model.module is not None:
        found |= {str(p.dtype).removeprefix("torch.") for p in model.module.parameters()}
    return (found & set(RELATIVE_L2)) | {"float32"}


def _record(exporter: str, start: float, reason: str) -> Attempt:
    return Attempt(exporter=exporter, succeeded=not reason, seconds=time.perf_counter() - start, reason=reason)


def _short(error: EnginesmithError) -> str:
    found = f" (found {error.found})" if error.found is not None else ""
    return f"{error.message}{found}"[:400]


def _text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())
