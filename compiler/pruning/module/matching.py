"""Finds the tensors of a torch module in the graph that was captured from it.

Names decide where they survive, values where not. Tensors with equal values (biases of zero, copies of one layer) are
told apart by order: modules run in the order that their nodes have in the graph.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from ...graph import Graph
from ...graph.editing import is_constant
from ...quantization.layers import as_layer, constant, layers, operand
from .calls import Calls
from .parameters import LayerMatch, Match, Parameters, Span, arrays, bias_place, epsilon, factor
from .recurrent import GATES, RecurrentMatch, find

_CLOSE = 1e-4
"""How far a folded weight may be from what folding gives, as part of the largest: exporters fold in float32."""

_TINY = 1e-7

_PREFIX = "model."
"""What exporters put before the names of parameters: the wrapper's attribute (`sources.flat`)."""

_NORMALIZED = {"weight": 1, "bias": 2, "running_mean": 3, "running_var": 4}
"""Inputs of BatchNormalization."""

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def match(graph: Graph, module: torch.nn.Module, calls: Calls) -> Parameters:
    """Finds the tensors of a module's state_dict in a graph.

    Args:
        graph: flat, its constants in initializers, not pruned yet.
        module: the user's.
    """
    run = _Matching(graph, module, calls)
    for name in calls.order:
        run.module(name)
    for key in run.tensors:
        run.rest(key)
    return Parameters(tuple(run.singles), tuple(run.layers), tuple(run.recurrent), run.missing)


class _Matching:
    def __init__(self, graph: Graph, module: torch.nn.Module, calls: Calls) -> None:
        self.tensors = arrays(module)
        self.singles: list[Match] = []
        self.layers: list[LayerMatch] = []
        self.recurrent: list[RecurrentMatch] = []
        self.missing: dict[str, str] = {}
        self._calls = calls
        self._parts = dict(module.named_modules())
        self._nodes = [node for node in graph.model.graph if node.op_type in GATES]
        self._taken: set[tuple[ir.Node, int, Span | None]] = set()
        self._found: set[str] = set()
        self._norms = [key.removesuffix(".running_var") for key in self.tensors if key.endswith(".running_var")]
        self._folded: set[str] = set()
        self._products = [(layer.node, layer) for layer in layers(graph) if layer.node.op_type != "Conv"]
        self._uses: dict[tuple[int, ...], list[tuple[ir.Node, int]]] = {}
        for node in graph.model.graph:
            for index, value in enumerate(node.inputs):
                if is_constant(value) and value is not None and value.dtype == ir.DataType.FLOAT:
                    self._uses.setdefault(_sizes(constant(value).shape), []).append((node, index))

    def module(self, name: str) -> None:
        """Finds the tensors of a module that ran."""
        if name in self._folded:
            return
        taken = [one.node for one in self.recurrent]
        for one in find(name, self._parts[name], [n for n in self._nodes if n not in taken], self.tensors):
            self.recurrent.append(one)
            self._found.update(one.keys)
        self._layer(name)
        for kind in ("weight", "bias", "running_mean", "running_var"):
            key = f"{name}.{kind}"
            if key in self.tensors and key not in self._found and not self._single(key):
                self._looked_up(key)

    def rest(self, key: str) -> None:
        """Finds a tensor that is none of those of a module that ran."""
        name = key.rpartition(".")[0]
        if key in self._found or name in self._folded:
            return
        if key == f"{name}.weight" and self._layer(name):
            return
        if not self._single(key) and self.tensors[key].size > 1:
            self.missing[key] = "no constant of the graph has its values"

    def _single(self, key: str) -> bool:
        """Finds a tensor as it is; one of a single position is not looked for."""
        tensor = self.tensors[key]
        found = []
        for order, (node, index) in enumerate(self._uses.get(_sizes(tensor.shape), ()) if tensor.size > 1 else ()):
            axes = _axes(tensor, constant(operand(node, index)))
            if axes is not None and (node, index, None) not in self._taken and self._may_hold(key, node, index):
                found.append((not self._named(node, index, key), order, Match(key, node, index, axes)))
        if not found:
            return False
        best = min(found, key=lambda one: one[:2])[2]
        self.singles.append(best)
        self._take(key, best.node, best.index)
        return True

    def _looked_up(self, key: str) -> None:
        """Finds rows of an embedding that were looked up at export, because the indices are constants."""
        tensor = self.tensors[key]
        if not isinstance(self._parts.get(key.rpartition(".")[0]), torch.nn.Embedding):
            return
        for node, index in (use for uses in self._uses.values() for use in uses):
            array = constant(operand(node, index))
            if array.ndim < 2 or array.shape[-1] != tensor.shape[1] or (node, index, None) in self._taken:
                continue
            held = array.reshape(-1, tensor.shape[1])
            for start in np.flatnonzero((tensor[: len(tensor) - len(held) + 1] == held[0]).all(axis=1)):
                rows = int(start), int(start) + len(held)
                if len(held) == max(array.shape[:-1]) and np.array_equal(tensor[slice(*rows)], held):
                    axes = (array.shape.index(len(held)) if len(held) > 1 else None, array.ndim - 1)
                    self.singles.append(Match(key, node, index, axes, rows=rows))
                    self._take(key, node, index)
                    return

    def _may_hold(self, key: str, node: ir.Node, index: int) -> bool:
        """Whether an input is one that a tensor of such a module can be."""
        name, _, kind = key.rpartition(".")
        part = self._parts.get(name)
        if isinstance(part, torch.nn.Embedding):
            return node.op_type == "Gather"
        if name in self._norms or node.op_type == "BatchNormalization":
            return node.op_type == "BatchNormalization" and index == _NORMALIZED.get(kind)
        if isinstance(part, (torch.nn.Linear, torch.nn.modules.conv._ConvNd)):
            return node.op_type in ("Add", *_LAYERS)
        return not node.op_type.endswith("LayerNormalization") or index == _NORMALIZED.get(kind)

    def _layer(self, name: str) -> bool:
        """Finds a weight that a node multiplies by, its bias, and the BatchNorm behind it."""
        weight = self.tensors.get(f"{name}.weight")
        if weight is None or weight.ndim < 2 or isinstance(self._parts.get(name), torch.nn.Embedding):
            return False
        found = []
        for order, (node, index) in enumerate(self._uses.get(_sizes(weight.shape), ())):
            if index != 1 or node.op_type not in _LAYERS or (node, index, None) in self._taken:
                continue
            if (layer := self._at(name, weight, node)) is not None:
                found.append((not self._named(node, 1, f"{name}.weight"), layer.bias is None, order, layer))
        best = min(found, key=lambda one: one[:3])[3] if found else self._side_by_side(name, weight)
        if best is None:
            return False
        self.layers.append(best)
        self._take(f"{name}.weight", best.weight.node, 1, best.weight.span)
        if best.bias is not None:
            self._take(f"{name}.bias", *best.bias, best.weight.span if best.bias[0] is best.weight.node else None)
        elif not self.tensors.get(f"{name}.bias", weight).any():
            self._found.add(f"{name}.bias")  # adding zeros is left out
        if best.norm:
            self._folded.add(best.norm)
            self._found.add(f"{name}.bias")
        return True

    def _at(self, name: str, weight: np.ndarray, node: ir.Node) -> LayerMatch | None:
        array = constant(operand(node, 1))
        layer = as_layer(node)
        output = 1 if node.op_type == "ConvTranspose" else layer.output_axis if layer is not None else 0
        straight = tuple(range(weight.ndim))
        orders = [straight] if weight.ndim > 2 else [straight, (1, 0)]
        if weight.ndim == 2 and isinstance(self._parts.get(name), torch.nn.Linear):  # squares fit both ways
            orders = [(1, 0) if output else straight]
        for axes in orders:
            ours = weight.transpose(np.argsort(axes))
            if ours.shape != array.shape:
                continue
            found = Match(f"{name}.weight", node, 1, axes)
            equal = np.array_equal(ours, array)
            if norm := self._norm(name, ours, array, node, output, equal=equal):
                return LayerMatch(name, found, axes.index(output), bias_place(node), norm)
            if equal:
                return LayerMatch(name, found, axes.index(output), self._bias(name, node), "")
        return None

    def _side_by_side(self, name: str, weight: np.ndarray) -> LayerMatch | None:
        """A weight of a Linear that is a part of the constant of a MatMul or Gemm, over outputs."""
        if not isinstance(self._parts.get(name), torch.nn.Linear):
            return None
        for node, layer in self._products:
            array = layer.load()
            if array.shape[1] != weight.shape[1]:
                continue
            for start in np.flatnonzero((array[: 1 - len(weight) or None] == weight[0]).all(axis=1)):
                span = layer.output_axis, int(start), int(start) + len(weight)
                if (node, 1, span) in self._taken or not np.array_equal(array[span[1] : span[2]], weight):
                    continue
                found = Match(f"{name}.weight", node, 1, (1, 0) if layer.transposed else (0, 1), span)
                return LayerMatch(name, found, 0, self._bias(name, node, span), "")
        return None

    def _bias(self, name: str, node: ir.Node, span: Span | None = None) -> tuple[ir.Node, int] | None:
        bias, place = self.tensors.get(f"{name}.bias"), bias_place(node, span)
        if bias is None or place is None:
            return None
        added = constant(operand(*place)).reshape(-1)
        own = added[slice(*span[1:])] if span is not None and place[0] is node else added
        return place if np.array_equal(own, bias.reshape(-1)) else None

    def _norm(
        self, name: str, weight: np.ndarray, array: np.ndarray, node: ir.Node, output: int, *, equal: bool
    ) -> str:
        """The BatchNorm that makes a weight what it is in the graph; empty where none does."""
        after = self._calls.next.get(name)
        known = [after] if after in self._norms else [norm for norm in self._norms if norm not in self._folded]
        kept = any(use.node.op_type == "BatchNormalization" for use in node.outputs[0].uses())
        if kept or (equal and after not in self._norms):
            return ""
        for norm in known:
            scale = factor(self.tensors, norm, epsilon(self._parts.get(norm)))
            if len(scale) != array.shape[output]:
                continue
            shaped = scale.reshape([-1 if axis == output else 1 for axis in range(array.ndim)])
            if _close(weight * shaped, array) and _close(self._shift(name, norm, scale), _added(node, len(scale))):
                return norm
        return ""

    def _shift(self, name: str, norm: str, scale: np.ndarray) -> np.ndarray:
        mean, none = self.tensors[f"{norm}.running_mean"], np.zeros(len(scale))
        bias, beta = self.tensors.get(f"{name}.bias", none), self.tensors.get(f"{norm}.bias", none)
        return np.asarray((bias - mean) * scale + beta)

    def _named(self, node: ir.Node, index: int, key: str) -> bool:
        return operand(node, index).name in (key, f"{_PREFIX}{key}")

    def _take(self, key: str, node: ir.Node, index: int, span: Span | None = None) -> None:
        self._found.add(key)
        self._taken.add((node, index, span))


def _sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))


def _axes(tensor: np.ndarray, array: np.ndarray) -> tuple[int | None, ...] | None:
    """How a constant holds a tensor as it is; None where it does not."""
    if tensor.shape == array.shape and np.array_equal(tensor, array):
        return tuple(range(tensor.ndim))
    if tensor.ndim == 2 and tensor.shape == array.shape[::-1] and np.array_equal(tensor.T, array):
        return (1, 0)
    if np.array_equal(tensor.squeeze(), array.squeeze()):
        wide = iter(axis for axis, size in enumerate(array.shape) if size > 1)
        return tuple(next(wide) if size > 1 else None for size in tensor.shape)
    return None


def _added(node: ir.Node, size: int) -> np.ndarray:
    place = bias_place(node)
    return np.zeros(size) if place is None else constant(operand(*place)).reshape(-1)


def _close(wanted: np.ndarray, found: np.ndarray) -> bool:
    if wanted.shape != found.shape:
        return False
    return bool(np.abs(wanted - found).max() <= _CLOSE * np.abs(wanted).max() + _TINY)
