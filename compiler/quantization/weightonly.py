"""Matrix products whose weights alone are small integers; activations stay float.

onnxruntime   y = x @ W  ->  com.microsoft.MatMulNBits(x, codes, scales, zero points)
tensorrt      y = x @ W  ->  x @ DequantizeLinear(W as INT4 in blocks, or as INT8 with one scale for each column)

              T[i]       ->  Cast(T8[i]) * scale[i]             a table of Gather in INT8, one scale for each row

TensorRT takes no zero points. Of INT8 in blocks it makes a float16 constant while building, so there blocks are for
4 bits only.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal

import numpy as np
import onnx_ir as ir

from ..graph.schemas import MICROSOFT
from .blockwise import Blocks, compensate, quantize
from .linear import Linear
from .parameters import weight_parameters
from .patch import Patch, Patcher

Scheme = Literal["onnxruntime", "tensorrt"]
BLOCK_OPSET = 21
"""The first whose DequantizeLinear takes INT4 and blocks."""


class WeightOnly:
    """Replaces nodes of one graph; a weight that nodes share is quantized once.

    Args:
        accuracy_level: of MatMulNBits: 4 multiplies in int8, 0 in the activation's type.
    """

    def __init__(self, patcher: Patcher, scheme: Scheme, bits: int, *, symmetric: bool, accuracy_level: int) -> None:
        self._patcher = patcher
        self._scheme = scheme
        self._bits = bits
        self._symmetric = symmetric
        self._accuracy_level = accuracy_level
        self._rounded: dict[Hashable, Blocks] = {}
        self._weights: dict[Hashable, tuple[ir.Value | None, ...]] = {}

    def round(self, found: Linear, block: int, hessian: np.ndarray) -> None:
        """Rounds a weight in blocks, for `replace` later, so that the product changes least on data.

        Args:
            hessian: (K, K), the sum of x x^T over inputs x of the data.
        """
        if found.key not in self._rounded:
            nearest = self._nearest(found, block, np.diag(hessian))
            self._rounded[found.key] = compensate(nearest, found.weight, hessian)

    def replace(self, found: Linear, block: int) -> None:
        """Replaces a MatMul or Gemm; `block` rows of its weight share a scale."""
        patch = Patch(self._patcher, found.node)
        assert found.x.dtype is not None
        outputs = [(f"{patch.title}/product", found.x.dtype, found.node.outputs[0].shape)]
        if self._scheme == "onnxruntime":
            rows, columns = found.weight.shape
            attributes = {"K": rows, "N": columns, "bits": self._bits, "block_size": block}
            attributes["accuracy_level"] = self._accuracy_level
            inputs = [found.x, *self._stored(found, block)]
            (result,) = patch.add("MatMulNBits", inputs, outputs, attributes, domain=MICROSOFT, main=True)
        else:
            (result,) = patch.add("MatMul", [found.x, self._dequantized(found, block, patch)], outputs, main=True)
        if found.bias is not None:
            bias = found.bias
            if isinstance(bias, np.ndarray):
                bias = self._patcher.initializer(f"{patch.title}/bias", bias)
            (result,) = patch.add("Add", [result, bias], [(f"{patch.title}/sum", *outputs[0][1:])])
        patch.apply(result)

    def table(self, node: ir.Node, array: np.ndarray) -> None:
        """Replaces a Gather of rows of a table."""
        patch = Patch(self._patcher, node)
        table, index = node.inputs
        assert table is not None
        name, shape = table.name, node.outputs[0].shape
        dtype = ir.DataType.from_numpy(array.dtype)
        if table not in self._weights:
            parameters = weight_parameters(array, 0, ir.DataType.INT8)
            self._weights[table] = (
                self._patcher.initializer(f"{name}/quantized", parameters.quantize(array)),
                self._patcher.initializer(f"{name}/scale", parameters.scale[:, None].astype(array.dtype)),
            )
        numbers, scale = self._weights[table]
        (rows,) = patch.add("Gather", [numbers, index], [(f"{patch.title}/rows", ir.DataType.INT8, shape)], main=True)
        (scales,) = patch.add("Gather", [scale, index], [(f"{patch.title}/scales", dtype, None)])
        (real,) = patch.add("Cast", [rows], [(f"{patch.title}/cast", dtype, shape)], {"to": dtype.value})
        patch.apply(*patch.add("Mul", [real, scales], [(f"{patch.title}/product", dtype, shape)]))

    def _stored(self, found: Linear, block: int) -> tuple[ir.Value | None, ...]:
        if found.key not in self._weights:
            blocks = self._blocks(found, block)
            zero = blocks.packed_zero_point()
            self._weights[found.key] = (
                self._patcher.initializer(f"{found.name}/quantized", blocks.packed()),
                self._patcher.initializer(f"{found.name}/scale", blocks.scale.astype(found.weight.dtype)),
                *([] if zero is None else [self._patcher.initializer(f"{found.name}/zero_point", zero)]),
            )
        return self._weights[found.key]

    def _dequantized(self, found: Linear, block: int, patch: Patch) -> ir.Value:
        if found.key not in self._weights:
            attributes = {"axis": 1}
            if self._bits == 8:
                parameters = weight_parameters(found.weight, 1, ir.DataType.INT8)
                numbers, scale = parameters.quantize(found.weight), parameters.scale
            else:
                blocks = self._blocks(found, block)
                attributes = {"axis": 0, "block_size": block}
                numbers = blocks.signed().reshape(len(blocks.scale), -1).T.astype(ir.DataType.INT4.numpy())
                scale = blocks.scale.T
            dtype = ir.DataType.INT8 if self._bits == 8 else ir.DataType.INT4
            inputs = [
                self._patcher.initializer(f"{found.name}/quantized", np.ascontiguousarray(numbers), dtype),
                self._patcher.initializer(f"{found.name}/scale", np.ascontiguousarray(scale, found.weight.dtype)),
            ]
            outputs = [(f"{found.name}/dequantized", ir.DataType.from_numpy(found.weight.dtype), inputs[0].shape)]
            self._weights[found.key] = patch.add("DequantizeLinear", inputs, outputs, attributes)
        (weight,) = self._weights[found.key]
        assert weight is not None
        return weight

    def _blocks(self, found: Linear, block: int) -> Blocks:
        return self._rounded.get(found.key) or self._nearest(found, block)

    def _nearest(self, found: Linear, block: int, importance: np.ndarray | None = None) -> Blocks:
        signed_scale = self._scheme == "onnxruntime"
        return quantize(
            found.weight,
            self._bits,
            block,
            symmetric=self._symmetric,
            signed_scale=signed_scale,
            importance=importance,
        )
