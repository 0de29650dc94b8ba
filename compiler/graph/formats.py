"""What the smaller float types can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir


@dataclasses.dataclass(frozen=True)
class Format:
    """A float type.

    Attributes:
        name: as NumPy spells it.
        largest: the largest finite number.
        normal: the smallest number that has all bits of the significand.
        smallest: the smallest number; what is below half of it rounds to zero.
        bits: of the significand, the leading one included: all integers to 2 ** bits are exact.
    """

    name: str
    dtype: ir.DataType
    largest: float
    normal: float
    smallest: float
    bits: int


FORMATS: Mapping[str, Format] = {
    "fp16": Format("float16", ir.DataType.FLOAT16, 65504.0, 2.0**-14, 2.0**-24, 11),
    "bf16": Format("bfloat16", ir.DataType.BFLOAT16, (2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-133, 8),
}
