"""Simplifies with onnxsim: constants folded, no-ops removed, BatchNormalization folded into Conv, and the like.

The result is taken only if it still computes the same: outputs within `TOLERANCE` of the graph before, on the first
sample of data or on random inputs at two sizes of the dynamic axes. Refused, with the graph left as it was: a graph
above protobuf's 2 GB, one that onnxsim fails on or that keeps changing, one whose inputs, outputs or results would
change, one whose weights would grow, and one that cannot be run to tell.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import onnx
import onnx_ir as ir

from ..compiler.difference import relative_l2
from ..compiler.graph import Graph
from ..compiler.graph.equality import allowed, inputs_at_two_sizes
from ..compiler.graph.probe import run
from ..errors import GraphError, TargetUnavailableError
from .base import Context, Pass, PassResult, Refusal

TOLERANCE = 1e-5
"""Relative L2 by which an output may differ, a float16 one by two of its roundings: folding only reorders them."""

_ROUNDS = 5
_GROWTH_BYTES = 1 << 20
_PROTO_LIMIT = (1 << 31) - 1
_HELD_OUT_BYTES = 1 << 16
_WEIGHTED = frozenset(("Conv", "ConvTranspose", "Gather", "Gemm", "MatMul"))
_SCALES = frozenset(("BatchNormalization", "Div", "Mul"))
_SKIPPED = "fuse_matmul_add_bias_into_gemm_batched"
"""Turns MatMul + Add of three dimensions into Reshape, Gemm, Reshape: more nodes, and none that runtimes fuse."""


class _RefusedError(Exception):
    """Why the graph stays as it was."""


@dataclasses.dataclass(frozen=True)
class Simplify(Pass):
    """Replaces the graph by onnxsim's, checked numerically; keeps it with a reason where that fails."""

    name: ClassVar[str] = "simplify"

    def apply(self, graph: Graph, context: Context) -> PassResult:
        """Simplifies to a fixed point."""
        try:
            simplified = _simplify(graph)
            if simplified is None:
                return PassResult(modified=False)
            _check_weights(graph, simplified)
            _check_results(graph, simplified, context)
        except _RefusedError as reason:
            return PassResult(modified=False, refusals=(Refusal(str(reason)),))
        changes = {"nodes before": len(list(graph.nodes())), "nodes after": len(list(simplified.nodes()))}
        graph.model = simplified.model
        return PassResult(modified=True, changes=changes)


def _simplify(graph: Graph) -> Graph | None:
    """The graph that onnxsim changes no more; None where that is the graph itself."""
    current, identity = graph, graph.fingerprint()
    for _ in range(_ROUNDS):
        simplified = _once(current)
        _restore_interface(graph, simplified)
        for scope in simplified.graphs():
            _sort_constants(scope)
        if simplified.fingerprint() == identity:
            return None if current is graph else current
        current, identity = simplified, simplified.fingerprint()
    raise _RefusedError(f"onnxsim still changes the graph after {_ROUNDS} rounds")


def _sort_constants(graph: ir.Graph) -> None:
    """Puts Constant nodes first, by name: onnxsim gives them another order each time, which is no change."""
    constants = [node for node in graph if node.op_identifier() == ("", "Constant", "")]
    graph.remove(constants)
    constants.sort(key=lambda node: node.outputs[0].name or "")
    if len(graph):
        graph.insert_before(graph[0], constants)
    else:
        graph.extend(constants)


def _once(graph: Graph) -> Graph:
    import onnxsim

    if graph.weight_bytes > _PROTO_LIMIT:
        raise _RefusedError(
            f"onnxsim takes no model above 2 GB; this one has {graph.weight_bytes / 1e9:.1f} GB of weights"
        )
    weights = [value.const_value for scope in graph.graphs() for value in scope.initializers.values()]
    largest = max((weight.nbytes for weight in weights if weight is not None), default=0)
    try:
        # By way of files: a model in memory is copied six times, one in a file twice.
        with tempfile.TemporaryDirectory(prefix="enginesmith-") as folder:
            source, target = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
            given = graph.clone()
            held = _hold_out(given.model.graph)
            given.save(source)
            onnxsim.simplify(
                str(source),
                output_path=str(target),
                include_subgraph=True,
                skipped_optimizers=[_SKIPPED],
                # Nothing is folded into a tensor larger than the model's own: that is a computation saved as data.
                tensor_size_threshold=f"{max(largest, _GROWTH_BYTES)}B",
                mutable_initializer=any(value.is_initializer() for value in graph.model.graph.inputs),
            )
            simplified = Graph.load(target)
            simplified.detach()
        _put_back(simplified.model.graph, held)
        simplified.verify()
    except GraphError as error:
        raise _RefusedError(str(error)) from error
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        raise _RefusedError(f"onnxsim failed: {error}") from error
    return simplified


def _hold_out(graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
    """Makes inputs of the large weights that onnxsim could only copy: operands of nodes that compute on an input."""
    live = set(graph.inputs)
    for node in graph:
        if node.op_type not in ("Shape", "Size") and not live.isdisjoint(node.inputs):
            live.update(node.outputs)
    held: dict[str, ir.TensorProtocol] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _HELD_OUT_BYTES or value in graph.inputs or value in graph.outputs:
            continue
        if all(_only_reads(node, live) for node, _ in value.uses()):
            held[name] = tensor
            graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)
    return held


def _only_reads(node: ir.Node, live: set[ir.Value]) -> bool:
    """Whether the node stays as it is whatever its weights hold, with no scale beside it to fold into them."""
    around = [value.producer() for value in node.inputs if value is not None]
    around += [user for value in node.outputs for user, _ in value.uses()]
    scaled = any(other is not None and other.op_type in _SCALES for other in around)
    return node.op_type in _WEIGHTED and not node.domain and not scaled and not live.isdisjoint(node.inputs)


def _put_back(graph: ir.Graph, held: Mapping[str, ir.TensorProtocol]) -> None:
    for value in list(graph.inputs):
        if (tensor := held.get(value.name or "")) is not None:
            graph.inputs.remove(value)
            value.const_value = tensor
            if value.uses():
                graph.register_initializer(value)


def _restore_interface(before: Graph, after: Graph) -> None:
    """Gives inputs and outputs the shapes that they had, dynamic axes by name; onnxsim may replace these."""
    for kind in ("inputs", "outputs"):
        old: list[ir.Value] = list(getattr(before.model.graph, kind))
        new: list[ir.Value] = list(getattr(after.model.graph, kind))
        if [(value.name, value.type) for value in old] != [(value.name, value.type) for value in new]:
            raise _RefusedError(f"onnxsim changed the {kind} to {', '.join(str(value.name) for value in new)}")
        for value, restored in zip(old, new, strict=True):
            restored.shape = value.shape.copy() if value.shape is not None else None


def _check_weights(before: Graph, after: Graph) -> None:
    if after.weight_bytes > before.weight_bytes * 1.1 + _GROWTH_BYTES:
        raise _RefusedError(f"the weights would grow from {before.weight_bytes} to {after.weight_bytes} bytes")


def _check_results(before: Graph, after: Graph, context: Context) -> None:
    for inputs in inputs_at_two_sizes(context):
        try:
            expected, found = run(before, inputs), run(after, inputs)
        except (GraphError, TargetUnavailableError) as error:
            raise _RefusedError(f"the result cannot be checked: {error}") from error
        for name, value in expected.items():
            difference = relative_l2(found[name], value)
            limit = allowed(value, TOLERANCE)
            if not difference <= limit:
                raise _RefusedError(
                    f"onnxsim changes output {name!r}: relative L2 {difference:.2e}, allowed {limit:.0e}"
                )
