"""Queries, keys and values as products of one tensor with constants, which one product can give together.

    q = x Wq + bq,  k = x Wk + bk,  v = x Wv + bv      ->      x [Wq | Wk | Wv] + [bq | bk | bv]

The parts may come from one product by Split already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ..graph.editing import is_constant
from .patterns import integers, is_last, pairs, producer, rank, size


class Projection(NamedTuple):
    """``x @ weight + bias``.

    Attributes:
        weight: array (in, out).
        bias: array (out,); None where there is none.
        made: what the product itself gives.
    """

    x: ir.Value
    weight: np.ndarray
    bias: np.ndarray | None
    made: ir.Value


class Packed(NamedTuple):
    """Several projections of one tensor as one.

    Attributes:
        sizes: how many columns are whose.
        made: what the products give that this one stands for.
    """

    x: ir.Value
    weight: np.ndarray
    bias: np.ndarray | None
    sizes: tuple[int, ...]
    made: tuple[ir.Value, ...]


def packed(values: Sequence[ir.Value | None]) -> Packed | None:
    """What gives these values together; None where they are no products of one tensor with constants of their own."""
    parts = [found for value in values if value is not None and (found := projection(value)) is not None]
    if len(parts) != len(values) or any(part.x is not parts[0].x for part in parts):
        return None
    if len({part.weight.dtype for part in parts}) != 1 or len({part.bias is None for part in parts}) != 1:
        return None
    biases = [part.bias for part in parts if part.bias is not None]
    return Packed(
        x=parts[0].x,
        weight=np.concatenate([part.weight for part in parts], axis=1),
        bias=np.concatenate(biases) if biases else None,
        sizes=tuple(part.weight.shape[1] for part in parts),
        made=tuple(dict.fromkeys(part.made for part in parts)),
    )


def projection(value: ir.Value) -> Projection | None:
    """Reads a value (batch, sequence, out); None where it is no such product."""
    inner, bias = _biased(value)
    split = producer(inner, "Split")
    if split is None:
        found = _product(inner)
        return found and found._replace(bias=_sum(found.bias, bias))
    source, common = _biased(split.inputs[0])
    found = _product(source)
    sizes = [size(output, -1) or 0 for output in split.outputs]
    if found is None or not all(sizes) or not is_last(split.attributes.get_int("axis", 0), split.inputs[0]):
        return None
    place = next(index for index, output in enumerate(split.outputs) if output is inner)
    part = slice(sum(sizes[:place]), sum(sizes[: place + 1]))
    whole = _sum(found.bias, common)
    own = None if whole is None else whole[part]
    return Projection(found.x, found.weight[:, part], _sum(own, bias), found.made)


def _biased(value: ir.Value | None) -> tuple[ir.Value | None, np.ndarray | None]:
    """A value without the constant vector that is added to it, and that."""
    for inner, constant in pairs(producer(value, "Add")):
        if is_constant(constant) and rank(constant) == 1 and constant.const_value is not None and rank(inner) == 3:
            return inner, constant.const_value.numpy()
    return value, None


def _product(value: ir.Value | None) -> Projection | None:
    """Reads MatMul, or Gemm between two Reshapes."""
    node = producer(value, "MatMul")
    if node is not None:
        x, weight = node.inputs
        if x is None or rank(x) != 3 or rank(weight) != 2 or not _is_own(weight):
            return None
        return Projection(x, _array(weight), None, node.outputs[0])
    node = producer(value, "Reshape")
    gemm = producer(node.inputs[0], "Gemm") if node is not None else None
    flat = producer(gemm.inputs[0], "Reshape") if gemm is not None else None
    if gemm is None or flat is None or not _is_plain(gemm) or rank(value) != 3:
        return None
    x, weight, bias = flat.inputs[0], gemm.inputs[1], (*gemm.inputs, None)[2]
    if x is None or rank(x) != 3 or not _is_own(weight) or integers(flat.inputs[1]) != (-1, size(x, -1)):
        return None
    if bias is not None and (not is_constant(bias) or bias.shape is None or size(bias, -1) != size(value, -1)):
        return None
    array = _array(weight)
    matrix = array.T if gemm.attributes.get_int("transB", 0) else array
    return Projection(x, matrix, None if bias is None else _array(bias).reshape(-1), gemm.outputs[0])


def _is_plain(gemm: ir.Node) -> bool:
    factors = (gemm.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
    return not gemm.attributes.get_int("transA", 0) and all(factor == 1 for factor in factors)


def _is_own(weight: ir.Value | None) -> bool:
    return is_constant(weight) and weight is not None and len(tuple(weight.uses())) == 1


def _array(value: ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _sum(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    if a is None or b is None:
        return b if a is None else a
    total: np.ndarray = a + b
    return total
