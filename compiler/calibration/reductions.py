"""Reduces tensors inside the graph, as it runs: what leaves ONNX Runtime are extremes, means and a few elements.

Whole tensors as outputs would cost copies, and memory for all of them at once. Reductions run on all threads, and a
tensor is freed as soon as it is reduced. For that the probes of the first tensors stand last in the graph: ONNX Runtime
orders nodes by walking up from those that nothing follows, beginning with the last.

Convolutions run in a blocked layout, and bringing all their outputs back to NCHW costs a quarter of the inference. So
images are reduced by global pooling and thinned out by MaxPool with 1x1 windows, which know that layout.
"""

from __future__ import annotations

import dataclasses
import math
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
SAMPLED_OF_IMAGE = 1024
"""How many elements of a tensor are given at most for each sample of a batch."""

_POSITIVE = frozenset(("Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt"))
_CARRIES_SIGN = frozenset(("Add", "AveragePool", "Concat", "GlobalAveragePool", "Identity", "MaxPool", "Mul"))

_PHASE, _BORDERS, _MOST, _MOST_OF_IMAGE = (
    f"enginesmith/{name}" for name in ("phase", "borders", "most", "most-of-image")
)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one run gives of a tensor.

    Attributes:
        size: how many elements it has.
        low, high, mean: by channel where it has channels, else of one element. The low of images that cannot be
            negative is given as 0. Of a guarded tensor the extremes of finite values, ``+inf`` and ``-inf`` where there
            are none, and no mean.
        elements: some of the elements, evenly spaced; None where the range is enough.
        masked: of a guarded tensor, how many elements are NaN or beyond `HUGE`.
        broken: of a guarded tensor, how many elements are NaN or positive infinity.
    """

    size: int
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    elements: np.ndarray | None = None
    masked: int = 0
    broken: int = 0

    @property
    def sound(self) -> bool:
        """Whether nothing in the tensor is NaN, infinite or huge. A mean tells of NaN, which extremes may skip."""
        extremes = np.concatenate([self.low, self.high])
        return not self.size or bool(np.isfinite(self.mean).all() and (np.abs(extremes) <= HUGE).all())


class Reduced:
    """A graph that gives readings of tensors of its main graph, and nothing else.

    Args:
        graph: with types and ranks inferred; stays as it is.
        names: float tensors. The graph's outputs should be among them: what leads to no tensor here does not run.
        axes: of the channels, by name; tensors without one are reduced as a whole.
        sampled: tensors to give elements of.
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
        guarded: Collection[str],
        threads: int,
    ) -> None:
        copy = graph.clone()
        main = copy.model.graph
        values = {value.name: value for value in (*main.inputs, *(v for node in main for v in node.outputs))}
        self.names = tuple(names)
        if missing := [name for name in self.names if name not in values]:
            raise GraphError(f"the main graph has no tensor {missing[0]!r} to look at")
        main.outputs.clear()
        build = _Builder(main, copy.opset)
        positive = _positive(main)
        self._places: dict[str, dict[str, int]] = {}
        self._planes: dict[str, int] = {}
        for name in reversed(self.names):
            axis = axes.get(name) if name not in guarded else None
            image = _image(values[name], axis)
            if image is not None and name in sampled:
                self._planes[name] = image[1] * image[2]
                outputs = build.image_probe(values[name], image, positive=values[name] in positive)
            else:
                outputs = build.probe(values[name], axis, sampled=name in sampled, guarded=name in guarded)
            self._places[name] = {key: len(main.outputs) + place for place, key in enumerate(outputs)}
            main.outputs.extend(outputs.values())
        self._session = Session(copy, optimized=True, threads=threads)

    def __call__(self, inputs: Arrays, samples: int, draws: np.ndarray) -> dict[str, Reading]:
        """Runs once.

        Args:
            inputs: by name.
            samples: how many samples that is.
            draws: (3,) random numbers in [0, 1) that decide which elements to give.
        """
        own = {
            _PHASE: draws[0],
            _BORDERS: draws[1:],
            _MOST: SAMPLED * samples,
            _MOST_OF_IMAGE: SAMPLED_OF_IMAGE * samples,
        }
        found = self._session({**inputs, **{name: np.array(number, np.float32) for name, number in own.items()}})
        return {
            name: _reading({key: found[place] for key, place in places.items()}, self._planes.get(name, 1))
            for name, places in self._places.items()
        }


def _reading(found: dict[str, np.ndarray], plane: int) -> Reading:
    if "planes" in found:
        found["size"] = found.pop("planes") * plane
    counts = {key: int(found.pop(key)) for key in ("size", "masked", "broken") if key in found}
    high = found["high"].reshape(-1)
    low = found["low"].reshape(-1, high.size).min(0) if "low" in found else np.zeros_like(high)
    mean = found["mean"].reshape(-1) if "mean" in found else low
    return Reading(**counts, low=low, high=high, mean=mean, elements=found.get("elements"))


class _Builder:
    """Adds probes to a graph."""

    def __init__(self, graph: ir.Graph, opset: int) -> None:
        self._graph = graph
        self._opset = opset
        self._phase, self._borders, self._most, self._most_of_image = (
            ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2] if name == _BORDERS else []))
            for name in (_PHASE, _BORDERS, _MOST, _MOST_OF_IMAGE)
        )
        graph.inputs.extend([self._phase, self._borders, self._most, self._most_of_image])
        self._zero = self._constant(np.array([0]))
        self._end = self._constant(np.array([np.iinfo(np.int64).max]))
        self._flat = self._constant(np.array([-1]))
        self._ends = self._constant(np.array([np.iinfo(np.int64).max] * 2))
        self._plane = self._constant(np.array([2, 3]))
        self._one = self._constant(np.array([1]))

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
            outputs["elements"] = self._typed(self._sample(value, self._most), ir.DataType.FLOAT)
        return outputs

    def image_probe(self, value: ir.Value, image: tuple[int, int, int], *, positive: bool) -> dict[str, ir.Value]:
        """As `probe`, for images (batch, channels, height, width)."""
        axes = [0, 2, 3]
        pooled = self._add("GlobalMaxPool", value)
        outputs = {"planes": self._typed(self._add("Size", pooled), ir.DataType.INT64)}  # that of `value` needs NCHW
        outputs["high"] = self._reduce("ReduceMax", pooled, axes)
        outputs["mean"] = self._reduce("ReduceMean", self._add("GlobalAveragePool", value), axes)
        if not positive:
            outputs["low"] = self._reduce("ReduceMin", value, [2, 3])
        thinned, left = self._thin(value, image)
        few = left <= 2 * SAMPLED_OF_IMAGE
        outputs["elements"] = (
            self._add("Reshape", thinned, self._flat) if few else self._sample(thinned, self._most_of_image)
        )
        for key in outputs.keys() - {"planes"}:
            self._typed(outputs[key], ir.DataType.FLOAT)
        return outputs

    def _thin(self, value: ir.Value, image: tuple[int, int, int]) -> tuple[ir.Value, int]:
        """Elements on a coarse grid of at least 4 rows and columns, and how many an image leaves, about a thousand.

        The grid begins at the border, where padding makes values differ. Of ``h`` rows that it takes from ``H`` one is
        at the border, of all rows two are; kept in ``2 (h - 1) / (H - 2)`` of the batches, it has its share.
        """
        channels, *plane = image
        stride = min(math.isqrt(math.prod(image) // SAMPLED_OF_IMAGE), *(size // 4 for size in plane))
        if stride < 2 or self._opset < 10:
            return value, math.prod(image)
        value = self._add("MaxPool", value, kernel_shape=[1, 1], strides=[stride, stride])
        left = [-(-size // stride) for size in plane]
        shares = [2 * (rows - 1) / (size - 2) for rows, size in zip(left, plane, strict=True)]
        dropped = self._add("Less", self._constant(np.array(shares, np.float32)), self._borders)
        start = self._add("Cast", dropped, to=ir.DataType.INT64.value)
        return self._add("Slice", value, start, self._ends, self._plane), channels * math.prod(left)

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

    def _sample(self, value: ir.Value, most: ir.Value) -> ir.Value:
        """Every step-th element, so that `most` are given or a few less; from a start that the phase decides."""
        flat = self._add("Reshape", value, self._flat)
        if self._opset < 10:  # Slice takes no steps
            return flat
        size = self._add("Cast", self._add("Size", value), to=ir.DataType.FLOAT.value)
        step = self._add("Ceil", self._add("Div", size, most))
        start = self._add("Mul", step, self._phase)
        vectors = (self._add("Reshape", scalar, self._one) for scalar in (start, step))
        start, step = (self._add("Cast", vector, to=ir.DataType.INT64.value) for vector in vectors)
        return self._add("Slice", flat, start, self._end, self._zero, step)

    def _reduce(self, operator: str, value: ir.Value, axes: list[int] | None) -> ir.Value:
        if axes is None:
            return self._add(operator, value, keepdims=0)
        if self._opset >= 18:
            return self._add(operator, value, self._constant(np.array(axes)), keepdims=0)
        return self._add(operator, value, axes=axes, keepdims=0)

    def _constant(self, array: Any) -> ir.Value:
        return self._add("Constant", value=ir.tensor(array))

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


def _image(value: ir.Value, axis: int | None) -> tuple[int, int, int] | None:
    """Channels, height and width of images whose size is known."""
    sizes = tuple(size for size in (value.shape or ())[1:] if isinstance(size, int))
    fits = axis == 1 and value.shape is not None and len(value.shape) == 4 and value.dtype == ir.DataType.FLOAT
    return (sizes[0], sizes[1], sizes[2]) if fits and len(sizes) == 3 else None


def _positive(graph: ir.Graph) -> set[ir.Value]:
    """Values that are zero or more by the operator that makes them."""
    found: set[ir.Value] = set()
    for node in graph:
        carries = node.op_type in _CARRIES_SIGN and all(value in found for value in node.inputs if value is not None)
        if node.op_type in _POSITIVE or carries:
            found.update(node.outputs)
    return found
