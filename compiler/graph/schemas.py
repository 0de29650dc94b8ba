"""What operators take, from their schemas: ONNX's own, and those of ONNX Runtime's domain where that is installed."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from typing import Any

import onnx.defs
import onnx_ir as ir

MICROSOFT = "com.microsoft"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One formal input or output: a type, or the name of a type variable."""

    name: str
    type: str
    required: bool
    homogeneous: bool


@dataclasses.dataclass(frozen=True)
class Schema:
    """What an operator takes. `types` maps type variables to allowed types; the last parameter may be variadic."""

    inputs: tuple[Parameter, ...]
    outputs: tuple[Parameter, ...]
    input_counts: tuple[int, int]
    output_counts: tuple[int, int]
    types: Mapping[str, frozenset[str]]
    attributes: Mapping[str, bool]

    def parameter(self, index: int, *, output: bool = False) -> Parameter:
        """The formal parameter of an actual one; variadic arguments share the last."""
        parameters = self.outputs if output else self.inputs
        return parameters[min(index, len(parameters) - 1)]

    def allows(self, parameter: Parameter, type_text: str) -> bool:
        """Whether a type such as ``tensor(float16)`` fits."""
        return type_text in self.types.get(parameter.type, (parameter.type,))


@functools.cache
def schema(domain: str, operator: str, version: int) -> Schema | None:
    """The schema in force at an opset version; None where there is no such operator, or it is deprecated there."""
    if domain == MICROSOFT:
        contributed = microsoft_schemas().get(operator)
        return _convert(contributed) if contributed else None
    try:
        found = onnx.defs.get_schema(operator, version, domain)
    except onnx.defs.SchemaError:
        return None
    return None if found.deprecated else _convert(found)


@functools.cache
def microsoft_schemas() -> dict[str, Any]:
    """The schemas of com.microsoft by operator; empty without ONNX Runtime."""
    try:
        state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    except ImportError:
        return {}
    return {s.name: s for s in state.get_all_operator_schema() if s.domain == MICROSOFT}


def _convert(found: Any) -> Schema:
    """Reads a schema of onnx, or of ONNX Runtime, whose binding spells some fields otherwise."""

    def parameters(formal: Any) -> tuple[Parameter, ...]:
        return tuple(
            Parameter(
                name=p.name,
                type=p.type_str if hasattr(p, "type_str") else p.typeStr,
                required=p.option.name == "Single",
                homogeneous=p.is_homogeneous if hasattr(p, "is_homogeneous") else p.isHomogeneous,
            )
            for p in formal
        )

    return Schema(
        inputs=parameters(found.inputs),
        outputs=parameters(found.outputs),
        input_counts=(found.min_input, found.max_input),
        output_counts=(found.min_output, found.max_output),
        types={c.type_param_str: frozenset(c.allowed_type_strs) for c in found.type_constraints},
        attributes={name: a.required for name, a in found.attributes.items()},
    )


def type_text(value_type: ir.TypeProtocol | None) -> str | None:
    """A type as schemas spell it, ``tensor(float)`` or ``seq(tensor(int64))``; None where unknown."""
    if isinstance(value_type, ir.SequenceType | ir.OptionalType):
        kind = "seq" if isinstance(value_type, ir.SequenceType) else "optional"
        inner = type_text(value_type.elem_type)
        return inner and f"{kind}({inner})"
    if value_type is None or value_type.dtype == ir.DataType.UNDEFINED:
        return None
    kind = "sparse_tensor" if isinstance(value_type, ir.SparseTensorType) else "tensor"
    return f"{kind}({value_type.dtype.name.lower()})"
