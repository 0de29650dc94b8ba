"""Reduces tensors inside the graph, as it runs: what leaves ONNX Runtime are extremes, means and a few elements.

Whole tensors as outputs would cost copies, and memory for all of them at once. Reductions run on all threads, and a
tensor is freed as soon as it is reduced. For that the probes of the first tensors stand last in the graph, in whatever
order they are asked for: ONNX Runtime orders nodes by walking up from those that nothing follows, beginning with the
last. Nodes that it makes itself, those of the blocked layout among them, count as last, so a probe ends with another.

Convolutions run in a blocked layout, and bringing all their outputs back to NCHW costs a quarter of the inference. So
images are reduced by global pooling, which knows that layout, and their least value as the largest of the negative.
Their elements and means are given where asked for.

Elements are chosen at random, one from each of as many equal stretches of the flat tensor as there are to be: each has
the same chance, and none takes the same channels or the same place in the image all the time, as a fixed step would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from ...errors import GraphError
from ..graph import Graph
from ..graph.probe import Arrays, Session

HUGE = 1e30
"""Beyond this a value stands for infinity."""

SAMPLED = 4096
"""How many elements of a tensor are given at most for each sample of a batch."""

_POSITIVE = frozenset(("Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt"))
_CARRIES_SIGN = frozenset(("Add", "AveragePool", "Concat", "GlobalAveragePool", "Identity", "MaxPool", "Mul"))

_POINTS = "enginesmith/points"


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one run gives of a tensor.

    Attributes:
        size: how many elements it has.
        low, high, mean: by channel where it has channels, else of one element. The low of images that cannot be
            negative is given as 0. Of a guarded tensor the extremes of finite values, ``+inf`` and ``-inf`` where there
            are none, and no mean. None where means of images were not asked for.
        elements: some of the elements, all of a small tensor; None where they were not asked for.
        masked: of a guarded tensor, how many elements are NaN or beyond `HUGE`.
        broken: of a guarded tensor, how many elements are NaN or positive infinity.
    """

    size: int
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray | None
    elements: np.ndarray | None = None
    masked: int = 0
    broken: int = 0

    @property
    def sound(self) -> bool:
        """Whether nothing in the tensor is NaN, infinite or huge. A mean tells of NaN, which extremes may skip."""
        extremes = np.concatenate([self.low, self.high])
        finite = self.mean is None or np.isfinite(self.mean).all()
        return not self.size or bool(finite and (np.abs(extremes) <= HUGE).all())


class Reduced:
    """A graph that gives readings of tensors of its main graph, and nothing else.

    Args:
        graph: with types and ranks inferred; stays as it is.
        names: float tensors. The graph's outputs should be among them: what leads to no tensor here does not run.
        axes: of the channels, by name; tensors without one are reduced as a whole.
        sampled: tensors to give elements of.
        images: whether to give elements and means of images too, which takes longer; outputs of the graph always do.
        guarded: tensors with values that are not finite.
        threads: 0 for one a physical core.

    Raises:
        GraphError: no such tensor, or ONNX Runtime refuses the graph.
        TargetUnavailableError: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        graph: Graph,
        names: Iterable[str],
        *,
        axes: Mapping[str, int],
        sampled: Collection[str],
        images: bool,
        guarded: frozenset[str],
        threads: int,
    ) -> None:
        copy = graph.clone()
        main = copy.model.graph
        values = {value.name: value for value in (*main.inputs, *(v for node in main for v in node.outputs))}
        self.names = tuple(names)
        self.guarded = guarded
        if missing := [name for name in self.names if name not in values]:
            raise GraphError(f"the main graph has no tensor {missing[0]!r} to look at")
        finals = {value.name for value in main.outputs}
        main.outputs.clear()
        build = _Builder(main, copy.opset)
        positive = _positive(main)
        self._places: dict[str, dict[str, int]] = {}
        self._planes: dict[str, int] = {}
        asked = frozenset(self.names)
        for name in reversed([name for name in values if name in asked]):
            axis = axes.get(name) if name not in guarded else None
            plane = _plane(values[name], axis) if name in sampled else None
            if plane is None:
                outputs = build.probe(values[name], axis, sampled=name in sampled, guarded=name in guarded)
            else:
                self._planes[name] = plane
                outputs = build.image_probe(
                    values[name], positive=values[name] in positive, sampled=images or name in finals
                )
            self._places[name] = {key: len(main.outputs) + place for place, key in enumerate(outputs)}
            main.outputs.extend(outputs.values())
        self.has_images = bool(self._planes)
        self._session = Session(copy, optimized=True, threads=threads)

    def __call__(self, inputs: Arrays, draws: np.ndarray, *, shrink: bool = False) -> dict[str, Reading]:
        """Runs once.

        Args:
            inputs: by name.
            draws: (most,) float32 random numbers in [0, 1) that decide which elements to give: at most that many.
            shrink: give the memory of runs back after it.
        """
        points = np.arange(len(draws)) + draws.astype(np.float64)
        found = self._session({**inputs, _POINTS: points}, shrink=shrink)
        return {
            name: _reading({key: found[place] for key, place in places.items()}, self._planes.get(name, 1))
            for name, places in self._places.items()
        }


def _reading(found: dict[str, np.ndarray], plane: int) -> Reading:
    if "planes" in found:
        found["size"] = found.pop("planes") * plane
    counts = {key: int(found.pop(key)) for key in ("size", "masked", "broken") if key in found}
    high = found["high"].reshape(-1)
    low = -found["opposite"] if "opposite" in found else found.get("low", np.zeros_like(high))
    mean = found["mean"].reshape(-1) if "mean" in found else None
    return Reading(**counts, low=low.reshape(-1), high=high, mean=mean, elements=found.get("elements"))


class _Builder:
    """Adds probes to a graph."""

    def __init__(self, graph: ir.Graph, opset: int) -> None:
        self._graph = graph
        self._opset = opset
        self._points = ir.Value(name=_POINTS, type=ir.TensorType(ir.DataType.DOUBLE), shape=ir.Shape([None]))
        graph.inputs.append(self._points)
        self._zero = self._constant(np.array([0]))
        self._flat = self._constant(np.array([-1]))
        self._signs: dict[int, list[ir.Value]] = {}

    def probe(self, value: ir.Value, axis: int | None, *, sampled: bool, guarded: bool) -> dict[str, ir.Value]:
        """The outputs that make a reading, by its fields."""
        if value.dtype != ir.DataType.FLOAT:
            value = self._add("Cast", value, to=ir.DataType.FLOAT.value)
        outputs = {"size": self._typed(self._add("Size", value), ir.DataType.INT64)}
        if guarded:
            outputs.update(self._guarded(value))
        else:
            axes = _others(value, axis)
            for key, operator in (("low", "ReduceMin"), ("high", "ReduceMax"), ("mean", "ReduceMean")):
                outputs[key] = self._typed(self._reduce(operator, value, axes), ir.DataType.FLOAT)
        if sampled:
            outputs["elements"] = self._typed(self._sample(value), ir.DataType.FLOAT)
        return outputs

    def image_probe(self, value: ir.Value, *, positive: bool, sampled: bool) -> dict[str, ir.Value]:
        """As `probe`, for images (batch, channels, height, width)."""
        axes = [0, 2, 3]
        pooled = self._add("GlobalMaxPool", value)
        outputs = {"planes": self._typed(self._add("Size", pooled), ir.DataType.INT64)}  # that of `value` needs NCHW
        outputs["high"] = self._reduce("ReduceMax", pooled, axes)
        if sampled:
            outputs["mean"] = self._reduce("ReduceMean", self._add("GlobalAveragePool", value), axes)
            outputs["elements"] = self._sample(value)
        if not positive:
            outputs["opposite"] = self._reduce("ReduceMax", self._add("GlobalMaxPool", self._negative(value)), axes)
        for key in outputs.keys() - {"planes"}:
            self._typed(outputs[key], ir.DataType.FLOAT)
        return outputs

    def _negative(self, value: ir.Value) -> ir.Value:
        """-value in the layout that it has. An Add that takes the value takes the negative of that instead: exact too,
        and it fuses with Add and Relu, as the convolution that made the value no longer does.
        """
        negated = self._negated(value)
        use = next((use for use in value.uses() if use.node.op_type == "Add"), None)
        if use is None:
            self._graph.append(negated)
        else:
            back = self._negated(negated.outputs[0])
            self._graph.insert_before(use.node, (negated, back))
            use.node.replace_input_with(use.idx, back.outputs[0])
        return negated.outputs[0]

    def _negated(self, value: ir.Value) -> ir.Node:
        """As a normalization, which becomes a convolution of single channels in the layout of images."""
        channels = value.shape[1] if value.shape is not None else None
        assert isinstance(channels, int)
        if channels not in self._signs:
            numbers = (-1.0, 0.0, 0.0, 1.0)  # scale, shift, mean, variance
            arrays = (np.full(channels, number, np.float32) for number in numbers)
            self._signs[channels] = [self._initializer(array) for array in arrays]
        node = ir.node("BatchNormalization", [value, *self._signs[channels]], {"epsilon": 0.0})
        node.outputs[0].name = f"enginesmith/{value.name}/negative"
        node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
        return node

    def _guarded(self, value: ir.Value) -> dict[str, ir.Value]:
        magnitude = self._add("Abs", value)
        finite = self._add("Less", magnitude, self._constant(np.float32(np.inf)))  # NaN is less than nothing
        outputs = {}
        for key, operator, neutral in (("low", "ReduceMin", np.inf), ("high", "ReduceMax", -np.inf)):
            kept = self._add("Where", finite, value, self._constant(np.float32(neutral)))
            outputs[key] = self._typed(self._reduce(operator, kept, None), ir.DataType.FLOAT)
        for key, source, bound in (("masked", magnitude, HUGE), ("broken", value, np.inf)):
            beyond = self._add("Not", self._add("Less", source, self._constant(np.float32(bound))))
            counted = self._add("Cast", beyond, to=ir.DataType.INT64.value)
            outputs[key] = self._typed(self._reduce("ReduceSum", counted, None), ir.DataType.INT64)
        return outputs

    def _sample(self, value: ir.Value) -> ir.Value:
        """One element from each stretch of ``size / count``, where its point falls; all of a tensor with few."""
        flat = self._add("Reshape", value, self._flat)
        if self._opset < 10:  # Slice takes no inputs
            return flat
        size = self._add("Size", value)
        points = self._add("Slice", self._points, self._zero, self._add("Reshape", size, self._flat))
        whole, count = (
            self._add("Cast", number, to=ir.DataType.DOUBLE.value) for number in (size, self._add("Size", points))
        )
        places = self._add("Mul", points, self._add("Div", whole, count))  # below `size`, as draws have 24 bits
        return self._add("Gather", flat, self._add("Cast", places, to=ir.DataType.INT64.value))

    def _reduce(self, operator: str, value: ir.Value, axes: list[int] | None) -> ir.Value:
        if axes is None:
            return self._add(operator, value, keepdims=0)
        if self._opset >= 18:
            return self._add(operator, value, self._constant(np.array(axes)), keepdims=0)
        return self._add(operator, value, axes=axes, keepdims=0)

    def _constant(self, array: Any) -> ir.Value:
        return self._add("Constant", value=ir.tensor(array))

    def _initializer(self, array: np.ndarray) -> ir.Value:
        value = ir.Value(name=f"enginesmith/constant{len(self._graph.initializers)}", const_value=ir.tensor(array))
        self._graph.register_initializer(value)
        return value

    def _add(self, operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(operator, inputs, attributes=attributes)
        self._graph.append(node)
        node.outputs[0].name = f"enginesmith/{len(self._graph)}"
        return node.outputs[0]

    def _typed(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        value.type = ir.TensorType(dtype)
        return value


def _others(value: ir.Value, axis: int | None) -> list[int] | None:
    """The axes beside that of the channels; None where there are no channels."""
    rank = 0 if value.shape is None else len(value.shape)
    if axis is None or rank < 2 or not -rank <= axis < rank:
        return None
    return [other for other in range(rank) if other != axis % rank]


def _plane(value: ir.Value, axis: int | None) -> int | None:
    """Height times width of images whose size is known; None of what is no such image."""
    sizes = [size for size in (value.shape or ())[1:] if isinstance(size, int)]
    fits = axis == 1 and value.shape is not None and len(value.shape) == 4 and value.dtype == ir.DataType.FLOAT
    return sizes[1] * sizes[2] if fits and len(sizes) == 3 else None


def _positive(graph: ir.Graph) -> set[ir.Value]:
    """Values that are zero or more by the operator that makes them."""
    found: set[ir.Value] = set()
    for node in graph:
        carries = node.op_type in _CARRIES_SIGN and all(value in found for value in node.inputs if value is not None)
        if node.op_type in _POSITIVE or carries:
            found.update(node.outputs)
    return found
