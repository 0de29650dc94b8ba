"""How a model's tensors look to Triton: what is merged, dtypes, and the dimensions of a configuration.

Triton merges along the first axis of every input and output, and leaves that axis out of a configuration. A model is
merged where the dynamic batch axis stands first in all of them. A tensor without further axes gets one of size 1, as
Triton has no scalars: clients send and get ``(batch, 1)``, or ``(1,)`` where nothing is merged.
"""

from __future__ import annotations

import dataclasses

from ..compiler.signature import Signature, TensorSpec

TYPES = {
    "float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "float64": "FP64",
    "int64": "INT64", "int32": "INT32", "int16": "INT16", "int8": "INT8", "uint8": "UINT8", "bool": "BOOL",
}  # fmt: skip
"""Triton's names of dtypes, without ``TYPE_``."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Whether and how far requests can be merged.

    Attributes:
        max_batch: the largest batch; 0 where requests are not merged.
        reason: why they are not; empty where they are.
    """

    max_batch: int
    reason: str = ""


def layout(signature: Signature) -> Layout:
    """What Triton can do with a model of this signature."""
    axis = signature.batch_axis
    if axis is None:
        return Layout(0, "no input has a dynamic first axis: compile with --dynamic INPUT:0=1..8..64")
    for kind, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for spec in specs:
            if not spec.shape or spec.shape[0] != axis:
                return Layout(0, f"{kind} {spec.name!r} does not begin with the axis {axis!r}")
            if axis in spec.shape[1:]:
                return Layout(0, f"{kind} {spec.name!r} has the axis {axis!r} twice")
    if (least := signature.axes[axis].min) > 1:
        return Layout(0, f"the engine takes no batch below {least}")
    return Layout(signature.axes[axis].max)


def dims(spec: TensorSpec, *, merged: bool) -> tuple[list[int], bool]:
    """Dimensions of a tensor as a configuration has them, and whether the axis of size 1 was added."""
    found = [size if isinstance(size, int) else -1 for size in spec.shape[1 if merged else 0 :]]
    return (found, False) if found else ([1], True)
