"""What TensorRT tells of an engine's layers, and what of it matters: types, precisions, and what quantization left.

Needs the standard library only. Layers are dicts as the engine inspector writes them; versions name things differently:

                 8.6                                            10, 11, RTX
    convolution  CaskConvolution, CudaDepthwiseConvolution      correlation, conv
    product      CaskGemmMatrixMultiply, MatrixMultiply         gemm, fusion
    data type    "Format/Datatype": "... Int8 format"           "Datatype": "Int8" or "Format/Datatype"
    dynamic      the type of the weights alone                  types as ever
"""

from __future__ import annotations

import collections
import json
import re
import sys
from typing import Any

SPELLINGS = {"float": "FP32", "half": "FP16", "bfloat16": "BF16", "fp8e4m3": "FP8"}
TENSORS = ("Inputs", "Outputs", "Constants")

_TYPE = re.compile(r"\b(BF16|BFloat16|FP8E4M3|FP\d+|Float|Half|U?Int\d+|Bool)\b", re.I)
_CONVOLUTION = re.compile(r"conv|correlation", re.I)
_PRODUCT = re.compile(r"gemm|matrix_?multiply|fully_?connected|fusion", re.I)
_NARROW_WEIGHT = re.compile(r"(?:^|\+ )Q/")
_NARROW_TACTIC = re.compile(r"i8i8|_s8_|int8|imma|e4m3|_f8_", re.I)


def engine_layers(trt: Any, engine: Any) -> list[Any]:
    """The layers of an engine after fusion, as TensorRT tells them."""
    inspector, form = engine.create_engine_inspector(), trt.LayerInformationFormat.JSON
    return [_parsed(inspector.get_layer_information(index, form)) for index in range(engine.num_layers)]


def graph_layers(network: Any) -> list[Any]:
    """The layers of a network before fusion."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return [
        {
            "Name": layer.name,
            "LayerType": layer.type.name,
            "Outputs": [{"Format/Datatype": layer.get_output(i).dtype.name} for i in range(layer.num_outputs)],
        }
        for layer in layers
    ]


def logged_layers(message: str) -> list[Any]:
    """The layers of an engine after fusion, from what TensorRT-RTX logs when it has built one.

    Without a GPU its engines cannot be opened for the inspector, but the log says the same, a layer a line:

        Name: conv1, LayerType: correlation, Inputs: [ { Name: x, Datatype: Int8, ... }], ..., Metadata: ...
    """
    lines = [line for line in message.splitlines() if line.startswith("Name: ") and ", LayerType: " in line]
    return [_from_text(line) for line in lines]


def summarize(layers: list[Any]) -> dict[str, Any]:
    """Counts layers by type, and by the data type of their first output; and what quantization has come to.

    TensorRT 8.6 tells no type of outputs with dynamic shapes: that of the weights stands in, else "dynamic" is counted.

    Returns:
        count, types, precisions: of all layers.
        narrow: layers that multiply 8-bit numbers.
        wide: names of the convolutions and matrix products that do not.
        reformats: layers that only change layout or type.
    """
    types: dict[str, int] = collections.Counter()
    precisions: dict[str, int] = collections.Counter()
    narrow, wide, reformats = 0, [], 0
    for layer in layers:
        if not isinstance(layer, dict):
            types["unknown"] += 1
            continue
        kind = str(layer.get("LayerType", "unknown"))
        types[kind] += 1
        precision = _precision(layer)
        if precision:
            precisions[precision] += 1
        reformats += kind.lower() == "reformat"
        if not multiplies(layer):
            continue
        if is_narrow(layer):
            narrow += 1
        else:
            wide.append(str(layer.get("Name", "")))
    counts = {"count": len(layers), "types": dict(types), "precisions": dict(precisions)}
    return {**counts, "narrow": narrow, "wide": wide, "reformats": reformats}


def multiplies(layer: dict[str, Any]) -> bool:
    """Whether a layer is a convolution or a matrix product."""
    kinds = (str(layer.get("LayerType", "")), str(layer.get("ParameterType", "")))
    return any(_CONVOLUTION.search(kind) or _PRODUCT.search(kind) for kind in kinds)


def is_narrow(layer: dict[str, Any]) -> bool:
    """Whether a convolution or matrix product computes with 8-bit numbers.

    TensorRT 8.6 tells nothing but the name of a convolution with pooling and dynamic shapes. It is joined from those of
    fused layers: QuantizeLinear of the weights, which `compiler.quantization.weak_typing` names, is among them.
    """
    told = {data_type((layer.get("Inputs") or [{}])[0]), _weights(layer)}
    fused = _NARROW_WEIGHT.search(str(layer.get("Name", "")))
    return bool(told & {"INT8", "FP8"}) or bool(fused or _NARROW_TACTIC.search(str(layer.get("TacticName", ""))))


def data_type(tensor: dict[str, Any]) -> str:
    """The data type of an input or output, as in "INT8"; empty where TensorRT does not tell."""
    text = str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "")
    if "dynamic shapes" in text:
        return ""
    found = _TYPE.search(text)
    return SPELLINGS.get(found.group(1).lower(), found.group(1).upper()) if found else ""


def _precision(layer: dict[str, Any]) -> str:
    output = (layer.get("Outputs") or [{}])[0]
    if "dynamic shapes" not in str(output.get("Format/Datatype", "")):
        return data_type(output)
    return _weights(layer) or "dynamic"


def _weights(layer: dict[str, Any]) -> str:
    return data_type({"Datatype": (layer.get("Weights") or {}).get("Type", "")})


def _parsed(text: str) -> Any:
    """One layer; as text where TensorRT wrote no valid JSON."""
    try:
        return json.loads(text, strict=False)  # TensorRT 8.6 joins the names of fused layers by control characters
    except ValueError as error:
        print(f"TensorRT's inspector wrote no JSON: {error}: {text[:500]!r}", file=sys.stderr)
        return text


def _from_text(line: str) -> dict[str, Any]:
    layer: dict[str, Any] = {}
    for field in ("Name", "LayerType", "TacticName", "Metadata"):
        found = re.search(rf"(?:^|, ){field}: (.*?)(?=, [A-Z]\w+: |$)", line)
        layer[field] = found.group(1) if found else ""
    for field in TENSORS:
        found = re.search(rf"{field}: \[(.*?)\](?=, (?:{'|'.join(TENSORS)}|TacticName): )", line)
        layer[field] = [_tensor(text) for text in re.findall(r"\{ (.*?)\}", found.group(1))] if found else []
    return layer


def _tensor(text: str) -> dict[str, Any]:
    found = re.match(r"Name: (.*?), Dimensions: \[(.*?)\].*?, Datatype: (\w+), Format: (.*)", text)
    if found is None:
        return {"Name": text}
    name, dimensions, kind, form = found.groups()
    return {"Name": name, "Dimensions": dimensions.split(","), "Datatype": kind, "Format": form.strip()}
