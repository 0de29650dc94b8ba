"""What nodes compute and move, at given sizes: the numbers that a roofline needs.

                    operations on numbers               bytes of memory
products            2 x multiply-adds (`cost`)          all inputs, the output
elementwise         1 an element of the output          all inputs, the output
Softmax, norms      `_OPERATIONS` an element            all inputs, the output
pooling             elements of the output x kernel     all inputs, the output
reductions          1 an element of the input           all inputs, the output
Gather              0                                   what is picked, indices, the output
Slice, Split        0                                   the output twice
Reshape and such    0                                   0: the same memory by another shape

A group of nodes that one kernel computes reads what comes from outside of it and writes what goes out of it: that is
what fusion is for. Weights are counted in the type that they are stored in; a recurrent layer reads its own once, as
they stay in caches over the steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping

import onnx_ir as ir

from .cost import at_sizes, multiply_adds
from .graph import Graph
from .selection import label

VIEWS = frozenset(("Constant", "Flatten", "Identity", "Reshape", "Shape", "Size", "Squeeze", "Unsqueeze"))
"""Operators that give the memory of their input by another shape, or look at nothing but its shape."""

MOVES = frozenset((
    "Cast", "Concat", "ConstantOfShape", "DepthToSpace", "Expand", "Gather", "GatherElements", "GatherND", "Pad",
    "ScatterElements", "ScatterND", "Slice", "SpaceToDepth", "Split", "Tile", "Transpose",
))  # fmt: skip
"""Operators that compute nothing."""

PICKS = frozenset(("Gather", "GatherElements", "GatherND", "Slice", "Split"))
"""Operators that read of their first input only what they give."""

_OPERATIONS = {
    "BatchNormalization": 2, "DequantizeLinear": 2, "Gelu": 4, "GroupNormalization": 7, "HardSwish": 4,
    "InstanceNormalization": 7, "LayerNormalization": 7, "LogSoftmax": 5, "QuantizeLinear": 2,
    "RMSNormalization": 4, "Softmax": 5,
}  # fmt: skip
"""Passes over an element: LayerNormalization sums, subtracts, squares, sums, divides, scales and shifts."""

_INTEGER = frozenset((
    "ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat",
    "QAttention", "QLinearConv", "QLinearMatMul",
))  # fmt: skip
"""Operators that multiply 8-bit numbers, whatever they read and give."""

_POOLS = frozenset(("AveragePool", "LpPool", "MaxPool"))
_NARROW = {"INT8": "int8", "UINT8": "int8", "FLOAT8E4M3FN": "fp8", "FLOAT8E5M2": "fp8"}
_NAMES = {"FLOAT": "fp32", "DOUBLE": "fp64", "FLOAT16": "fp16", "BFLOAT16": "bf16"}


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one kernel.

    Attributes:
        flops: operations on numbers.
        weight_bytes: constants that are read.
        moved_bytes: tensors that are read and written beside.
        precision: in which most of it is computed.
        heavy: operations that are in products.
        known: whether the shapes of all tensors are known.
    """

    flops: float = 0.0
    weight_bytes: float = 0.0
    moved_bytes: float = 0.0
    precision: str = "fp32"
    heavy: float = 0.0
    known: bool = True

    @property
    def bytes(self) -> float:
        """All that is moved."""
        return self.weight_bytes + self.moved_bytes

    def scaled(self, *, flops: float = 1.0, weights: float = 1.0, moved: float = 1.0, precision: str = "") -> Work:
        """The same with other amounts."""
        return dataclasses.replace(
            self,
            flops=self.flops * flops,
            heavy=self.heavy * flops,
            weight_bytes=self.weight_bytes * weights,
            moved_bytes=self.moved_bytes * moved,
            precision=precision or self.precision,
        )


class Workload:
    """The work of the nodes of a graph.

    Args:
        sizes: of the dynamic axes, by name.
        shapes: of tensors, where inference does not find them.

    Attributes:
        graph: with shapes at these sizes.
    """

    def __init__(
        self, graph: Graph, sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> None:
        self.graph = at_sizes(graph, sizes)
        for node in self.graph.nodes():
            for value in node.outputs:
                if (found := (shapes or {}).get(value.name or "")) is not None and _elements(value) is None:
                    value.shape = ir.Shape(found)

    def nodes(self) -> Iterator[ir.Node]:
        """All nodes that are executed; those of branches and bodies among them."""
        yield from self.graph.nodes()

    def of(self, nodes: Collection[ir.Node]) -> Work:
        """The work of nodes that one kernel computes."""
        inside = set(nodes)
        flops = [(_flops(node), node) for node in nodes]
        heavy = [(count, node) for count, node in flops if multiply_adds(node)]
        main = max(heavy or flops, key=lambda found: found[0], default=(0.0, None))[1]
        crossing = list(_read(inside))
        weights, read = _sum(b for weight, b in crossing if weight), _sum(b for weight, b in crossing if not weight)
        written = _sum(_bytes(value) for node in nodes for value in node.outputs if _leaves(value, inside))
        only_views = all(node.op_type in VIEWS for node in nodes)
        return Work(
            flops=sum(count for count, _ in flops),
            weight_bytes=0.0 if only_views else weights[0],
            moved_bytes=0.0 if only_views else read[0] + written[0],
            precision=precision(main) if main is not None else "fp32",
            heavy=sum(count for count, _ in heavy),
            known=only_views or (weights[1] and read[1] and written[1]),
        )


def precision(node: ir.Node) -> str:
    """What a node computes in: 8 bits where both factors of a product come out of DequantizeLinear."""
    if node.op_type in _INTEGER:
        return "int8"
    factors = [value for value in node.inputs[:2] if value is not None]
    if multiply_adds(node) and factors:
        found = {_quantized(value) for value in factors}
        if len(found) == 1 and (narrow := next(iter(found))):
            return narrow
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.dtype is not None and value.dtype.name in _NAMES:
            return _NAMES[value.dtype.name]
    for value in node.inputs:
        if value is not None and value.dtype is not None and value.dtype.name in _NARROW:
            return _NARROW[value.dtype.name]
    return "fp32"


def is_weighted(node: ir.Node) -> bool:
    """Whether a product has constant weights, quantized ones too."""
    return bool(multiply_adds(node)) and any(
        _constant(value) for value in node.inputs[1:3] if value is not None and value.name
    )


def _constant(value: ir.Value) -> bool:
    producer = value.producer()
    if value.const_value is not None or producer is None:
        return value.const_value is not None
    narrow = producer.op_type in ("DequantizeLinear", "Transpose", "Cast", "Constant")
    return narrow and all(_constant(source) for source in producer.inputs if source is not None)


def _quantized(value: ir.Value) -> str:
    if value.dtype is not None and value.dtype.name in _NARROW:
        return _NARROW[value.dtype.name]
    producer = value.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return ""
    source = producer.inputs[0]
    return _NARROW.get(source.dtype.name, "") if source is not None and source.dtype is not None else ""


def _flops(node: ir.Node) -> float:
    if node.inputs and all(value is None or value.const_value is not None for value in node.inputs):
        return 0.0  # computed when the engine is built
    if macs := multiply_adds(node):
        return 2.0 * macs
    if node.op_type in VIEWS or node.op_type in MOVES or not node.outputs:
        return 0.0
    given = _elements(node.outputs[0]) or 0.0
    if node.op_type in _POOLS:
        return given * math.prod(int(size) for size in node.attributes.get_ints("kernel_shape", []))
    if node.op_type.startswith(("Reduce", "Global", "Arg", "TopK", "CumSum")):
        return _elements(node.inputs[0]) or 0.0 if node.inputs and node.inputs[0] is not None else 0.0
    return given * _OPERATIONS.get(node.op_type, 1)


def _read(inside: Collection[ir.Node]) -> Iterator[tuple[bool, float | None]]:
    """What comes from outside: whether it is a weight, and its bytes; a tensor that several nodes read counts once."""
    seen: set[ir.Value] = set()
    for node in inside:
        for index, value in enumerate(node.inputs):
            if value is None or value in seen or value.producer() in inside or not value.name:
                continue
            seen.add(value)
            if node.op_type not in ("Shape", "Size"):
                picked = index == 0 and node.op_type in PICKS
                yield value.const_value is not None, _bytes(node.outputs[0] if picked else value)


def _leaves(value: ir.Value, inside: Collection[ir.Node]) -> bool:
    uses = list(value.uses())
    return value.is_graph_output() or not uses or any(use.node not in inside for use in uses)


def _bytes(value: ir.Value) -> float | None:
    if value.const_value is not None:
        return float(value.const_value.nbytes)
    count = _elements(value)
    return None if count is None else count * (value.dtype.itemsize if value.dtype is not None else 4.0)


def _elements(value: ir.Value) -> float | None:
    if value.shape is None or not all(isinstance(axis, int) for axis in value.shape):
        return None
    sizes: list[int] = [int(axis) for axis in value.shape if isinstance(axis, int)]
    return float(math.prod(sizes))


def _sum(amounts: Iterable[float | None]) -> tuple[float, bool]:
    """The sum of what is known, and whether all is."""
    found = list(amounts)
    return sum(amount for amount in found if amount is not None), all(amount is not None for amount in found)


def by_label(graph: Graph) -> dict[str, ir.Node]:
    """Nodes by their labels."""
    return {label(node): node for node in graph.nodes()}
