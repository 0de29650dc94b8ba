import types

import pytest

from enginesmith.targets.trt.layers import data_type, engine_layers, graph_layers, is_narrow, logged_layers, summarize


def told(name, kind):
    """A tensor as TensorRT-RTX 1.7 logs it."""
    layout = "Strides: [16384,1,1024,64], StrideOrder: [3,0,2,1]"
    where = f"Dimensions: [-1,64,16,16], {layout}, Datatype: {kind}, Format: (NHWC) Channel major format"
    return f"{{ Name: {name}, {where} }}"


def logged(name, kind, inputs=(), constants=(), outputs=(), metadata=""):
    """A layer as TensorRT-RTX 1.7 logs it."""
    fields = {"Inputs": inputs, "Constants": constants, "Outputs": outputs}
    lists = ", ".join(f"{field}: [{' ' if tensors else ''}{', '.join(tensors)}]" for field, tensors in fields.items())
    return f"Name: {name}, LayerType: {kind}, {lists}, TacticName: t, StreamId: 0, Metadata: {metadata}"


LOG = "\n".join(
    (
        "Layers:",
        logged("__mye1_0", "shape_call"),
        logged(
            "c1_myl0_2",
            "correlation",
            [told("x", "Int8")],
            [told("w", "Int8"), told("s", "Float")],
            [told("y", "Float")],
            "[ONNX Layer: c1][ONNX Layer: DQ/x]",
        ),
        logged("__myl_AddRelu_3", "kgen", [told("y", "Float"), told("x", "Int8")], [], [told("z", "Int8")]),
        "",
        "I/O Tensors:",
        " Name: x, IOMode: Input, DataType: Float, Dimensions: [-1,64,16,16], Location: Device",
    )
)


def cask(name, kind="CaskConvolution", form="Channel major FP16 format where channel % 8", **more):
    """A layer as TensorRT 8.6 writes it."""
    tensors = [{"Name": "t", "Format/Datatype": form}]
    return {"Name": name, "LayerType": kind, "Inputs": tensors, "Outputs": tensors, **more}


def test_layers_are_counted_by_type_and_precision():
    layers = [
        cask("a"),
        cask("b", form="Thirty-two wide channel vectorized Int8"),
        {"LayerType": "kgen", "Outputs": [{"Format/Datatype": "Half"}, {"Format/Datatype": "Float"}]},
        {"LayerType": "Reformat", "Outputs": [{"Format/Datatype": "Row major linear FP32"}]},
        {"LayerType": "NoOp", "Outputs": []},
        "a line of an engine without details",
    ]
    assert summarize(layers) == {
        "count": 6,
        "types": {"CaskConvolution": 2, "kgen": 1, "Reformat": 1, "NoOp": 1, "unknown": 1},
        "precisions": {"FP16": 2, "INT8": 1, "FP32": 1},
        "narrow": 1,
        "wide": ["a"],
        "reformats": 1,
    }


def test_layers_with_dynamic_shapes_are_counted_by_the_type_of_their_weights():
    form = "N/A due to dynamic shapes"
    layers = [
        cask("a", form=form, Weights={"Type": "Half", "Count": 9408}),
        cask("b", form=form, Weights={"Type": "Int8", "Count": 9408}),
        cask("c", "CaskGemmMatrixMultiply", form, TacticName="sm90_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x128x64"),
        cask("d", "Reformat", form),
    ]
    found = summarize(layers)
    assert found["precisions"] == {"FP16": 1, "INT8": 1, "dynamic": 2}
    assert (found["narrow"], found["wide"], found["reformats"]) == (2, ["a"], 1)


@pytest.mark.parametrize(("names", "narrow"), [(("w/float", "Q/w/float", "conv1", "pool"), 1), (("conv1", "pool"), 0)])
def test_a_convolution_with_pooling_is_told_by_the_weights_quantized_in_it(names, narrow):
    layer = cask(" + ".join(names), "CaskConvActPool", "N/A due to dynamic shapes")
    assert summarize([layer])["narrow"] == narrow


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        ({"Datatype": "BFloat16", "Format": "Row major"}, "BF16"),
        ({"Datatype": "FP8E4M3"}, "FP8"),
        ({"Format/Datatype": "Row major Int8 format"}, "INT8"),
        ({"Format/Datatype": "N/A due to dynamic shapes"}, ""),
        ({}, ""),
    ],
)
def test_data_types_have_one_spelling(tensor, expected):
    assert data_type(tensor) == expected


def test_the_log_of_a_build_tells_layers_too():
    shape, convolution, pointwise = logged_layers(LOG)
    assert (shape["LayerType"], shape["Inputs"]) == ("shape_call", [])
    assert convolution["Name"] == "c1_myl0_2"
    assert [data_type(tensor) for tensor in convolution["Constants"]] == ["INT8", "FP32"]
    assert convolution["Outputs"][0]["Dimensions"] == ["-1", "64", "16", "16"]
    assert is_narrow(convolution)
    assert [data_type(tensor) for tensor in pointwise["Inputs"]] == ["FP32", "INT8"]
    found = summarize([shape, convolution, pointwise])
    assert (found["narrow"], found["wide"], found["precisions"]) == (1, [], {"FP32": 1, "INT8": 1})
    assert logged_layers("Layers:\nnone of them") == []


def test_layers_of_an_engine(capsys):
    texts = ['{"Name": "a"}', "not JSON", '{"Metadata": "Conv_0\x1eRelu_1"}']
    inspector = types.SimpleNamespace(get_layer_information=lambda index, form: texts[index])
    engine = types.SimpleNamespace(create_engine_inspector=lambda: inspector, num_layers=len(texts))
    trt = types.SimpleNamespace(LayerInformationFormat=types.SimpleNamespace(JSON="json"))
    assert engine_layers(trt, engine) == [{"Name": "a"}, "not JSON", {"Metadata": "Conv_0\x1eRelu_1"}]
    assert "TensorRT's inspector wrote no JSON" in capsys.readouterr().err


def test_layers_of_a_network():
    named = types.SimpleNamespace
    layer = named(
        name="c", type=named(name="CONVOLUTION"), num_outputs=1, get_output=lambda i: named(dtype=named(name="HALF"))
    )
    network = named(num_layers=1, get_layer=lambda index: layer)
    assert summarize(graph_layers(network))["wide"] == ["c"]
