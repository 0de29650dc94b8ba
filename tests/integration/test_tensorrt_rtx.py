"""TensorRT-RTX really builds engines here, without a GPU."""

import json

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from enginesmith.compiler.graph import Graph
from enginesmith.compiler.signature import parse_inputs
from enginesmith.compiler.sources import Model
from enginesmith.errors import BuildError, StorageError, TargetUnavailableError
from enginesmith.targets import get_target, parse_target
from enginesmith.targets.base import BuildRequest, EngineInfo
from enginesmith.targets.trt import build as trt

pytest.importorskip("tensorrt_rtx")

SIGNATURE = parse_inputs(["image:1x3x16x16"], ["image:0=1..4..8"])

CNN = """
<ir_version: 8, opset_import: ["" : 17]>
cnn (float[batch,3,16,16] image) => (float[batch,8] logits)
<float[8,3,3,3] w, float[8,8] w2, float[8] b2>
{
  conv = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(image, w)
  relu = Relu(conv)
  pool = GlobalAveragePool(relu)
  flat = Flatten<axis=1>(pool)
  logits = Gemm(flat, w2, b2)
}
"""

CNN_FP16 = """
<ir_version: 8, opset_import: ["" : 17]>
cnn (float[batch,3,16,16] image) => (float[batch,8,16,16] logits)
<float16[8,3,3,3] w>
{
  half = Cast<to=10>(image)
  conv = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(half, w)
  logits = Cast<to=1>(conv)
}
"""

ATTENTION = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[batch,3,16,16] image) => (float[batch,4,192] y)
<int64[3] rows = {0, 4, 192}>
{
  half = Cast<to=10>(image)
  x = Reshape(half, rows)
  key = Neg(x)
  value = Relu(x)
  attended = Attention<q_num_heads=3, kv_num_heads=3, scale=0.125>(x, key, value)
  y = Cast<to=1>(attended)
}
"""

UNKNOWN = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[batch,3,16,16] image) => (float[batch,3,16,16] y) { y = DeformConvNowhere(image) }
"""


def graph(text):
    """The graph with ones as weights."""
    model = onnx.parser.parse_model(text)
    shapes = {"w": (8, 3, 3, 3), "w2": (8, 8), "b2": (8,)}
    for value in model.graph.value_info:
        dtype = np.float16 if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16 else np.float32
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shapes[value.name], dtype), value.name))
    return Graph.from_proto(model)


@pytest.fixture
def request_for(tmp_path):
    """Makes the request for a graph; its log and progress are lists."""

    def make(text, precision="fp32", **changes):
        model = Model("onnx", None, SIGNATURE, None, None, "", 0)
        log, progress = [], []
        directory, cache = tmp_path / "engine", tmp_path / "cache"
        directory.mkdir()
        cache.mkdir()
        request = BuildRequest(
            graph(text), model, SIGNATURE, precision, {}, directory, cache, log.append,
            lambda fraction, phase: progress.append((fraction, phase)), **changes,
        )  # fmt: skip
        return request, log, progress

    return make


def test_an_engine_is_built_without_a_gpu(request_for):
    target = parse_target("tensorrt-rtx:compute_capabilities=8.6+8.9")
    request, log, progress = request_for(CNN)
    info = target.build(request)
    assert (request.directory / info.entry).stat().st_size > 10_000
    assert info.requires == {"tensorrt_rtx": info.versions["tensorrt_rtx"][:3], "compute_capability": "8.6,8.9"}
    assert info.details["flags"] == ["STRONGLY_TYPED"]
    assert info.details["layers"]["source"] == "log of the build"
    assert info.details["layers"]["types"]["correlation"] == 1
    assert len(info.details["layers"]["wide"]) == 2  # the convolution and the matrix product
    assert any("Engine generation completed" in line for line in log)
    assert progress[0] == (0.0, "reading the graph")
    assert progress[-1] == (1.0, "done")
    assert [fraction for fraction, _ in progress] == sorted(fraction for fraction, _ in progress)
    layers = json.loads((request.directory / "layers.json").read_text())
    assert len(layers["layers"]) == info.details["layers"]["count"]
    info.write(request.directory)
    assert EngineInfo.read(request.directory).details == info.details


def test_the_precision_is_that_of_the_graph(request_for):
    request, _, _ = request_for(CNN_FP16, "fp16")
    info = parse_target("tensorrt-rtx:compute_capabilities=8.9").build(request)
    assert info.details["layers"]["precisions"]["FP16"] >= 2


def test_the_parser_takes_attention_as_one_operator(request_for):
    request, _, _ = request_for(ATTENTION, "fp16")
    info = parse_target("tensorrt-rtx").build(request)
    assert info.details["layers"]["precisions"]["FP16"] >= 2


@pytest.mark.parametrize(
    ("asked", "zeros", "expected"), [(None, True, True), (None, False, False), (False, True, False)]
)
def test_sparse_kernels_are_allowed_where_weights_are_sparse(request_for, asked, zeros, expected):
    request, _, _ = request_for(CNN)
    if zeros:
        pattern = np.tile(np.array([[1], [0], [0], [1]], np.float32), (2, 8))
        request.graph.model.graph.initializers["w2"].const_value = ir.Tensor(pattern, name="w2")
    info = get_target("tensorrt-rtx", {"compute_capabilities": ["8.9"], "sparsity": asked}).build(request)
    assert ("SPARSE_WEIGHTS" in info.details["flags"]) is expected
    assert ("--sparse-weights" in info.details["reproduce"]) is expected
    assert info.options["sparsity"] is asked
    # TensorRT-RTX logs nothing of sparse kernels: it chooses them on the GPU.
    told = {"eligible": [], "picked": [], "source": "none, the log of the build says nothing of sparse kernels"}
    assert info.details.get("sparse") == (told if expected else None)


def test_a_graph_that_the_parser_refuses(request_for):
    request, _log, _ = request_for(UNKNOWN)
    with pytest.raises(BuildError, match=r"(?s)tensorrt_rtx.*failed.*DeformConvNowhere"):
        parse_target("tensorrt-rtx").build(request)
    assert not (request.directory / "model.plan").exists()


def test_a_disk_that_is_full(request_for):
    request, _, _ = request_for(CNN)
    (request.directory / "model.plan").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left on device"):
        parse_target("tensorrt-rtx").build(request)


def test_a_build_that_takes_too_long(request_for):
    request, _, _ = request_for(CNN, timeout_s=0.0)
    with pytest.raises(BuildError, match=r"took longer than 0 s for 'build' and was stopped"):
        parse_target("tensorrt-rtx").build(request)


@pytest.mark.skipif(trt.look("tensorrt_rtx").gpu is not None, reason="a GPU is here")
def test_where_no_gpu_is(request_for):
    target = parse_target("tensorrt-rtx")
    availability = target.availability()
    assert (availability.build, availability.run) == (True, False)
    assert "the NVIDIA driver cannot be loaded" in availability.reason
    assert availability.versions["tensorrt_rtx"]
    request, _, _ = request_for(CNN)
    info = target.build(request)
    with pytest.raises(TargetUnavailableError, match="the NVIDIA driver cannot be loaded"):
        target.runner(request.directory, info)
