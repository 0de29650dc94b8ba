"""Integer arithmetic whose activations are quantized while running, in the forms that ONNX Runtime's CPU fuses.

    y = x @ W     q, s, z = DynamicQuantizeLinear(x)              q uint8, W int8 with one scale for each column
                  y = Cast(MatMulInteger(q, W, z, 0)) * (s * scale)

ONNX Runtime makes DynamicQuantizeMatMul of this with the Add of a bias, or MatMulIntegerToFloat where matrix products
share one DynamicQuantizeLinear. An LSTM becomes DynamicQuantizeLSTM, its weights with one scale for each gate and unit.
A GRU, for which there is no such operator, becomes such products over all steps at once and a Scan: see `recurrent`.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import onnx_ir as ir

from ..graph.schemas import MICROSOFT
from . import recurrent
from .constants import Constants
from .linear import Linear
from .parameters import weight_parameters
from .patch import Patch, Patcher

OPSET = 11
"""The first with DynamicQuantizeLinear."""

_FLOAT, _INT8, _UINT8, _INT32 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32
_LSTM_INPUTS = 8
_Weight = tuple[ir.Value, ir.Value, ir.Value]


class Dynamic:
    """Quantizes nodes of one graph; activations and weights that nodes share are quantized once.

    Nodes are to be given in the graph's order: the first user of an activation quantizes it for those after it.

    Args:
        reduce_range: 7 bits for weights, which processors without VNNI need lest their sums of two products saturate.
    """

    def __init__(self, patcher: Patcher, constants: Constants, *, reduce_range: bool) -> None:
        self._patcher = patcher
        self._constants = constants
        self._reduce_range = reduce_range
        self._activations: dict[ir.Value, tuple[ir.Value, ...]] = {}
        self._weights: dict[Hashable, _Weight] = {}

    def linear(self, found: Linear) -> None:
        """Replaces a MatMul or Gemm."""
        patch = Patch(self._patcher, found.node)
        shape = found.node.outputs[0].shape
        weight = self._weight(found.key, found.name, found.weight)
        result = self._product(patch, found.x, weight, shape, main=True)
        if found.bias is not None:
            bias = found.bias
            if isinstance(bias, np.ndarray):
                bias = self._patcher.initializer(f"{patch.title}/bias", bias)
            (result,) = patch.add("Add", [result, bias], [(f"{patch.title}/sum", _FLOAT, shape)])
        patch.apply(result)

    def lstm(self, node: ir.Node) -> str | None:
        """Replaces an LSTM; where that is not possible, gives the reason and leaves it."""
        if node.attributes.get_int("layout", 0):
            return "its batch axis comes first (layout=1), which DynamicQuantizeLSTM does not take"
        arrays = [self._constants.array(value) for value in node.inputs[1:3]]
        if arrays[0] is None or arrays[1] is None:
            return "its weights are not constant"
        if not all(np.isfinite(array).all() for array in arrays if array is not None):
            return "its weights hold NaN or Inf"
        patch = Patch(self._patcher, node)
        inputs = [*node.inputs, *[None] * (_LSTM_INPUTS - len(node.inputs))]
        for index, array in zip((1, 2), arrays, strict=True):
            assert array is not None
            inputs[index], scale, zero = self._gates(node.inputs[index], array)
            inputs += [scale, zero]
        attributes = {key: attribute.value for key, attribute in node.attributes.items() if key != "layout"}
        attributes.setdefault("hidden_size", arrays[1].shape[2])
        outputs = [(f"{v.name}/float", _FLOAT, v.shape) if v.name else ("", _FLOAT, None) for v in node.outputs]
        results = patch.add("DynamicQuantizeLSTM", inputs, outputs, attributes, domain=MICROSOFT, main=True)
        patch.apply(*(result for result in results if result.name))
        return None

    def gru(self, node: ir.Node) -> str | None:
        """Replaces a GRU; where that is not possible, gives the reason and leaves it."""
        if (reason := recurrent.unsupported(node, self._patcher.graph.opset)) is not None:
            return reason
        w, r = self._constants.array(node.inputs[1]), self._constants.array(node.inputs[2])
        b = self._constants.array(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] else None
        x = node.inputs[0]
        if x is None or w is None or r is None or (b is None and len(node.inputs) > 3 and node.inputs[3]):
            return "its weights are not constant"
        if not all(np.isfinite(array).all() for array in (w, r)):
            return "its weights hold NaN or Inf"
        if r.shape[2] < recurrent.NARROWEST:
            return f"its {r.shape[2]} units are too few to gain: a step takes longer than its products save"
        patch = Patch(self._patcher, node)
        directions = []
        for d in range(len(w)):
            biases = np.zeros(2 * w.shape[1], w.dtype) if b is None else b[d]
            names = [f"{value.name}/{d}" if len(w) > 1 else value.name or "" for value in node.inputs[1:3] if value]
            projection = self._weight((node.inputs[1], d), names[0], w[d].T)
            gates = self._product(patch, x, projection, _projected(x, w.shape[1]))
            weights = self._weight((node.inputs[2], d), names[1], r[d].T)
            directions.append(recurrent.Direction(gates, weights, biases[: w.shape[1]], biases[w.shape[1] :]))
        patch.apply(*recurrent.scans(patch, self._patcher, node, directions))
        return None

    def _activation(self, x: ir.Value, patch: Patch) -> tuple[ir.Value, ...]:
        if x not in self._activations:
            outputs = [(f"{x.name}/quantized", _UINT8, x.shape)]
            outputs += [(f"{x.name}/scale", _FLOAT, ir.Shape([])), (f"{x.name}/zero_point", _UINT8, ir.Shape([]))]
            self._activations[x] = patch.add("DynamicQuantizeLinear", [x], outputs)
        return self._activations[x]

    def _product(
        self, patch: Patch, x: ir.Value, weight: _Weight, shape: ir.Shape | None, *, main: bool = False
    ) -> ir.Value:
        numbers, scale, zero = weight
        quantized, x_scale, x_zero = self._activation(x, patch)
        title = patch.title
        inputs = [quantized, numbers, x_zero, zero]
        (sums,) = patch.add("MatMulInteger", inputs, [(f"{title}/sums", _INT32, shape)], main=main)
        (real,) = patch.add("Cast", [sums], [(f"{title}/cast", _FLOAT, shape)], {"to": _FLOAT.value})
        (scales,) = patch.add("Mul", [x_scale, scale], [(f"{title}/scale", _FLOAT, scale.shape)])
        (result,) = patch.add("Mul", [real, scales], [(f"{title}/product", _FLOAT, shape)])
        return result

    def _weight(self, key: Hashable, name: str, array: np.ndarray) -> _Weight:
        """Stores a weight (K, N) with a scale for each column."""
        if key not in self._weights:
            parameters = weight_parameters(array, 1, _INT8, reduce_range=self._reduce_range)
            self._weights[key] = (
                self._patcher.initializer(f"{name}/quantized", np.ascontiguousarray(parameters.quantize(array))),
                self._patcher.initializer(f"{name}/scale", parameters.scale),
                self._patcher.initializer(f"{name}/zero_point", parameters.zero_point),
            )
        return self._weights[key]

    def _gates(self, value: ir.Value | None, array: np.ndarray) -> _Weight:
        """Stores weights (directions, gates * units, inputs) as (directions, inputs, gates * units)."""
        assert value is not None
        if value not in self._weights:
            rows = array.reshape(-1, array.shape[2])
            parameters = weight_parameters(rows, 0, _INT8, reduce_range=self._reduce_range)
            quantized = parameters.quantize(rows).reshape(array.shape).transpose(0, 2, 1)
            name = value.name or ""
            self._weights[value] = (
                self._patcher.initializer(f"{name}/quantized", np.ascontiguousarray(quantized)),
                self._patcher.initializer(f"{name}/scale", parameters.scale.reshape(array.shape[:2])),
                self._patcher.initializer(f"{name}/zero_point", np.zeros(array.shape[:2], np.int8)),
            )
        return self._weights[value]


def _projected(x: ir.Value, columns: int) -> ir.Shape | None:
    return None if x.shape is None else ir.Shape([*x.shape[:2], columns])
