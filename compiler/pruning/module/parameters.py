"""Which constants of a graph hold which tensors of the torch module that it was captured from.

Exporters and simplifiers rename constants, transpose the weights of Linear layers, and fold a BatchNorm into the layer
before it:

    constant = tensor                              equal, or equal once transposed, or but for axes of one position
    constant = [tensor, tensor, tensor]            weights that multiply one input, side by side: queries, keys, values
    W = f P, b = f (p - mean) + beta               folded, with f = gamma / sqrt(var + eps) for each output channel
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import onnx_ir as ir
import torch

from ...graph.editing import is_constant
from .recurrent import RecurrentMatch

Span = tuple[int, int, int]
"""An axis with start and stop."""


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """A tensor and the constant that holds it.

    Attributes:
        key: name in the state_dict.
        node: reads the constant.
        index: of the input.
        axes: for each axis of the tensor, that of the constant; None for one of a single position that it lacks.
        span: axis of the constant, start and stop, where the tensor is a part of it.
        rows: start and stop of what the constant holds of the tensor's first axis, where that is not all: an embedding
            of positions, looked up at export.
    """

    key: str
    node: ir.Node
    index: int
    axes: tuple[int | None, ...]
    span: Span | None = None
    rows: tuple[int, int] | None = None

    def constant_layout(self, array: np.ndarray, rank: int) -> np.ndarray:
        """An array in the layout of the tensor, in that of the constant."""
        given = [axis for axis in self.axes if axis is not None]
        squeezed = array.reshape([size for size, axis in zip(array.shape, self.axes, strict=True) if axis is not None])
        ordered = squeezed.transpose(np.argsort(given))
        missing = [axis for axis in range(rank) if axis not in given]
        return np.expand_dims(ordered, missing) if missing else ordered

    def tensor_layout(self, array: np.ndarray) -> np.ndarray:
        """An array in the layout of the constant, in that of the tensor."""
        given = [axis for axis in self.axes if axis is not None]
        squeezed = array.squeeze(tuple(axis for axis in range(array.ndim) if axis not in given))
        ordered = squeezed.transpose(np.argsort(np.argsort(given)))
        return np.expand_dims(ordered, [place for place, axis in enumerate(self.axes) if axis is None])


@dataclasses.dataclass(frozen=True, eq=False)
class LayerMatch:
    """A Linear or convolution and its node.

    Attributes:
        name: of the module.
        weight: where its weight is; scaled where a BatchNorm is folded in.
        output_axis: axis of the tensor over outputs.
        bias: node and input that hold its bias; None where it has none in the graph, as one of zeros.
        norm: name of the BatchNorm that is folded in; empty where none is.
    """

    name: str
    weight: Match
    output_axis: int
    bias: tuple[ir.Node, int] | None
    norm: str


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What was found.

    Attributes:
        singles: tensors that stand in the graph as they are.
        layers: the weights of layers, with their biases.
        recurrent: layers of recurrent modules.
        missing: names of the tensors that the graph does not hold, with the reason.
    """

    singles: tuple[Match, ...]
    layers: tuple[LayerMatch, ...]
    recurrent: tuple[RecurrentMatch, ...]
    missing: Mapping[str, str]

    def without(self, keys: Collection[str]) -> Parameters:
        """The same, some tensors not missed."""
        return dataclasses.replace(self, missing={k: why for k, why in self.missing.items() if k not in keys})

    @property
    def weights(self) -> Iterator[Match]:
        """All matches of tensors to constants, those up to a scale too."""
        yield from self.singles
        yield from (layer.weight for layer in self.layers)


def factor(tensors: Mapping[str, np.ndarray], norm: str, eps: float) -> np.ndarray:
    """What a BatchNorm multiplies each channel by."""
    scale = 1 / np.sqrt(tensors[f"{norm}.running_var"].astype(np.float64) + eps)
    gamma = tensors.get(f"{norm}.weight")
    return scale if gamma is None else gamma * scale


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The floating-point tensors of a state_dict, in float32."""
    state = {k: t for k, t in module.state_dict().items() if isinstance(t, torch.Tensor)}
    return {k: t.detach().float().cpu().numpy() for k, t in state.items() if t.is_floating_point()}


def epsilon(part: torch.nn.Module | None) -> float:
    """What a BatchNorm adds to variances: torch's default where the module is not at hand."""
    return float(getattr(part, "eps", 1e-5))


def bias_place(node: ir.Node, span: Span | None = None) -> tuple[ir.Node, int] | None:
    """Node and input of the constant that a layer adds: its own, or for MatMul that of an Add behind it alone.

    Args:
        span: of the weight, where it is a part of the constant: the Add is behind a Split then.
    """
    if node.op_type == "MatMul":
        value = node.outputs[0] if span is None else _split_off(node.outputs[0], span)
        users = list(value.uses()) if value is not None else []
        if value is None or len(users) != 1 or value.is_graph_output() or users[0].node.op_type != "Add":
            return None
        node, index = users[0].node, 1 - users[0].idx
    else:
        index = 2
    return (node, index) if index < len(node.inputs) and is_constant(node.inputs[index]) else None


def _split_off(value: ir.Value, span: Span) -> ir.Value | None:
    """The output of a Split behind a value that is what a span of weights gives."""
    users = list(value.uses())
    start = 0
    for output in users[0].node.outputs if len(users) == 1 and users[0].node.op_type == "Split" else ():
        length = output.shape[-1] if output.shape is not None else None
        if not isinstance(length, int) or start > span[1]:
            return None
        if (start, start + length) == span[1:]:
            return output
        start += length
    return None
