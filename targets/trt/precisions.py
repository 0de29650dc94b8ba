"""Which precisions TensorRT and TensorRT-RTX build, from which version and on which GPU, and by which passes.

    precision      TensorRT   compute capability
    fp32, fp16     8.6        any
    int8           8.6        any
    bf16           10         8.0
    fp8            10         8.9
    int4-weights   10         any
    mixed          8.6        any; INT8 where the budget allows it
    mixed-fp16     8.6        any
    mixed-bf16     10         8.0

TensorRT-RTX has them all, but for int8 on compute capability 7.5, where it dequantizes convolutions. Networks are
strongly typed from TensorRT 10 on: types come from the graph, and what is not 8-bit is cast to fp16. DequantizeLinear
must then give fp16 itself, which takes opset 19: a Cast between it and a convolution may keep the two from being fused.
Convolutions take bfloat16 from opset 22 on. TensorRT 8.6 and 9 choose between the types that they are allowed: there
the graph stays in float32, and `compiler.quantization.weak_typing` prepares it; where nothing is quantized, as in a
transformer, it is cast to fp16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "int4-weights", "mixed", "mixed-fp16", "mixed-bf16")

STRONGLY_TYPED = 10
"""The first major version of TensorRT whose networks are strongly typed."""

LOWERINGS: Mapping[str, tuple[str, ...]] = {
    "fp32": (),
    "fp16": ("cast:to=fp16",),
    "bf16": ("opset:least=22", "cast:to=bf16"),
    "int8": ("opset:least=19", "quantize-static:scheme=tensorrt", "cast:to=fp16"),
    "fp8": ("opset:least=19", "quantize-static:scheme=tensorrt,dtype=fp8", "cast:to=fp16"),
    "int4-weights": ("opset:least=21", "quantize-weights:bits=4,scheme=tensorrt", "cast:to=fp16"),
    "mixed": ("opset:least=19", "precision:to=int8,scheme=tensorrt", "cast:to=fp16"),
    "mixed-fp16": ("precision:to=fp16",),
    "mixed-bf16": ("opset:least=22", "precision:to=bf16"),
}

WEAK_LOWERINGS: Mapping[str, tuple[str, ...]] = {
    **LOWERINGS,
    "int8": ("pin", "quantize-static:scheme=tensorrt-8"),
    "mixed": ("pin", "precision:to=int8,scheme=tensorrt-8"),
}

ALIGNMENT: Mapping[str, int] = {
    **dict.fromkeys(("fp16", "bf16", "int4-weights", "mixed-fp16", "mixed-bf16"), 8),
    **dict.fromkeys(("int8", "fp8", "mixed"), 16),
}
"""The multiple that Tensor Cores take dimensions in: 16 bytes."""

_NAMES = {"bf16": "bfloat16", "mixed-bf16": "bfloat16", "int8": "INT8", "fp8": "FP8", "int4-weights": "INT4 weights"}
_STRONG = frozenset(("bf16", "mixed-bf16", "fp8", "int4-weights"))
_LEAST_CAPABILITY = {"bf16": "8.0", "mixed-bf16": "8.0", "fp8": "8.9"}
_LEAST_CAPABILITY_RTX = {**_LEAST_CAPABILITY, "int8": "8.0"}


def refusals(major: int | None, capabilities: Sequence[str], hint: str) -> dict[str, str]:
    """Why precisions cannot be had, by precision.

    Args:
        major: major version of TensorRT; None for TensorRT-RTX.
        capabilities: compute capabilities of the GPUs that the engine is for.
        hint: what to do about a compute capability.
    """
    reasons = {}
    leasts = _LEAST_CAPABILITY_RTX if major is None else _LEAST_CAPABILITY
    for precision, name in _NAMES.items():
        least = leasts.get(precision, "0.0")
        lacking = [given for given in capabilities if _pair(given) < _pair(least)]
        if precision in _STRONG and major is not None and major < STRONGLY_TYPED:
            reasons[precision] = f"{name} needs TensorRT {STRONGLY_TYPED} or newer, found {major}"
        elif lacking:
            reasons[precision] = f"{name} needs compute capability {least} or higher, not {', '.join(lacking)}; {hint}"
    return reasons


def _pair(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))
