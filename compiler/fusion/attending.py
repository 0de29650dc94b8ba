"""Builds the nodes that stand for an attention: ONNX's Attention, or com.microsoft's, or its MultiHeadAttention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from ..graph.schemas import MICROSOFT
from ..quantization.patch import Attributes, Patch, Patcher
from .attention import Attention
from .liveness import outlives
from .masks import Mask
from .operands import Operand
from .patterns import rank, size
from .projections import Packed, packed

Form = Literal["onnx", "operands", "weights"]
"""Whose operator: ONNX's, or of ONNX Runtime the one that takes queries, keys and values, or where it can the one that
takes the tensor that they are products of."""
OPSET = 23
"""The first with an operator of its own for attention."""


class Attending:
    """Makes patches of attentions; masks that several of them use are made once."""

    def __init__(self, patcher: Patcher, form: Form) -> None:
        self._patcher = patcher
        self._form = form
        self._made: dict[object, ir.Value] = {}

    def why_not(self, found: Attention) -> str:
        """Why an attention stays as it is; empty where it can be replaced."""
        if self._form == "onnx" and self._patcher.graph.opset < OPSET:
            return f"opset {self._patcher.graph.opset} has no Attention; opset {OPSET} is the first"
        if self._form == "onnx" and found.scale <= 0:
            return f"its scale is {found.scale:g}, and Attention takes positive ones"
        if outlives(found.softmax.outputs, found.result):
            return "its probabilities, or what comes of them, are used elsewhere"
        for mask in found.masks:
            if (axes := rank(mask.value)) is None or axes > 4:
                return f"its mask {mask.value.name!r} has {axes or 'an unknown number of'} axes, not up to 4"
        return ""

    def apply(self, patch: Patch, found: Attention) -> None:
        """Puts the fused node in the place of the last node of the attention."""
        bias = self._bias(patch, found)
        if self._form == "onnx":
            heads: Attributes = {"q_num_heads": found.heads, "kv_num_heads": found.heads, "scale": found.scale}
            self._finish(patch, found, "Attention", [*self._operands(patch, found), bias], heads, "")
            return
        attributes: Attributes = {"num_heads": found.heads, "scale": found.scale}
        together = self._packed(found)
        if together is not None:
            columns = together.weight.shape[1]
            vector = np.zeros(columns, together.weight.dtype) if together.bias is None else together.bias
            weights = self._patcher.initializer(f"{patch.title}/weights", together.weight)
            inputs = [together.x, weights, self._patcher.initializer(f"{patch.title}/bias", vector), None, None, bias]
            sizes = {"qkv_hidden_sizes": together.sizes}
            self._finish(patch, found, "Attention", inputs, {**attributes, **sizes})
            return
        inputs = [*self._operands(patch, found), None, None, bias]
        self._finish(patch, found, "MultiHeadAttention", inputs, attributes)

    def _finish(
        self, patch: Patch, found: Attention, operator: str, inputs: Sequence[ir.Value | None], attributes: Attributes,
        domain: str = MICROSOFT,
    ) -> None:  # fmt: skip
        """The fused node, and behind it what the attention has beside that."""
        given = list(inputs)
        while given[-1] is None:
            given.pop()
        steps: list[tuple[str, Attributes, str]] = [(operator, attributes, domain)]
        steps += [("Where", {}, "")] if found.guarded else []
        steps += [("Transpose", {"perm": (1, 0, 2)}, "")] if found.turned else []
        steps += [("Reshape", {}, "")] if found.reshape is not None else []
        dtype, value = found.result.dtype or ir.DataType.FLOAT, None
        for number, (name, options, domain) in enumerate(steps, start=1):
            last = number == len(steps)
            shape = found.result.shape if last else ir.Shape([None, None, None])
            if name == "Where":
                given = [self._open_rows(patch, found.masks[0]), value, self._number(0.0, dtype)]
            elif name == "Reshape" and found.reshape is not None:
                given = [value, found.reshape.inputs[1]]
            elif name == "Transpose":
                given = [value]
            output = (f"{patch.title}/{name.lower()}", dtype, shape)
            (value,) = patch.add(name, given, [output], options, domain=domain, main=last)
        assert value is not None
        patch.apply(value)

    def _open_rows(self, patch: Patch, mask: Mask) -> ir.Value:
        """Whether a query sees any key, (batch, queries, 1), for a mask that all heads share."""
        if mask in self._made:
            return self._made[mask]
        value, rows = mask.value, ir.Shape([None, None, 1])
        if not mask.allowed:
            (value,) = patch.add("Not", [value], [(f"{patch.title}/allowed", ir.DataType.BOOL, value.shape)])
        output = (f"{patch.title}/allowed", ir.DataType.INT32, value.shape)
        (value,) = patch.add("Cast", [value], [output], {"to": ir.DataType.INT32.value})
        output = (f"{patch.title}/any", ir.DataType.INT32, ir.Shape([None, None, None, 1]))
        if self._patcher.graph.opset < 18:
            (value,) = patch.add("ReduceMax", [value], [output], {"axes": [-1]})
        else:
            (value,) = patch.add("ReduceMax", [value, self._constant("keys", [-1])], [output])
        output = (f"{patch.title}/any", ir.DataType.INT32, rows)
        (value,) = patch.add("Squeeze", [value, self._constant("heads", [1])], [output])
        output = (f"{patch.title}/open", ir.DataType.BOOL, rows)
        (self._made[mask],) = patch.add("Cast", [value], [output], {"to": ir.DataType.BOOL.value})
        return self._made[mask]

    def _packed(self, found: Attention) -> Packed | None:
        if self._form != "weights":
            return None
        together = packed([found.query.joined, found.key.joined, found.value.joined])
        return None if together is None or outlives(together.made, found.result) else together

    def _operands(self, patch: Patch, found: Attention) -> list[ir.Value]:
        query, key, value = found.query, found.key, found.value
        if key.crossed is not None and key.source is key.crossed:
            key = key._replace(split=self._uncrossed(patch, key.crossed))
        rest = [operand.split for operand in (key, value)]
        if self._form != "onnx" and all(operand.source is operand.split for operand in (key, value)):
            return [self._joined(patch, query, found), *(split for split in rest if split is not None)]
        return [self._joined(patch, operand, found) for operand in (query, key, value)]

    def _joined(self, patch: Patch, operand: Operand, found: Attention) -> ir.Value:
        """The operand as (batch, sequence, heads * width)."""
        if operand.joined is not None:
            return operand.joined
        if operand.turned is not None:
            return self._swapped(patch, operand.turned)
        assert operand.split is not None
        dtype = operand.split.dtype or ir.DataType.FLOAT
        wide = found.heads * operand.width if operand.width else None
        turned = (f"{patch.title}/turned", dtype, None)
        (value,) = patch.add("Transpose", [operand.split], [turned], {"perm": (0, 2, 1, 3)})
        output = (f"{patch.title}/joined", dtype, ir.Shape([None, None, wide]))
        return patch.add("Reshape", [value, self._constant("joined", [0, 0, -1])], [output])[0]

    def _uncrossed(self, patch: Patch, value: ir.Value) -> ir.Value:
        """Keys (batch, heads, sequence, width) of transposed ones."""
        shape = list(value.shape or (None, None, None, None))
        output = (f"{patch.title}/keys", value.dtype or ir.DataType.FLOAT, ir.Shape([shape[i] for i in (0, 1, 3, 2)]))
        return patch.add("Transpose", [value], [output], {"perm": (0, 1, 3, 2)})[0]

    def _swapped(self, patch: Patch, value: ir.Value) -> ir.Value:
        """Batch and sequence in the other order."""
        shape = list(value.shape or (None, None, None))
        output = (f"{patch.title}/swapped", value.dtype or ir.DataType.FLOAT, ir.Shape([shape[1], shape[0], shape[2]]))
        return patch.add("Transpose", [value], [output], {"perm": (1, 0, 2)})[0]

    def _bias(self, patch: Patch, found: Attention) -> ir.Value | None:
        """What is added to the scores, (batch or 1, heads or 1, queries, keys)."""
        if not found.masks:
            return None
        key = (found.masks, found.guarded)
        if key not in self._made:
            total, *others = (self._added(patch, mask, found) for mask in found.masks)
            for other in others:
                output = (f"{patch.title}/masks", total.dtype or ir.DataType.FLOAT, None)
                (total,) = patch.add("Add", [total, other], [output])
            self._made[key] = total
        total = self._made[key]
        rows = [size(mask.value, -2) == 1 or rank(mask.value) == 1 for mask in found.masks]
        return self._lengthened(patch, total, found) if all(rows) else total

    def _added(self, patch: Patch, mask: Mask, found: Attention) -> ir.Value:
        """One mask as a tensor of four axes to add."""
        value, dtype = mask.value, found.result.dtype or ir.DataType.FLOAT
        shape = value.shape
        if mask.masked is not None:
            zero = self._number(0.0, dtype)
            # Where no key is left, minus infinity would give NaN behind the guard that chooses zero.
            lowest = float(np.finfo(dtype.numpy()).min)
            number = self._number(max(mask.masked, lowest) if found.guarded else mask.masked, dtype)
            choice = [value, zero, number] if mask.allowed else [value, number, zero]
            (value,) = patch.add("Where", choice, [(f"{patch.title}/mask", dtype, shape)])
        missing = 4 - (rank(mask.value) or 0)
        if missing:
            axes = self._constant(f"axes{missing}", list(range(missing)))
            wider = ir.Shape([*[1] * missing, *(shape or ())])
            (value,) = patch.add("Unsqueeze", [value, axes], [(f"{patch.title}/mask", dtype, wider)])
        if mask.folded:  # (1, batch * heads, queries, keys)
            heads = self._constant("folded", [-1, found.heads, 0, 0])
            output = (f"{patch.title}/bias", dtype, ir.Shape([None, found.heads, None, None]))
            (value,) = patch.add("Reshape", [value, heads], [output])
        return value

    def _lengthened(self, patch: Patch, bias: ir.Value, found: Attention) -> ir.Value:
        """A mask of one row, repeated for each query."""
        query = found.query
        source = query.source
        assert source is not None
        place = self._constant("queries", [1 if source is query.joined else 0 if source is query.turned else 2])
        one = self._constant("one", [1])
        lengths = (f"{patch.title}/shape", ir.DataType.INT64, ir.Shape([rank(source)]))
        (lengths_of,) = patch.add("Shape", [source], [lengths])
        (count,) = patch.add(
            "Gather", [lengths_of, place], [(f"{patch.title}/queries", ir.DataType.INT64, ir.Shape([1]))], {"axis": 0}
        )
        output = (f"{patch.title}/rows", ir.DataType.INT64, ir.Shape([4]))
        (shape,) = patch.add("Concat", [one, one, count, one], [output], {"axis": 0})
        dtype = bias.dtype or ir.DataType.FLOAT
        return patch.add("Expand", [bias, shape], [(f"{patch.title}/mask", dtype, ir.Shape([None] * 4))])[0]

    def _constant(self, name: str, numbers: Sequence[int]) -> ir.Value:
        key = (name, tuple(numbers))
        if key not in self._made:
            self._made[key] = self._patcher.initializer(f"attention/{name}", np.array(numbers, np.int64))
        return self._made[key]

    def _number(self, number: float, dtype: ir.DataType) -> ir.Value:
        if (number, dtype) not in self._made:
            array = np.array(number, dtype.numpy())
            self._made[(number, dtype)] = self._patcher.initializer("attention/number", array)
        return self._made[(number, dtype)]
