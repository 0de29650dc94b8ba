"""Finds attention as exporters write it, from a Softmax up to queries, keys, values and masks, and down to the result.

    q, k, v:  (batch, sequence, heads * width)  -> Reshape, Transpose ->  (batch, heads, sequence, width)
    scores:   scale * q k^T (+ mask ...)        or Where(allowed, scores, minus infinity)
    result:   Softmax(scores) v                 -> Transpose, Reshape ->  (batch, sequence, heads * width)

The scale may stand on q, on k, on both or behind their product. Batch and heads may be one axis, of the products alone
or of all, and then of what is added to the scores too.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from ..graph.editing import is_constant
from ..quantization.attention import is_finite
from .masks import Mask, all_zero, as_choice
from .operands import Operand, permuted, split, transposed, unfolded
from .patterns import integers, is_last, only_reader, pairs, producer, rank, scalar, scaled, size

_FAR_BELOW = -1e30
"""Where a score is lost in the sum with it in float32, so that choosing and adding are the same."""


class Attention(NamedTuple):
    """One attention.

    Attributes:
        masks: what is added to the scores.
        result: (batch, sequence, heads * width), or what is reshaped from that, see `reshape`.
        reshape: a node that may read the joined result in place of the split one; None where `result` is joined.
        turned: whether the sequence comes before the batch in the result.
        guarded: whether rows that are masked whole become zero; there is one mask then, a choice.
    """

    softmax: ir.Node
    query: Operand
    key: Operand
    value: Operand
    scale: float
    masks: tuple[Mask, ...]
    heads: int
    width: int
    result: ir.Value
    reshape: ir.Node | None
    turned: bool
    guarded: bool


def attention(softmax: ir.Node) -> Attention | str:
    """Reads the attention around a Softmax; where that is not possible, the reason."""
    if not is_last(softmax.attributes.get_int("axis", -1), softmax.inputs[0]):
        return "its Softmax is not over the last axis"
    mixed = _mixed(softmax)
    if isinstance(mixed, str):
        return mixed
    scored = _scores(softmax.inputs[0])
    if isinstance(scored, str):
        return scored
    product, scale, masks = scored
    guarded = unfolded(mixed.inputs[0]) is not softmax.outputs[0] and not is_finite(softmax.inputs[0])
    if guarded:
        choices = tuple(choice for mask in masks if (choice := as_choice(mask)) is not None)
        if len(masks) != 1 or not choices or rank(choices[0].value) != 4:
            return "rows that are masked whole become zero, and its mask is no choice between zero and minus infinity"
        masks = choices
    q, on_q = scaled(product.inputs[0])
    k, on_k = scaled(product.inputs[1])
    query, key, value = split(q), transposed(k), split(mixed.inputs[1])
    if any(operand.source is None for operand in (query, key, value)):
        return "queries, keys or values are not (batch, heads, sequence, width)"
    width = query.width or key.width
    heads = query.heads or key.heads or value.heads or _heads_of(mixed.outputs[0], value.width)
    if width is None or heads is None:
        return "the number of its heads is not known"
    if any(count not in (None, heads) for count in (key.heads, value.heads)):
        return f"keys and values have other heads than the {heads} of the queries"
    ends = _ends(mixed.outputs[0], heads)
    if isinstance(ends, str):
        return ends
    factor = scale * on_q * on_k
    return Attention(softmax, query, key, value, factor, masks, heads, width, *ends, guarded)


def _mixed(softmax: ir.Node) -> ir.Node | str:
    """The product of probabilities and values."""
    probabilities = softmax.outputs[0]
    readers = [node for node in probabilities.consumers() if node.op_type != "Shape"]
    guard = next((node for node in readers if node.op_type == "Where" and not node.domain), None)
    if guard is not None:
        test = producer(guard.inputs[0], "IsNaN")
        if test is None or scalar(guard.inputs[1]) != 0 or guard.inputs[2] is not probabilities:
            return "its probabilities are chosen by Where"
        probabilities = guard.outputs[0]
        readers = [node for node in probabilities.consumers() if node.op_type != "Shape"]
    if len(readers) == 1 and unfolded(readers[0].outputs[0]) is probabilities:
        probabilities = readers[0].outputs[0]
        readers = [node for node in probabilities.consumers() if node.op_type != "Shape"]
    if len(readers) != 1 or readers[0].op_type != "MatMul" or readers[0].domain:
        return "its probabilities go elsewhere than to the product with values"
    return readers[0] if readers[0].inputs[0] is probabilities else "its probabilities are the second operand"


def _scores(value: ir.Value | None) -> tuple[ir.Node, float, tuple[Mask, ...]] | str:
    """The product of queries and keys, its scale, and the masks on it."""
    masks: list[Mask] = []
    while value is not None:
        inner, factor = scaled(value)
        if (product := producer(inner, "MatMul")) is not None:
            return product, factor, tuple(mask for mask in masks if not all_zero(mask.value))
        node = producer(inner, "Add", "Where") or _opened(inner)
        if node is None:
            break
        if factor != 1:
            return "its mask is scaled together with the scores"
        if node.op_type == "Reshape":
            value = node.inputs[0]
            continue
        found = _added(node) if node.op_type == "Add" else _chosen(node)
        if isinstance(found, str):
            return found
        value, mask = found
        folded = rank(node.outputs[0]) == rank(mask.value) == 3 and size(mask.value, 0) != 1
        masks.append(mask._replace(folded=folded))
    return "its scores are no product of queries and keys"


def _added(add: ir.Node) -> tuple[ir.Value, Mask] | str:
    """The scores, and the mask that is added."""
    sides = [(scores, Mask(mask)) for scores, mask in pairs(add) if _leads_to_product(scores)]
    return sides[0] if len(sides) == 1 else "a mask cannot be told from its scores"


def _chosen(where: ir.Node) -> tuple[ir.Value, Mask] | str:
    """The scores, and the mask that stands for a choice between them and a number far below."""
    condition, yes, no = where.inputs
    for scores, masked, allowed in ((yes, no, True), (no, yes, False)):
        number = scalar(masked)
        if scores and condition and number is not None and number <= _FAR_BELOW and _leads_to_product(scores):
            return scores, Mask(condition, number, allowed)
    return "a Where chooses between its scores and something else than minus infinity"


def _leads_to_product(value: ir.Value | None) -> bool:
    """Whether this is a product of two activations, scaled and masked."""
    inner, _ = scaled(value)
    if (node := producer(inner, "MatMul")) is not None:
        return rank(node.outputs[0]) in (3, 4) and not any(v is None or v.is_initializer() for v in node.inputs)
    node = producer(inner, "Add", "Where") or _opened(inner)
    return node is not None and any(map(_leads_to_product, node.inputs))


def _opened(value: ir.Value | None) -> ir.Node | None:
    """The Reshape that makes batch and heads two axes of scores (batch * heads, queries, keys)."""
    node = producer(value, "Reshape")
    return node if node is not None and rank(node.inputs[0]) == 3 and rank(value) == 4 else None


def _heads_of(value: ir.Value, width: int | None) -> int | None:
    """How many heads the product behind the result reads, found by its weight (heads * width, out)."""
    for _ in range(5):
        node = only_reader(value)
        if node is None or not width:
            return None
        if node.op_type in ("MatMul", "Gemm") and is_constant(node.inputs[1]) and node.inputs[0] is value:
            rows = size(node.inputs[1], 1 if node.attributes.get_int("transB", 0) else 0)
            return rows // width if rows and rows % width == 0 else None
        if node.op_type not in ("Reshape", "Transpose"):
            return None
        value = node.outputs[0]
    return None


def _ends(value: ir.Value, heads: int) -> tuple[ir.Value, ir.Node | None, bool] | str:
    """The joined result, or the node that reshapes the split one, and whether the sequence comes first."""
    node = only_reader(value)
    if node is not None and node.op_type == "Reshape" and rank(node.outputs[0]) == 4 and rank(value) in (3, 4):
        # Batch and heads become two axes; or nothing changes, where the TorchScript exporter puts a Reshape between.
        node = only_reader(node.outputs[0])
    if node is None:
        return "its result goes several ways before the heads are joined"
    turned = permuted(node.outputs[0], (2, 0, 1, 3)) or permuted(node.outputs[0], (1, 0, 2))
    if turned is None and permuted(node.outputs[0], (0, 2, 1, 3)) is None:
        return "its heads are not joined behind the product"
    reshape = only_reader(node.outputs[0])
    if reshape is None or reshape.op_type != "Reshape":
        return "its heads are not joined by a Reshape"
    result, width = reshape.outputs[0], size(node.outputs[0], -1) or 0
    if rank(result) == 3 and size(result, -1) in (None, heads * width):
        return result, None, turned is not None
    shape = integers(reshape.inputs[1])
    if shape is not None and 0 not in shape:
        return result, reshape, turned is not None
    return "its result is reshaped to something else than (batch, sequence, width)"
